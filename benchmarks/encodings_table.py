"""Rows of the encodings' benchmark, and the bounds that the whole table must meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TIMED_ROWS = 256
HEADING = (
    f"{'data':18} {'encoding':20} {'bytes':>7} {'KL T = 1':>9} {'KL T = 4':>9}     {'encode/s':>10} {'decode/s':>12}"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the result."""

    encoding: str
    data: str
    bytes: int
    params: dict[str, Any]
    kl_t1: float | None = None
    kl_t4: float | None = None
    kl_t1_p99: float | None = None
    top1_agreement: float | None = None
    rms_error: float | None = None
    encode_rows_per_s: float = 0.0
    decode_rows_per_s: float = 0.0
    encode_torch_rows_per_s: float = 0.0
    decode_torch_rows_per_s: float = 0.0
    note: str = ""

    @property
    def kl(self) -> tuple[float, float]:
        """KL at T = 1 and at T = 4; infinite where it was not measured."""
        infinite = float("inf")
        return (
            infinite if self.kl_t1 is None else self.kl_t1,
            infinite if self.kl_t4 is None else self.kl_t4,
        )


def verdicts(measured: list[Measured]) -> Iterator[tuple[bool, str]]:
    """What must hold, and whether it does."""
    for bound_bytes, names, bound_1, bound_4, data in (
        (1050, ("q8",), 6e-6, 2.5e-6, "photographs"),
        (830, ("q6",), 7e-5, 3e-5, "photographs"),
        (580, ("q4",), 1e-3, 5e-4, "photographs"),
        (290, ("basis",), 1.2e-2, 1.5e-3, "upsampled"),
    ):
        for name in sorted({m.data for m in measured if data in m.data}):
            fits = [m for m in measured if m.data == name and m.encoding in names and m.bytes <= bound_bytes]
            held = [m for m in fits if m.kl[0] <= bound_1 and m.kl[1] <= bound_4]
            best = min(held or fits, key=lambda m: m.kl)
            yield (
                bool(held),
                (
                    f"{name}: within {bound_bytes} B KL ≤ {bound_1:g} / {bound_4:g}: "
                    f"{best.encoding} {best.bytes} B has {best.kl_t1:.2g} / {best.kl_t4:.2g}"
                ),
            )
    yield from _against_topk(measured)
    for m in (m for m in measured if m.encoding == "sampled"):
        peers = [o for o in measured if o.rms_error and o.encoding != "sampled" and o.bytes == m.params["budget"]]
        beaten = bool(peers) and all((m.rms_error or 1) < (o.rms_error or 0) for o in peers)
        others = ", ".join(f"{o.encoding} {o.rms_error:.3f}" for o in peers)
        unbiased = abs(float(m.note.split("=")[1])) < 4
        yield beaten and unbiased, f"language model, {m.bytes} B: sampled {m.rms_error:.3f} ({m.note}); {others}"
    for m in (m for m in measured if m.encoding == "q8" and m.params["head"] == 16 and m.bytes < 2048):
        decode_ms = 1e3 * TIMED_ROWS / max(m.decode_rows_per_s, m.decode_torch_rows_per_s)
        encode = max(m.encode_rows_per_s, m.encode_torch_rows_per_s)
        fast = decode_ms < 0.3 and encode >= 50_000
        yield fast, f"{m.data}: q8 decodes 256 rows in {decode_ms:.3f} ms and encodes {encode:,.0f} rows a second"


def _against_topk(measured: list[Measured]) -> Iterator[tuple[bool, str]]:
    for data in sorted({m.data for m in measured if m.encoding == "basis"}):
        ours = [m for m in measured if m.data == data and m.encoding in ("basis", *(f"q{b}" for b in range(2, 9)))]
        worst_1 = worst_4 = 0.0
        for topk in (m for m in measured if m.data == data and m.encoding == "topk" and 60 <= m.bytes <= 1000):
            fits = [m for m in ours if m.bytes <= topk.bytes]
            if not fits:
                continue
            worst_1 = max(worst_1, min(m.kl[0] for m in fits) / topk.kl[0])
            worst_4 = max(worst_4, min(m.kl[1] for m in fits) / topk.kl[1])
        text = f"{data}: over all sizes at most {worst_1:.3f} of top-k's KL at T = 1 and {worst_4:.3f} at T = 4"
        yield worst_1 <= 0.5 and worst_4 <= 1 / 3, text


def show(m: Measured) -> str:
    """One line of the table."""
    error = f"{m.rms_error:9.4f} rms          " if m.rms_error is not None else f"{m.kl_t1:9.2e} {m.kl_t4:9.2e}    "
    speed = f"{m.encode_rows_per_s:10,.0f} {m.decode_rows_per_s:12,.0f}" if m.encode_rows_per_s else " " * 23
    shown = {key: value for key, value in m.params.items() if key not in ("depth", "unit_log2", "refine", "head_bits")}
    options = " ".join(f"{key}={value}" for key, value in shown.items())
    return f"{m.data:18} {m.encoding:20} {m.bytes:7,} {error} {speed}  {options} {m.note}"

"""Which encoding is the cheapest whose error stays within a budget, measured on real rows?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import Encoding, TopK, make_encoding, row_bytes
from softlabels.encodings.learning import MIN_PILOT_ROWS, learn_basis
from softlabels.encodings.topk import TAIL_RULES
from softlabels.errors import EncodingError

Statistic = Literal["mean", "p99", "max"]

_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Sizes tried for a basis and for topk, in bytes a class."""

# Learning a basis is a singular value decomposition of pilot rows × classes; beyond this many entries it would take
# minutes.
_MOST_ENTRIES_TO_LEARN_FROM = 1 << 25


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One line of the table: an encoding and what it did to rows that nothing was learnt from.

    Attributes:
        encoding: what was tried.
        row_bytes: bytes a row.
        kl: figures (mean, p99, max; nats) by temperature.
        top1_agreement: share of rows whose largest class stayed the largest.
        rms_error: root of the mean squared error of a gradient, see `softlabels.audit`.
        decode_rows_per_s: on this machine, NumPy.
        fits: whether it meets the budget.
        refused: why the encoding would not take these rows; empty where it did.
    """

    encoding: Encoding
    row_bytes: int
    kl: Mapping[float, Mapping[str, float]]
    top1_agreement: float
    rms_error: float
    decode_rows_per_s: float
    fits: bool
    refused: str = ""

    @property
    def label(self) -> str:
        """Name and parameters, short."""
        shown = {k: v for k, v in self.encoding.params.items() if k in ("head", "k", "tail", "residual_bits", "draws")}
        return " ".join([self.encoding.name, *(f"{key}={value}" for key, value in shown.items())])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The cheapest encoding that meets the budget, and all that were tried, by size."""

    encoding: Encoding
    table: tuple[Tried, ...]


def choose_encoding(
    pilot_BC: NDArray[np.floating[Any]],
    *,
    budget_kl: float,
    temperatures: Sequence[float] = (1.0,),
    statistic: Statistic = "mean",
    locked: bool = False,
) -> Choice:
    """Encode real rows every way and take the cheapest that meets the budget at every temperature.

    Of two of equal size the one of less error is taken. Half of the pilot is for learning (a basis), the other for
    measuring. Truncated rows are tried only where one temperature is asked for, since they can be had at no other;
    sampled ones never, since their KL to the exact row is infinite by design.

    Args:
        pilot_BC: rows as a store keeps them: logits tempered at what is captured, the largest 0. Hundreds at least.
        budget_kl: nats, that `statistic` may reach at each temperature.
        temperatures: those of interest, relative to the one that the rows are tempered with (1 is that one).
        statistic: mean, p99 or max over rows.
        locked: the rows exist at the captured temperature only (an arithmetic mean).
    Raises:
        EncodingError: nothing meets the budget; `context["table"]` holds the sizes and errors.
    """
    pilot = np.asarray(pilot_BC, dtype=np.float32)
    if len(pilot) < 2:
        raise EncodingError(
            f"a choice needs a pilot of at least two rows, not {len(pilot)}: hundreds are good", rows=[]
        )
    shown, held = pilot[: len(pilot) // 2], pilot[len(pilot) // 2 :]
    wanted = tuple(dict.fromkeys((1.0,) if locked else temperatures))
    table = [_try(candidate, held, wanted, budget_kl, statistic) for candidate in _candidates(shown, wanted)]
    table.sort(key=lambda tried: (tried.row_bytes, _worst(tried, statistic)))
    fitting = [tried for tried in table if tried.fits]
    if not fitting:
        sizes = {tried.label: _worst(tried, statistic) for tried in table}
        raise EncodingError(
            f"no encoding keeps the {statistic} KL within {budget_kl:g} nats at T = {list(wanted)} on this pilot; "
            "allow more, or keep f32",
            rows=[],
            table=sizes,
        )
    return Choice(encoding=fitting[0].encoding, table=tuple(table))


def _candidates(shown: NDArray[np.float32], temperatures: tuple[float, ...]) -> Iterator[Encoding]:
    classes = shown.shape[1]
    for name in ("f32", "f16", "bf16"):
        yield make_encoding(name, classes=classes)
    for bits in range(8, 1, -1):
        for head in sorted({max(1, min(head, classes // 8)) for head in (4, 16, 32)}):
            if head < classes:
                yield make_encoding(f"q{bits}", classes=classes, params={"head": head})
    sizes = sorted({int(classes * share) for share in _SHARES})
    if temperatures == (1.0,):
        widest = 4 if classes <= 1 << 16 else 6
        for k in sorted({max(1, (size - 4) // widest) for size in sizes}):
            yield TopK(classes=classes, k=min(k, classes), tail=TAIL_RULES[0])
    if len(shown) >= 2 * MIN_PILOT_ROWS and shown.size <= _MOST_ENTRIES_TO_LEARN_FROM:
        for size in sizes:
            if size >= 24:
                yield learn_basis(shown, row_bytes=size, temperatures=temperatures)


def _try(
    encoding: Encoding,
    held: NDArray[np.float32],
    temperatures: tuple[float, ...],
    budget_kl: float,
    statistic: Statistic,
) -> Tried:
    audit = Audit(temperatures)
    seconds = 0.0
    refused = ""
    try:
        for start in range(0, len(held), 256):
            rows = held[start : start + 256]
            encoded = encoding.encode(rows)
            began = time.perf_counter()
            decoded = encoding.decode(encoded)
            seconds += time.perf_counter() - began
            audit.add(rows, decoded, captured=1.0)
    except EncodingError as error:
        refused = error.message
    summary = audit.summary()
    kl = {T: summary["kl_nats"][f"{T:g}"] for T in temperatures if f"{T:g}" in summary["kl_nats"] and not refused}
    return Tried(
        encoding=encoding,
        row_bytes=row_bytes(encoding),
        kl=kl,
        top1_agreement=summary["top1_agreement"],
        rms_error=summary["gradient"]["rms_error"],
        decode_rows_per_s=len(held) / max(seconds, 1e-9),
        fits=len(kl) == len(temperatures) and all(figures[statistic] <= budget_kl for figures in kl.values()),
        refused=refused,
    )


def _worst(tried: Tried, statistic: Statistic) -> float:
    return max((figures[statistic] for figures in tried.kl.values()), default=float("inf"))

"""Encodings as a job file requests them, and the cheapest one that meets a KL budget.

encoding = "q8"                                      a name
encoding = "topk50"                                  short for {name = "topk", k = 50}
encoding = {name = "q", bits = 6, head = 32}         quantised, bits and head apart
encoding = {name = "topk", k = 50, tail = "ghost"}
encoding = {name = "sampled", row_bytes = 256}       or head and draws
encoding = {name = "basis", row_bytes = 290}         learnt from a pilot of real rows
encoding = "hidden"                                  the teacher's last hidden states, f16; or kept_as = "q8", "bf16", …
encoding = {name = "auto", kl = 1e-4}                the cheapest that meets the budget on a pilot of real rows
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import ENCODING_NAMES, Encoding, RowKind, TopK, make_encoding, row_bytes
from softlabels.encodings.basis_learning import MIN_PILOT_ROWS, learn_basis
from softlabels.encodings.sampled import sampled_within
from softlabels.encodings.topk import TAIL_RULES
from softlabels.errors import EncodingError, UnknownEncodingError
from softlabels.softmath import log_soften

Statistic = Literal["mean", "p99", "max"]

_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Sizes tried for a basis and for topk, in bytes a class."""

# Learning a basis is a singular value decomposition of pilot rows × classes; beyond this many entries it would take
# minutes.
_MOST_ENTRIES_TO_LEARN_FROM = 1 << 25


@dataclass(frozen=True, kw_only=True)
class EncodingTrial:
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
class EncodingChoice:
    """The cheapest encoding that meets the budget, and all that were tried, by size."""

    encoding: Encoding
    table: tuple[EncodingTrial, ...]


def choose_encoding(
    pilot_BC: NDArray[np.floating[Any]],
    *,
    budget_kl: float,
    temperatures: Sequence[float] = (1.0,),
    statistic: Statistic = "mean",
    locked: bool = False,
) -> EncodingChoice:
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
    return EncodingChoice(encoding=fitting[0].encoding, table=tuple(table))


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
) -> EncodingTrial:
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
    return EncodingTrial(
        encoding=encoding,
        row_bytes=row_bytes(encoding),
        kl=kl,
        top1_agreement=summary["top1_agreement"],
        rms_error=summary["gradient"]["rms_error"],
        decode_rows_per_s=len(held) / max(seconds, 1e-9),
        fits=len(kl) == len(temperatures) and all(figures[statistic] <= budget_kl for figures in kl.values()),
        refused=refused,
    )


def _worst(tried: EncodingTrial, statistic: Statistic) -> float:
    return max((figures[statistic] for figures in tried.kl.values()), default=float("inf"))


_TOPK = re.compile(r"topk(\d{1,9})(?:-(\w+))?")
_PILOT_KEYS = {"basis": {"row_bytes", "max_rank", "refine"}, "auto": {"kl", "statistic"}, "sampled": {"row_bytes"}}


@dataclass(frozen=True, kw_only=True)
class EncodingRequest:
    """An encoding as a person asked for it.

    Attributes:
        name: as in `ENCODING_NAMES`, or `auto`.
        params: the rest of what was said.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_pilot(self) -> bool:
        """Whether real rows have to be seen before it can be made."""
        return self.name in ("auto", "basis")

    @property
    def locked(self) -> bool:
        """Whether its rows exist at the temperature they are captured at only: what is cut off or drawn at one T."""
        return self.name in ("topk", "sampled")

    @property
    def row_kind(self) -> RowKind:
        """What its rows are. An encoding of hidden states is made from a teacher's head, see `hidden_encoding`."""
        return "hidden_states" if self.name == "hidden" else "logits"

    def make(
        self,
        *,
        classes: int,
        pilot_BC: NDArray[np.floating[Any]] | None = None,
        temperatures: Sequence[float] = (1.0,),
    ) -> Encoding:
        """The encoding.

        Args:
            classes: of a row.
            pilot_BC: real rows as a store keeps them, tempered at what they will be captured at.
            temperatures: those of interest, relative to the captured one.
        Raises:
            UnknownEncodingError: parameters that do not go with the class count.
            EncodingError: a pilot is needed and there is none, or nothing meets the budget on it.
        """
        if self.row_kind == "hidden_states":
            raise EncodingError("hidden states need the head of the teacher that they are of: see `hidden_encoding`")
        if self.needs_pilot and pilot_BC is None:
            raise EncodingError(f"encoding {self.name!r} is made from a pilot of real rows: run one first", rows=[])
        params = dict(self.params)
        if self.name == "auto":
            assert pilot_BC is not None
            chosen = choose_encoding(
                pilot_BC,
                budget_kl=float(params["kl"]),
                temperatures=temperatures,
                statistic=params.get("statistic", "mean"),
            )
            return chosen.encoding
        if self.name == "basis":
            assert pilot_BC is not None
            return learn_basis(pilot_BC, temperatures=temperatures, **params)
        if self.name == "sampled" and "row_bytes" in params:
            p_BC = (
                None
                if pilot_BC is None
                else np.exp(log_soften(np.asarray(pilot_BC, np.float64), temperature=1.0)).astype(np.float64)
            )
            return sampled_within(int(params["row_bytes"]), classes=classes, p_BC=p_BC)
        return make_encoding(self.name, classes=classes, params=params)


def parse_encoding(given: object, *, classes: int | None = None) -> EncodingRequest:
    """Read what stands under `encoding` in a job file.

    Args:
        given: a string or a table, see this file's first lines.
        classes: when known, parameters are checked against it at once.
    Raises:
        UnknownEncodingError: names the unknown name or key and the nearest known one.
    """
    requested = _read(given)
    if requested.row_kind == "hidden_states":  # names and values, checked with the smallest head
        make_encoding(
            "hidden", classes=1, params=requested.params, constants={"head": np.zeros((1, 1), dtype=np.float32)}
        )
    elif requested.name in _PILOT_KEYS and not ({"head", "draws"} & set(requested.params)):
        _check_pilot_keys(requested)
    else:
        # Made for some class count, to check names and types.
        largest = max([value for value in requested.params.values() if isinstance(value, int)], default=1)
        make_encoding(requested.name, classes=classes or max(largest + 1, 256), params=requested.params)
    return requested


def _read(given: object) -> EncodingRequest:
    if isinstance(given, str):
        short = _TOPK.fullmatch(given)
        if short is None:
            return EncodingRequest(name=given)
        tail = {} if short[2] is None else {"tail": short[2]}
        return EncodingRequest(name="topk", params={"k": int(short[1]), **tail})
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UnknownEncodingError(
            f"an encoding is a name ({', '.join((*ENCODING_NAMES, 'auto'))}) or a table with a name, not {given!r}"
        )
    params = {str(key): value for key, value in given.items() if key != "name"}
    name = str(given["name"])
    if name == "q":
        name = f"q{params.pop('bits', 8)}"
    return EncodingRequest(name=name, params=params)


def _check_pilot_keys(requested: EncodingRequest) -> None:
    allowed = _PILOT_KEYS[requested.name]
    needed = "kl" if requested.name == "auto" else "row_bytes"
    for key, value in requested.params.items():
        if key not in allowed:
            raise UnknownEncodingError(
                f"encoding {requested.name!r} takes {', '.join(sorted(allowed))} in a job, not {key!r}"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        whole = isinstance(value, int) or key == "kl"
        if not (number and whole) and not (key == "statistic" and value in ("mean", "p99", "max")):
            raise UnknownEncodingError(f"{key!r} of encoding {requested.name!r} cannot be {value!r}")
    if needed not in requested.params:
        example = f'{{name = "{requested.name}", {needed} = {"1e-4" if needed == "kl" else 256}}}'
        raise UnknownEncodingError(f"encoding {requested.name!r} needs {needed!r}, as in {example}")

"""Encodings as a job file requests them, and the cheapest one that meets a KL budget.

encoding = "q8"                                      a name
encoding = "topk50"                                  short for {name = "topk", k = 50}
encoding = {name = "q", bits = 6, head = 32}         quantised, with bits and head
encoding = {name = "topk", k = 50, tail = "ghost"}
encoding = {name = "sampled", row_bytes = 256}       or head and draws
encoding = {name = "basis", row_bytes = 290}         learnt from a pilot of real rows
encoding = "hidden"                                  the teacher's last hidden states, f16; or kept_as = "q8", "bf16", …
encoding = {name = "auto", kl = 1e-4}                the cheapest that meets the budget on a pilot of real rows
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.documents import Document, as_json, parse_document
from softlabels.encodings import ENCODING_NAMES, Encoding, RowKind, TopK, encoding_label, make_encoding, row_bytes
from softlabels.encodings.basis_learning import MIN_PILOT_ROWS, learn_basis
from softlabels.encodings.sampled import sampled_within
from softlabels.encodings.topk import TAIL_RULES
from softlabels.errors import EncodingError, UnknownEncodingError
from softlabels.softmath import soften

Statistic = Literal["mean", "p99", "max"]

_TOPK = re.compile(r"topk(\d{1,9})(?:-(\w+))?")

_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Row sizes tried for a basis and for topk, in bytes per class."""

# Learning a basis is a singular value decomposition of pilot rows × classes, which takes minutes with more entries.
_MAX_LEARNING_ENTRIES = 1 << 25


class _BasisRequest(Document, frozen=True):
    row_bytes: Annotated[int, Meta(ge=0)]
    max_rank: Annotated[int, Meta(ge=0)] | None = None
    refine: Annotated[int, Meta(ge=0)] | None = None


class _SampledRequest(Document, frozen=True):
    row_bytes: Annotated[int, Meta(ge=0)]


class _AutoRequest(Document, frozen=True):
    kl: Annotated[float, Meta(ge=0)]
    statistic: Statistic = "mean"


_REQUESTS: Mapping[str, type[Document]] = {"basis": _BasisRequest, "sampled": _SampledRequest, "auto": _AutoRequest}


@dataclass(frozen=True, kw_only=True)
class EncodingRequest:
    """An encoding as a job requests it.

    Attributes:
        name: one of `ENCODING_NAMES`, or `auto`.
        params: the other keys.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_pilot(self) -> bool:
        """Whether it is made from real rows."""
        return self.name in ("auto", "basis")

    @property
    def locked(self) -> bool:
        """Whether its rows exist only at the captured temperature, because they are truncated or sampled at one T."""
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
        """Make the encoding.

        Args:
            classes: number of classes.
            pilot_BC: real rows as a store keeps them, tempered at the captured temperature.
            temperatures: temperatures of interest, relative to the captured one.
        Raises:
            UnknownEncodingError: parameters do not fit the number of classes.
            EncodingError: a pilot is needed and there is none, or nothing meets the budget on it.
        """
        if self.row_kind == "hidden_states":
            raise EncodingError("hidden states need the head of the teacher that they come from: see `hidden_encoding`")
        if self.needs_pilot and pilot_BC is None:
            raise EncodingError(f"encoding {self.name!r} is made from a pilot of real rows: run one first", rows=[])
        params = dict(self.params)
        if self.name == "auto":
            assert pilot_BC is not None
            budget_kl = params.pop("kl")
            return choose_encoding(pilot_BC, budget_kl=budget_kl, temperatures=temperatures, **params).encoding
        if self.name == "basis":
            assert pilot_BC is not None
            return learn_basis(pilot_BC, temperatures=temperatures, **params)
        if self.name == "sampled" and "row_bytes" in params:
            p_BC = None if pilot_BC is None else soften(pilot_BC.astype(np.float64), temperature=1.0).astype(np.float64)
            return sampled_within(params["row_bytes"], classes=classes, p_BC=p_BC)
        return make_encoding(self.name, classes=classes, params=params)


def parse_encoding(given: object, *, classes: int | None = None) -> EncodingRequest:
    """Parse the value of `encoding` in a job file.

    Args:
        given: a string or a table, as listed at the top of this file.
        classes: number of classes if known, against which parameters are checked.
    Raises:
        UnknownEncodingError: an unknown name or key, with the nearest known one, or a value out of range.
    """
    name, params = _name_and_params(given)
    if name in _REQUESTS and not {"head", "draws"} & set(params):
        request = parse_document(params, _REQUESTS[name], what=f"encoding {name!r}", error=UnknownEncodingError)
        return EncodingRequest(name=name, params=as_json(request))
    if name == "hidden":  # checked with the smallest head, since the teacher's is not known yet
        make_encoding(name, classes=1, params=params, constants={"head": np.zeros((1, 1), dtype=np.float32)})
    else:  # if the number of classes is not known, checked with one that is large enough
        largest = max([value for value in params.values() if isinstance(value, int)], default=1)
        make_encoding(name, classes=classes or max(largest + 1, 256), params=params)
    return EncodingRequest(name=name, params=params)


def _name_and_params(given: object) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        short = _TOPK.fullmatch(given)
        if short is None:
            return given, {}
        return "topk", {"k": int(short[1])} | ({} if short[2] is None else {"tail": short[2]})
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UnknownEncodingError(
            f"an encoding is a name ({', '.join((*ENCODING_NAMES, 'auto'))}) or a table with a name, not {given!r}"
        )
    params = {str(key): value for key, value in given.items() if key != "name"}
    name = str(given["name"])
    return (f"q{params.pop('bits', 8)}" if name == "q" else name), params


@dataclass(frozen=True, kw_only=True)
class EncodingTrial:
    """One encoding and its errors on rows that it was not learnt from.

    Attributes:
        encoding: the encoding.
        row_bytes: bytes of one row.
        kl: mean, p99 and max in nats, by temperature.
        top1_agreement: share of rows whose largest class stayed the largest.
        rms_error: root of the mean squared error of a gradient, see `softlabels.audit`.
        fits: whether it meets the budget.
        refused: message of the encoding if it cannot hold these rows, else empty.
    """

    encoding: Encoding
    row_bytes: int
    kl: Mapping[float, Mapping[str, float]]
    top1_agreement: float
    rms_error: float
    fits: bool
    refused: str = ""


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
    """Encode real rows in every way and return the cheapest that meets the budget at every temperature.

    Of two encodings of equal size the one with the smaller error is taken. Half of the pilot is for learning (a basis),
    the other half for measuring. Truncated rows are tried only if one temperature is asked for, since they exist at no
    other; sampled rows never, since their KL to the exact row is infinite by design.

    Args:
        pilot_BC: rows as a store keeps them: logits tempered at the captured temperature, the largest 0. Hundreds at
            least.
        budget_kl: upper limit of `statistic` at each temperature, in nats.
        temperatures: temperatures of interest, relative to the captured one.
        statistic: mean, p99 or max over rows.
        locked: whether the rows exist only at the captured temperature (an arithmetic mean).
    Raises:
        EncodingError: nothing meets the budget; `context["table"]` holds the errors.
    """
    pilot = np.asarray(pilot_BC, dtype=np.float32)
    if len(pilot) < 2:
        raise EncodingError(
            f"a choice needs a pilot of at least two rows, not {len(pilot)}: hundreds are good", rows=[]
        )
    learning, held_out = pilot[: len(pilot) // 2], pilot[len(pilot) // 2 :]
    wanted = tuple(dict.fromkeys((1.0,) if locked else temperatures))
    table = [_try(candidate, held_out, wanted, budget_kl, statistic) for candidate in _candidates(learning, wanted)]
    table.sort(key=lambda tried: (tried.row_bytes, _worst(tried, statistic)))
    fitting = [tried for tried in table if tried.fits]
    if not fitting:
        raise EncodingError(
            f"no encoding keeps the {statistic} KL within {budget_kl:g} nats at T = {list(wanted)} on this pilot; "
            "allow more, or keep f32",
            rows=[],
            table={encoding_label(tried.encoding): _worst(tried, statistic) for tried in table},
        )
    return EncodingChoice(encoding=fitting[0].encoding, table=tuple(table))


def _candidates(learning_BC: NDArray[np.float32], temperatures: tuple[float, ...]) -> Iterator[Encoding]:
    classes = learning_BC.shape[1]
    for name in ("f32", "f16", "bf16"):
        yield make_encoding(name, classes=classes)
    for bits in range(8, 1, -1):
        for head in sorted({max(1, min(head, classes // 8)) for head in (4, 16, 32)}):
            if head < classes:
                yield make_encoding(f"q{bits}", classes=classes, params={"head": head})
    sizes = sorted({int(classes * share) for share in _SHARES})
    if temperatures == (1.0,):
        # A row of topk has 4 bytes of tail mass and, for each class kept, an id of 2 or 4 bytes and a value of 2.
        widest = 4 if classes <= 1 << 16 else 6
        for k in sorted({max(1, (size - 4) // widest) for size in sizes}):
            yield TopK(classes=classes, k=min(k, classes), tail=TAIL_RULES[0])
    if len(learning_BC) >= 2 * MIN_PILOT_ROWS and learning_BC.size <= _MAX_LEARNING_ENTRIES:
        for size in sizes:
            if size >= 24:
                yield learn_basis(learning_BC, row_bytes=size, temperatures=temperatures)


def _try(
    encoding: Encoding,
    held_out_BC: NDArray[np.float32],
    temperatures: tuple[float, ...],
    budget_kl: float,
    statistic: Statistic,
) -> EncodingTrial:
    audit = Audit(temperatures)
    refused = ""
    try:
        for start in range(0, len(held_out_BC), 256):
            rows = held_out_BC[start : start + 256]
            audit.add(rows, encoding.decode(encoding.encode(rows)), captured=1.0)
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
        fits=len(kl) == len(temperatures) and all(figures[statistic] <= budget_kl for figures in kl.values()),
        refused=refused,
    )


def _worst(tried: EncodingTrial, statistic: Statistic) -> float:
    return max((figures[statistic] for figures in tried.kl.values()), default=float("inf"))

"""What may a job file say under `encoding`, and which encoding does that become once classes and real rows are known?

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import ENCODING_NAMES, Encoding, make_encoding
from softlabels.encodings.auto import choose_encoding
from softlabels.encodings.learning import learn_basis
from softlabels.encodings.sampled import sampled_within
from softlabels.errors import EncodingError, UnknownEncodingError
from softlabels.softmath import log_soften

_TOPK = re.compile(r"topk(\d{1,9})(?:-(\w+))?")
_PILOT_KEYS = {"basis": {"row_bytes", "max_rank", "refine"}, "auto": {"kl", "statistic"}, "sampled": {"row_bytes"}}


@dataclass(frozen=True, kw_only=True)
class RequestedEncoding:
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
    def of_hidden_states(self) -> bool:
        """Whether rows are hidden states, so that it is made from a teacher's head, see `hidden_encoding`."""
        return self.name == "hidden"

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
        if self.of_hidden_states:
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


def parse_encoding(given: object, *, classes: int | None = None) -> RequestedEncoding:
    """Read what stands under `encoding` in a job file.

    Args:
        given: a string or a table, see this file's first lines.
        classes: when known, parameters are checked against it at once.
    Raises:
        UnknownEncodingError: names the unknown name or key and the nearest known one.
    """
    requested = _read(given)
    if requested.of_hidden_states:  # names and values, checked with the smallest head
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


def _read(given: object) -> RequestedEncoding:
    if isinstance(given, str):
        short = _TOPK.fullmatch(given)
        if short is None:
            return RequestedEncoding(name=given)
        tail = {} if short[2] is None else {"tail": short[2]}
        return RequestedEncoding(name="topk", params={"k": int(short[1]), **tail})
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UnknownEncodingError(
            f"an encoding is a name ({', '.join((*ENCODING_NAMES, 'auto'))}) or a table with a name, not {given!r}"
        )
    params = {str(key): value for key, value in given.items() if key != "name"}
    name = str(given["name"])
    if name == "q":
        name = f"q{params.pop('bits', 8)}"
    return RequestedEncoding(name=name, params=params)


def _check_pilot_keys(requested: RequestedEncoding) -> None:
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

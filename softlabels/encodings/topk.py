"""Truncated rows: the k largest entries, the mass of the rest (the tail), and a rule for the tail. Name `topk`.

Three arrays: `class_ids` (uint16 up to 65,536 classes, else uint32) · `values` (f16, log-probabilities) · `tail_mass`
(f32, the sum of the truncated probabilities, which is more exact than 1 minus the kept ones). Ids are separate because
float16 holds no integer above 2,048 exactly.

Tail rules: `uniform` spreads the tail mass evenly over the truncated classes. `renormalise` gives them 0 and scales the
kept ones up (biased: a student learns that they are impossible). `ghost` keeps the tail as one extra class, to be
compared with the student's total mass outside the ids (`entries`); decoded to all classes, it is as `uniform`.

Bound: kept log-probabilities within 2⁻¹¹ relative (2⁻²⁵ absolute near 0); no bound for the rest. Locked to the T that
the rows were tempered with, since tempering does not commute with truncation. Refused: NaN, +inf, log-probabilities
under -65,504.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import NUMPY, Array, Ops, natural_log, top_k_shifted
from softlabels.encodings.base import Encoding, Field, check_shape, shifted_rows
from softlabels.errors import EncodingError, UnknownEncodingError

TailRule = Literal["uniform", "ghost", "renormalise"]
TAIL_RULES: tuple[TailRule, ...] = get_args(TailRule)

# Not `ids`: a store uses that name for sample ids, and both are in one reply.
CLASS_IDS, VALUES, TAIL_MASS = "class_ids", "values", "tail_mass"


@dataclass(frozen=True, kw_only=True)
class TopK(Encoding):
    """The k largest entries of each row.

    Attributes:
        classes: C.
        k: number of entries kept, 1 to C.
        tail: rule for the rest.
    """

    name = "topk"
    retemperable = False  # the shape of the tail at another T is lost
    param_names = ("k", "tail")

    classes: int
    k: int
    tail: TailRule = "uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.classes or self.tail not in TAIL_RULES:
            raise UnknownEncodingError(
                f"topk of {self.classes} classes keeps k = 1 to {self.classes} and its tail rule is one of "
                f"{', '.join(TAIL_RULES)}, not k = {self.k} and tail = {self.tail!r}"
            )

    @property
    def fields(self) -> Mapping[str, Field]:
        """`class_ids`, `values` and `tail_mass`."""
        return {
            CLASS_IDS: Field(dtype=np.dtype(f"<{self._id_type}"), row_shape=(self.k,)),
            VALUES: Field(dtype=np.dtype("<f2"), row_shape=(self.k,)),
            TAIL_MASS: Field(dtype=np.dtype("<f4"), row_shape=(1,)),
        }

    @property
    def _id_type(self) -> str:
        return "u2" if self.classes <= 1 << 16 else "u4"

    def entries(
        self, encoded: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Return only what is kept: ids and log-probabilities [B, k], and the log of the tail mass [B, 1]."""
        tail = natural_log(NUMPY, encoded[TAIL_MASS].astype(np.float32))
        return encoded[CLASS_IDS].astype(np.int64), encoded[VALUES].astype(np.float32), tail

    def _encode(self, ops: Ops, rows_BW: Array, keys_B: NDArray[np.uint64] | None) -> dict[str, Array]:
        check_shape(rows_BW, self.classes)
        z = shifted_rows(ops, rows_BW, name=self.name, minus_inf=True)
        ids_BK = top_k_shifted(ops, z, self.k)
        p = ops.xp.exp(ops.cast(z, "f8"))
        total_B1 = ops.sum(p)
        kept = ops.gather(p, ids_BK)
        ops.scatter(p, ids_BK, kept * 0.0)
        # The logarithm in float32 of a float64 sum: libraries differ by less than float16 resolves.
        scale_B1 = natural_log(ops, ops.cast(total_B1, "f4"))
        exact_BK = ops.gather(z, ids_BK)
        values = ops.cast(exact_BK - scale_B1, "f2")
        rows = ops.rows_where(((values == -float("inf")) & (exact_BK > -float("inf"))).any(-1))
        if rows:
            raise EncodingError(
                f"topk cannot hold {len(rows)} row(s): a kept log-probability is under -65,504, the range of float16; "
                "keep fewer classes, or use encoding 'f32'",
                rows=rows,
            )
        tail_mass = ops.cast(ops.sum(p) / total_B1, "f4")
        return {CLASS_IDS: ops.cast(ids_BK, self._id_type), VALUES: values, TAIL_MASS: tail_mass}

    def _decode(self, ops: Ops, encoded: Mapping[str, Array]) -> Array:
        leading = encoded[CLASS_IDS].shape[:-1]
        ids_BK = ops.cast(encoded[CLASS_IDS], "i8").reshape(-1, self.k)
        z = ops.zeros((len(ids_BK), self.classes), "f4", ids_BK)
        if self.tail == "renormalise":
            z -= float("inf")
        else:
            share_B1 = ops.cast(encoded[TAIL_MASS], "f4").reshape(-1, 1) / float(max(1, self.classes - self.k))
            z += natural_log(ops, share_B1)
        ops.scatter(z, ids_BK, ops.cast(encoded[VALUES], "f4").reshape(-1, self.k))
        return z.reshape(*leading, self.classes)

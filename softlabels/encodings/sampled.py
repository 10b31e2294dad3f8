"""Sampled rows: a few classes whose weights are an unbiased estimate of the distribution. Name `sampled`.

The H largest entries (the head) are kept. The remaining mass is split evenly over N systematic draws: class i is drawn
with probability p_i/τ, τ = rest/N, and weighs τ (Madow 1949). If H is at least the number of entries with p ≥ τ, this
is threshold sampling, which has the least variance that H + N kept entries can have (Duffield, Lund, Thorup 2007). With
a smaller H an entry may be drawn more than once, which is unbiased too. So H and N are the same for every row, and a
row has a fixed size.

Row: ids of the head (⌈log₂ C⌉ bits each) · weights of the head (16 bits, in units of 1/65535) · low bits of the drawn
ids · their high bits in unary, packed as in `bit_packing`. Drawn ids ascend and are stored in Elias-Fano code (Elias
1974, Fano 1971): l = ⌊log₂ C/N⌋ low bits each, then bit (id >> l) + j is set for the j-th. That is about 2 + log₂ C/N
bits per id instead of log₂ C. The head's weights are rounded by one random offset per row, so their expectation is
exact as well; the draws share the remainder to 1.

Decoded rows are log-probabilities, -inf for classes that were not drawn. Their KL to the exact row is infinite and says
nothing: what matters is that gradients are right on average. Locked to the T that the rows were tempered with. Bounds:
E[q] = p within 10⁻⁹; Var q_i ≤ p_i τ for drawn entries. Refused: NaN, +inf, rows without a key. -inf is a probability
of 0.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import Array, Ops, natural_log, top_k
from softlabels.encodings.base import PackedRows, shifted_rows
from softlabels.encodings.bit_packing import BitPacking
from softlabels.encodings.quantised import id_bits
from softlabels.errors import EncodingError, UnknownEncodingError
from softlabels.splitmix64 import uniforms

WHOLE = 65535
"""The weight 1, in units of a head's weight."""


@dataclass(frozen=True, kw_only=True)
class Sampled(PackedRows):
    """The `head` largest entries, and `draws` systematic draws from the rest.

    Attributes:
        classes: C, at least 2.
        head: H, 0 to C - 1.
        draws: N, at least 1.
    """

    name = "sampled"
    retemperable = False  # a sample of p is no sample of p at another T
    param_names = ("head", "draws")

    classes: int
    head: int
    draws: int

    def __post_init__(self) -> None:
        if not 0 <= self.head < self.classes or not 1 <= self.draws <= 1 << 20:
            raise UnknownEncodingError(
                f"a sampled row of {self.classes} classes keeps 0 to {self.classes - 1} of the largest and takes at "
                f"least one draw from the rest, not head = {self.head} and draws = {self.draws}"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of one row."""
        return sum(part.size_bytes for part in self._parts)

    @cached_property
    def _low_bits(self) -> int:
        return max(0, (self.classes // self.draws).bit_length() - 1)

    @cached_property
    def _parts(self) -> tuple[BitPacking, BitPacking, BitPacking, BitPacking]:
        unary = self.draws + ((self.classes - 1) >> self._low_bits)
        return (
            BitPacking.uniform(self.head, id_bits(self.classes)),
            BitPacking.uniform(self.head, 16),
            BitPacking.uniform(self.draws, self._low_bits),
            BitPacking.uniform(unary, 1),
        )

    def _pack(self, ops: Ops, logits_BC: Array, keys_B: NDArray[np.uint64] | None) -> Array:
        if keys_B is None:
            raise EncodingError(
                "sampled rows need a key each, made from store, sample and view by rng_keys(): without keys a resumed "
                "capture would draw other samples",
                rows=list(range(min(8, len(logits_BC)))),
            )
        z = shifted_rows(ops, logits_BC, name=self.name, minus_inf=True)
        p = ops.xp.exp(ops.cast(z, "f8"))
        p = p / ops.sum(p)
        head_ids, draws_BN, units = self._draw(ops, p, keys_B)
        low = ops.cast(draws_BN & ((1 << self._low_bits) - 1), "i4")
        at = (draws_BN >> self._low_bits) + ops.constant(np.arange(self.draws), "i8", p)
        unary = ops.zeros((len(z), len(self._parts[3].widths)), "u1", p)
        ops.scatter(unary, at, ops.cast(at >= 0, "u1"))
        codes = (ops.cast(head_ids, "i4"), units, low, unary)
        return ops.concat(
            [part.pack(ops, code) for part, code in zip(self._parts, codes, strict=True) if part.size_bytes]
        )

    def _draw(self, ops: Ops, p: Array, keys_B: NDArray[np.uint64]) -> tuple[Array, Array, Array]:
        """Return head ids int64 [B, H], drawn ids int64 [B, N] ascending, head weights in units int32 [B, H]."""
        head_ids = top_k(ops, ops.cast(p, "f4"), self.head) if self.head else ops.zeros((len(p), 0), "i8", p)
        head_p = ops.gather(p, head_ids)
        # One offset for all entries of a head: each count of units is right on average, and so is their sum within 1.
        offset_B1 = ops.constant(uniforms(keys_B, 1)[:, None] + 1e-9, "f8", p)
        upto = ops.xp.floor(ops.xp.cumsum(head_p, axis=-1) * WHOLE + offset_B1)
        before = ops.concat([ops.zeros((len(p), 1), "f8", p), upto])[:, :-1]
        units = ops.cast(ops.xp.clip(upto - before, 0, WHOLE), "i4")
        rest = p + 0.0
        ops.scatter(rest, head_ids, head_p * 0.0)
        upto_BC = ops.xp.cumsum(rest, axis=-1)
        position_BN = ops.constant((np.arange(self.draws) + uniforms(keys_B, 0)[:, None]) / self.draws, "f8", p)
        drawn = ops.rank(upto_BC, position_BN * upto_BC[:, -1:])
        # Clipped, because with no mass outside the head every position is 0, and its rank is C.
        return head_ids, ops.xp.clip(drawn, 0, self.classes - 1), units

    def _unpack(self, ops: Ops, bytes_BS: Array) -> Array:
        head_ids, head_q, draws_BN, weight_B1 = self._entries(ops, bytes_BS)
        z = ops.zeros((len(bytes_BS), self.classes), "f4", bytes_BS) - float("inf")
        times_BN = ops.gather(ops.count(draws_BN, self.classes), draws_BN)
        ops.scatter(z, draws_BN, natural_log(ops, ops.cast(times_BN, "f4") * weight_B1))
        # The head last: if it holds all the mass, draws have weight 0 and arbitrary ids, the head's among them.
        ops.scatter(z, head_ids, natural_log(ops, head_q))
        return z

    def _entries(self, ops: Ops, bytes_BS: Array) -> tuple[Array, Array, Array, Array]:
        """Return head ids and weights [B, H], drawn ids [B, N], and the weight of one draw [B, 1]."""
        pieces, start = [], 0
        for part in self._parts:
            pieces.append(part.unpack(ops, bytes_BS[:, start : start + part.size_bytes]))
            start += part.size_bytes
        units = ops.cast(pieces[1], "i4")
        weight_B1 = ops.cast(WHOLE - ops.sum(units), "f4") / float(WHOLE * self.draws)
        rows, length = pieces[3].shape
        set_bits = ops.nonzero(pieces[3])
        if len(set_bits) != rows * self.draws:
            raise EncodingError("a sampled row holds the wrong number of draws: its bytes are damaged", rows=[])
        # In row r, bit (id >> l) + j is at r length + (id >> l) + j of the flattened array.
        before_BN = np.arange(rows)[:, None] * length + np.arange(self.draws)
        high = set_bits.reshape(rows, self.draws) - ops.constant(before_BN, "i8", bytes_BS)
        draws_BN = (high << self._low_bits) + ops.cast(pieces[2], "i8")
        if len(bytes_BS) and not (int(draws_BN.min()) >= 0 and int(draws_BN.max()) < self.classes):
            raise EncodingError("a sampled row has class ids out of range: its bytes are damaged", rows=[])
        return ops.cast(pieces[0], "i8"), ops.cast(units, "f4") / float(WHOLE), draws_BN, weight_B1


def expected_error(sampled: Sampled, p_BC: NDArray[np.float64]) -> float:
    """Return the root of the mean over rows of E‖q - p‖², in closed form."""
    ordered = -np.sort(-p_BC, axis=1)
    rest = ordered[:, sampled.head :]
    tau_B1 = rest.sum(axis=1, keepdims=True) / sampled.draws
    # An entry of (k + f) τ, 0 ≤ f < 1, is drawn k or k + 1 times: variance τ² f (1 - f).
    share = rest / np.maximum(tau_B1, 1e-300)
    share -= np.floor(share)
    return float(np.sqrt((tau_B1**2 * share * (1 - share)).sum(axis=1).mean()))


def sampled_within(row_bytes: int, *, classes: int, p_BC: NDArray[np.float64] | None = None) -> Sampled:
    """Return the sampled encoding with the least expected error that fits into `row_bytes` per row.

    Args:
        row_bytes: upper limit of a row's size.
        classes: C.
        p_BC: pilot distributions at the T that will be captured; if None, a sixth of the entries becomes head.
    Raises:
        EncodingError: nothing fits.
    """
    choices = []
    for head in range(min(classes, row_bytes * 8 // (id_bits(classes) + 16) + 1)):
        draws = _most_draws(row_bytes, classes, head)
        if draws:
            choices.append(Sampled(classes=classes, head=head, draws=draws))
    if not choices:
        raise EncodingError(f"not one draw of {classes} classes fits into {row_bytes} bytes a row: allow more", rows=[])
    if p_BC is None:
        return min(choices, key=lambda choice: abs(6 * choice.head - choice.head - choice.draws))
    # Some 24 head sizes are enough: the error is flat around its minimum.
    return min(choices[:: 1 + len(choices) // 24], key=lambda choice: expected_error(choice, p_BC))


def _most_draws(row_bytes: int, classes: int, head: int) -> int:
    def size_bytes(draws: int) -> int:
        return Sampled(classes=classes, head=head, draws=draws).size_bytes

    return bisect_right(range(1, min(1 << 20, 8 * row_bytes) + 1), row_bytes, key=size_bytes)

"""Rows in a learnt basis: quantised coefficients, a finer head and an optional quantised residual. Name `basis`.

Row, little-endian: offset (f16) · step (f16, only with a residual) · coefficients (`widths[j]` bits for direction j) ·
ids of the head · values of the head · residual (C codes), packed as in `bit_packing`. With integer levels q_j (see
`quantised`) and the constants B and mean, a class decodes to

    unit x (Σ_j q_j B_jc + mean_c) + offset + residual_c x step

but at most -2⁻¹⁰, and a class of the head to value x -depth / (2^head_bits - 1). A row's largest class is always in the
head (if there is one), so it stays the largest. q, B and mean are integers whose sums stay below 2²⁴, so the product is
exact in float32 in any order of additions: every library and device gives the same bits.

Bound: with a residual of b bits, half its step for every class whose residual is not clipped, as in `quantised`; the
head as given above. Without a residual rows have no bound: the audit measures the error. Refused: NaN, ±inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import Array, Ops, top_k, top_k_shifted
from softlabels.encodings.base import PackedRows, shifted_rows
from softlabels.encodings.bit_packing import BitPacking
from softlabels.encodings.quantised import (
    FLOOR,
    TABLE,
    WIDEST,
    code_table,
    head_steps,
    id_bits,
    level_table,
    levels_of,
    quantise,
)
from softlabels.errors import UnknownEncodingError

EXACT = 1 << 24
"""Sums of integers are exact in float32 below this."""

# Weight of a class's squared error in the encoder's choices: p at T = 1, plus this share of p at T = 4. KL is p e²/(2
# T²) to second order, which suggests 1/16; 0.75 keeps the two KLs at the ratio of top-k rows of equal size, about 12:1.
_FLAT_SHARE, _FLAT_TEMPERATURE = 0.75, 4.0
_HIGHEST = -(2.0**-10)  # upper limit of classes outside the head, so that the largest, in the head, stays the largest
_HEAVIEST = 60.0  # weights are limited to this multiple of their mean, which keeps conjugate gradients conditioned
_LOADING = {2: 1.5, 3: 2.1, 4: 2.7, 5: 3.2, 6: 3.7, 7: 4.2, 8: 6.0}  # as in `quantised`, on both sides


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis(PackedRows):
    """Rows in a learnt basis.

    Attributes:
        classes: C.
        head: number of classes in the head, 0 to C - 1; the encoder picks those that would otherwise cost most.
        head_bits: bits of a head's value, 6 to 16.
        depth: largest distance of a head's value below the maximum, natural-log units.
        residual_bits: 0 for no residual, or 2 to 8 for each class.
        unit_log2: log2 of the unit of the integer product.
        refine: steps of conjugate gradients that fit coefficients to the classes of most weight.
        basis_RC: int16, one direction per row, scaled by the standard deviation of its coefficients.
        mean_C: int32.
        widths_R: uint8, bits of each coefficient, 1 to 9.
    """

    name = "basis"
    retemperable = True  # every class is present
    param_names = ("head", "head_bits", "depth", "residual_bits", "unit_log2", "refine")

    classes: int
    head: int
    head_bits: int
    depth: float
    residual_bits: int
    unit_log2: int
    refine: int
    basis_RC: NDArray[np.int16] = field(repr=False)
    mean_C: NDArray[np.int32] = field(repr=False)
    widths_R: NDArray[np.uint8] = field(repr=False)

    def __post_init__(self) -> None:
        problem = _find_problem(self)
        if problem:
            raise UnknownEncodingError(f"encoding 'basis' cannot be made: {problem}")

    @property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """The learnt arrays: `basis`, `mean`, `widths`."""
        return {"basis": self.basis_RC, "mean": self.mean_C, "widths": self.widths_R}

    @property
    def size_bytes(self) -> int:
        """Bytes of one row."""
        parts = (self._coefficients, self._ids, self._values, self._residuals)
        return self._header_bytes + sum(part.size_bytes for part in parts)

    @property
    def _header_bytes(self) -> int:
        return 4 if self.residual_bits else 2

    @cached_property
    def _coefficients(self) -> BitPacking:
        return BitPacking(tuple(int(width) for width in self.widths_R))

    @cached_property
    def _ids(self) -> BitPacking:
        return BitPacking.uniform(self.head, id_bits(self.classes))

    @cached_property
    def _values(self) -> BitPacking:
        return BitPacking.uniform(self.head, self.head_bits)

    @cached_property
    def _residuals(self) -> BitPacking:
        return BitPacking.uniform(self.classes if self.residual_bits else 0, self.residual_bits)

    @cached_property
    def _constants_by_device(self) -> dict[tuple[str, str], Array]:
        return {}

    def _constant_on(self, ops: Ops, name: str, like: Array) -> Array:
        """Return a large constant in float32 on the device of `like`, copied there once."""
        # The type too: a NumPy array and a torch tensor can both be on the device "cpu".
        key = (name, str(getattr(like, "device", "")) + type(like).__name__)
        if key not in self._constants_by_device:
            value = self._projection() if name == "projection" else self.constants[name]
            self._constants_by_device[key] = ops.constant(value, "f4", like)
        return self._constants_by_device[key]

    def _projection(self) -> NDArray[np.float32]:
        """Return the least-squares projection: (row - mean) @ projection are coefficients, in units of a level."""
        basis = self.basis_RC.astype(np.float64) * 2.0**self.unit_log2
        gram = basis @ basis.T
        gram[np.diag_indices(len(gram))] += 1e-9 * np.trace(gram) / len(gram) + 1e-200  # never singular
        return np.ascontiguousarray(np.linalg.solve(gram, basis).T, dtype=np.float32)

    # -- encoding -----------------------------------------------------------------------------------------------------

    def _pack(self, ops: Ops, logits_BC: Array, keys_B: NDArray[np.uint64] | None) -> Array:
        z = ops.xp.clip(shifted_rows(ops, logits_BC, name=self.name), -FLOOR, 0.0)
        weights_BC = self._weights(ops, z)
        codes_BR, product_BC = self._fit(ops, z, weights_BC)
        offset_B1 = ops.sum((z - product_BC) * weights_BC) / ops.sum(weights_BC)
        header, approximate_BC, residual = self._residual(ops, z, product_BC, offset_B1)
        parts = [header, self._coefficients.pack(ops, codes_BR)]
        if self.head:
            ids_BK = self._choose_head(ops, z, approximate_BC)
            step_B1 = head_steps(ops, ops.constant([[-self.depth]], "f4", z), self.head_bits)
            exact_BK = ops.gather(z, ids_BK)
            values = quantise(ops, exact_BK, 0.0, step_B1, (1 << self.head_bits) - 1, kind="i4")
            # A class within half a step of the largest must not become equal to it.
            values = ops.xp.maximum(values, ops.cast(exact_BK < 0, "i4"))
            parts += [self._ids.pack(ops, ops.cast(ids_BK, "i4")), self._values.pack(ops, values)]
        return ops.concat(parts + residual)

    def _weights(self, ops: Ops, z: Array) -> Array:
        p, flat = ops.xp.exp(z), ops.xp.exp(z / _FLAT_TEMPERATURE)
        weights = p / ops.sum(p) + flat * (_FLAT_SHARE / ops.sum(flat))
        if self.head:
            # The head is kept finely whatever the fit: only the other classes determine the limit on weights.
            ids_BK = top_k_shifted(ops, z, self.head)
            ops.scatter(weights, ids_BK, ops.zeros(tuple(ids_BK.shape), "f4", z))
        weights = weights / (ops.sum(weights) / self.classes + 1e-30)
        return ops.xp.clip(weights, 1e-6, _HEAVIEST)

    def _fit(self, ops: Ops, z: Array, weights_BC: Array) -> tuple[Array, Array]:
        """Return the codes of the coefficients, and the product that they decode to."""
        if not len(self.widths_R):
            return ops.zeros((len(z), 0), "u1", z), self._product(ops, ops.zeros((len(z), 0), "u1", z))
        unit = 2.0**self.unit_log2
        centred = z - ops.sum(z) / self.classes - ops.constant(self.mean_C * unit, "f4", z)
        q_BR = centred @ self._constant_on(ops, "projection", z)
        if self.refine:
            basis_RC = self._constant_on(ops, "basis", z) * unit
            q_BR = weighted_fit(ops, basis_RC, centred, weights_BC, q_BR, self.refine)
        cell = ops.cast(ops.xp.clip(ops.xp.floor(q_BR), -TABLE // 2, TABLE // 2 - 1), "i8") + TABLE // 2
        first_R = self.widths_R.astype(np.int64) * TABLE
        codes = ops.constant(code_table().ravel(), "i4", z)[cell + ops.constant(first_R, "i8", z)]
        if max(self._coefficients.widths) <= 8:
            codes = ops.cast(codes, "u1")
        return codes, self._product(ops, codes)

    def _residual(self, ops: Ops, z: Array, product_BC: Array, offset_B1: Array) -> tuple[Array, Array, list[Array]]:
        """Return header bytes, rows as they decode before the head, and the packed residual if there is one."""
        if not self.residual_bits:
            offset16 = ops.cast(offset_B1, "f2")
            return ops.bits(offset16, "u1"), product_BC + ops.cast(offset16, "f4"), []
        rest = z - product_BC
        wide = ops.cast(rest, "f8")
        mean_B1 = ops.sum(wide) / self.classes
        spread_B1 = ops.xp.clip(ops.sum(wide * wide) / self.classes - mean_B1 * mean_B1, 0.0, None) ** 0.5
        reach_B1 = ops.cast(spread_B1 * _LOADING[self.residual_bits], "f4")
        mean_B1 = ops.cast(mean_B1, "f4")
        lo_B1 = ops.xp.maximum(ops.min(rest), mean_B1 - reach_B1)
        hi_B1 = -ops.xp.maximum(-ops.max(rest), -mean_B1 - reach_B1)
        levels = (1 << self.residual_bits) - 1
        step16 = ops.cast((hi_B1 - lo_B1) * (1.001 / levels) + 2.0**-25, "f2")
        lo16, step_B1 = ops.cast(lo_B1, "f2"), ops.cast(step16, "f4")
        codes = quantise(ops, rest, ops.cast(lo16, "f4"), step_B1, levels)
        decoded = (product_BC + ops.cast(lo16, "f4")) + ops.cast(codes, "f4") * step_B1
        header = ops.concat([ops.bits(lo16, "u1"), ops.bits(step16, "u1")])
        return header, decoded, [self._residuals.pack(ops, codes)]

    def _choose_head(self, ops: Ops, z: Array, approximate_BC: Array) -> Array:
        """Return the ids of the largest class and of those that would otherwise add most to the error."""
        approximate_BC = ops.xp.clip(approximate_BC, None, _HIGHEST)
        p, flat = ops.xp.exp(z), ops.xp.exp(z / _FLAT_TEMPERATURE)
        error = approximate_BC - z
        # A class raised by e gains e^e times its mass, which dominates beyond second order.
        gain = ops.xp.exp(ops.xp.clip(error, -20.0, 20.0)) - 1.0 - error
        cost = (p / ops.sum(p) * 2.0 * gain) + flat * (_FLAT_SHARE / ops.sum(flat)) * error * error
        # 1e35 exceeds every limited cost, so the row's largest class is always chosen; float32 holds both.
        cost = ops.xp.where(z < -self.depth, 0.0, ops.xp.clip(cost, 0.0, 1e30)) + ops.cast(z == 0, "f4") * 1e35
        return top_k(ops, ops.cast(cost, "f4"), self.head)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _unpack(self, ops: Ops, bytes_BS: Array) -> Array:
        at = self._header_bytes
        header = ops.cast(ops.bits(bytes_BS[:, :at], "f2"), "f4")
        pieces = []
        for packing in (self._coefficients, self._ids, self._values, self._residuals):
            pieces.append(packing.unpack(ops, bytes_BS[:, at : at + packing.size_bytes]))
            at += packing.size_bytes
        codes_BR, ids_BK, values_BK, residual_BC = pieces
        z = self._product(ops, codes_BR)
        z += header[:, :1]
        if self.residual_bits:
            z += ops.cast(residual_BC, "f4") * header[:, 1:]
        if self.head:
            z = ops.xp.clip(z, None, _HIGHEST)
            step_B1 = head_steps(ops, ops.constant([[-self.depth]], "f4", z), self.head_bits)
            ops.scatter(z, ops.cast(ids_BK, "i8"), ops.cast(values_BK, "f4") * step_B1)
        return z

    def _product(self, ops: Ops, codes_BR: Array) -> Array:
        first_R = (1 << self.widths_R.astype(np.int64)) - 2
        cells = ops.cast(codes_BR, "i8") + ops.constant(first_R, "i8", codes_BR)
        q_BR = ops.constant(level_table(), "f4", codes_BR)[cells]
        total = ops.exact_product(q_BR, self._constant_on(ops, "basis", codes_BR))
        total += self._constant_on(ops, "mean", codes_BR)
        total *= 2.0**self.unit_log2  # a power of two: exact
        return total


def _find_problem(given: Basis) -> str:
    """Return why these parameters and arrays make no encoding, or an empty string."""
    rank = len(given.widths_R)
    if given.basis_RC.shape != (rank, given.classes) or given.mean_C.shape != (given.classes,):
        return (
            f"basis {given.basis_RC.shape}, mean {given.mean_C.shape}, {rank} widths and {given.classes} classes differ"
        )
    if given.basis_RC.dtype != np.int16 or given.mean_C.dtype != np.int32 or given.widths_R.dtype != np.uint8:
        return "basis has to be int16, mean int32 and widths uint8"
    if rank and not (int(given.widths_R.min()) >= 1 and int(given.widths_R.max()) <= WIDEST):
        return f"widths have to be 1 to {WIDEST} bits"
    if not 0 <= given.head < given.classes or not 6 <= given.head_bits <= 16:
        return f"a head of {given.head} classes and {given.head_bits} bits"
    if not 0 < given.depth <= FLOOR or given.residual_bits not in (0, 2, 3, 4, 5, 6, 7, 8):
        return f"a depth of {given.depth} and a residual of {given.residual_bits} bits"
    if not -40 <= given.unit_log2 <= 0 or not 0 <= given.refine <= 64:
        return f"a unit of 2^{given.unit_log2} and {given.refine} steps of refinement"
    if largest_sum(given.basis_RC, given.mean_C, given.widths_R) >= EXACT:
        return "its sums could exceed 2^24 and round, so NumPy and torch would decode to different bits"
    return ""


def largest_sum(basis_RC: NDArray[Any], mean_C: NDArray[Any], widths_R: NDArray[np.uint8]) -> float:
    """Return the largest absolute partial sum of any codes."""
    reach_R = np.array([levels_of(int(width))[-1] for width in widths_R], dtype=np.float64)
    sums_C = np.abs(mean_C.astype(np.float64))
    for start in range(0, len(reach_R), 64):  # in parts, because the basis in float64 is four times as large
        part = slice(start, start + 64)
        sums_C += reach_R[part] @ np.abs(basis_RC[part].astype(np.float64))
    return float(sums_C.max(initial=0.0))


def weighted_fit(ops: Ops, basis_RC: Array, y: Array, weights_BC: Array, q_BR: Array, steps: int) -> Array:
    """Minimise Σ_c w_c (y - q B)²_c for each row by conjugate gradients, from a first guess `q_BR`.

    Source: Hestenes and Stiefel 1952, with diagonal scaling.
    """
    scale_R = (basis_RC * basis_RC).sum(-1) + 1e-20
    rest = ((y - q_BR @ basis_RC) * weights_BC) @ basis_RC.T
    scaled = rest / scale_R
    direction = scaled
    size_B1 = ops.sum(rest * scaled)
    for _ in range(steps):
        image = ((direction @ basis_RC) * weights_BC) @ basis_RC.T
        length_B1 = size_B1 / (ops.sum(direction * image) + 1e-20)
        q_BR = q_BR + length_B1 * direction
        rest = rest - length_B1 * image
        scaled = rest / scale_R
        next_size_B1 = ops.sum(rest * scaled)
        direction = scaled + (next_size_B1 / (size_B1 + 1e-20)) * direction
        size_B1 = next_size_B1
    return q_BR

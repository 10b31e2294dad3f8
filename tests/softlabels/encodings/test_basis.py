"""Basis rows: learnt from a pilot, with a head and a quantised residual."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softlabels.encodings import Basis, make_encoding, row_bytes
from softlabels.encodings.basis import EXACT, largest_sum
from softlabels.encodings.basis_learning import allocate, build_basis, learn_basis, spectrum_of
from softlabels.encodings.quantised import WIDEST, code_table, distortion, levels_of
from softlabels.errors import EncodingError, UnknownEncodingError
from softlabels.softmath import kl_divergence, log_soften

CLASSES = 120


def low_rank(rows: int, seed: int) -> NDArray[np.float32]:
    """Rows with the decreasing spectrum of a classifier's, their largest at 0."""
    factors = np.random.default_rng(0).normal(size=(40, CLASSES)) * (0.9 ** np.arange(40))[:, None]
    rng = np.random.default_rng(seed)
    rows_BC = rng.normal(size=(rows, 40)) @ factors + 0.05 * rng.normal(size=(rows, CLASSES))
    return np.asarray(rows_BC - rows_BC.max(axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture(scope="module")
def learnt() -> Basis:
    """40 bytes a row."""
    return learn_basis(low_rank(600, 1), row_bytes=40)


def mean_kl(encoding: Basis, rows: NDArray[np.float32], temperature: float) -> float:
    kept = encoding.decode(encoding.encode(rows)).astype(np.float64)
    exact = log_soften(rows.astype(np.float64), temperature=temperature)
    return float(kl_divergence(exact, log_soften(kept, temperature=temperature)).mean())


class TestBasis:
    def test_rows_outside_the_pilot_are_near(self, learnt: Basis) -> None:
        """40 bytes for 120 classes: a third of a byte a class."""
        assert row_bytes(learnt) <= 40
        assert mean_kl(learnt, low_rank(200, 2), 1.0) < 0.05
        assert mean_kl(learnt, low_rank(200, 2), 4.0) < 0.005

    def test_more_bytes_are_less_error(self) -> None:
        """From 24 to 110 bytes."""
        pilot, rows = low_rank(600, 1), low_rank(200, 2)
        errors = [mean_kl(learn_basis(pilot, row_bytes=size), rows, 1.0) for size in (24, 48, 110)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2]

    @pytest.mark.parametrize("residual_bits", [0, 3])
    def test_both_libraries_decode_to_the_same_bits(self, residual_bits: int) -> None:
        """Sums of integers below 2²⁴ do not depend on the order of additions."""
        encoding = build_basis(spectrum_of(low_rank(600, 1)), row_bytes=100, head=4, residual_bits=residual_bits)
        assert encoding is not None
        rows = low_rank(200, 3)
        encoded = encoding.encode(rows)["targets"]
        ours, theirs = (
            encoding.decode({"targets": encoded}),
            encoding.decode_torch({"targets": torch.from_numpy(encoded)}),
        )
        assert np.array_equal(ours, theirs.numpy())
        torch_bytes = encoding.encode_torch(torch.from_numpy(rows))["targets"].numpy()
        assert (torch_bytes != encoded).mean() < 0.01

    @pytest.mark.parametrize("setting", ["autocast", "high", "medium", "one backend"])
    def test_settings_that_round_products_change_no_bit(self, learnt: Basis, setting: str) -> None:
        """Trainers decode under autocast and with TF32: their rows are those that NumPy decodes."""
        encoded = learnt.encode(low_rank(50, 2))
        expected = learnt.decode(encoded)
        given = {name: torch.from_numpy(array) for name, array in encoded.items()}
        before = torch.get_float32_matmul_precision()
        try:
            if setting == "one backend":
                torch.backends.cuda.matmul.fp32_precision = "tf32"
            elif setting != "autocast":
                torch.set_float32_matmul_precision(setting)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
                decoded = learnt.decode_torch(given)
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            torch.set_float32_matmul_precision(before)
        assert decoded.numpy().tobytes() == expected.tobytes()

    def test_the_largest_class_stays_the_largest(self, learnt: Basis) -> None:
        """It is in the head, and no other class reaches it."""
        rows = low_rank(300, 4)
        decoded = learnt.decode(learnt.encode(rows))
        assert (decoded.argmax(axis=1) == rows.argmax(axis=1)).all()

    def test_it_is_rebuilt_from_what_a_store_keeps(self, learnt: Basis) -> None:
        """Name, class count, parameters and constants rebuild the encoding."""
        rows = low_rank(20, 5)
        again = make_encoding("basis", classes=CLASSES, params=learnt.params, constants=learnt.constants)
        assert np.array_equal(again.encode(rows)["targets"], learnt.encode(rows)["targets"])
        assert np.array_equal(again.decode(again.encode(rows)), learnt.decode(learnt.encode(rows)))

    def test_it_goes_to_other_processes_without_what_it_derived(self, learnt: Basis) -> None:
        """A DataLoader's worker gets the constants, without the copies on a device."""
        rows = low_rank(20, 5)
        encoded = learnt.encode(rows)
        learnt.decode_torch({"targets": torch.from_numpy(encoded["targets"])})
        state = pickle.dumps(learnt)
        assert len(state) < 2 * sum(array.nbytes for array in learnt.constants.values())
        assert np.array_equal(pickle.loads(state).decode(encoded), learnt.decode(encoded))

    def test_refining_fits_what_matters(self) -> None:
        """Coefficients fitted to the probable classes lower the KL at T = 1."""
        pilot, rows = low_rank(600, 1), low_rank(200, 2)
        spectrum = spectrum_of(pilot)
        built = [build_basis(spectrum, row_bytes=40, head=3, residual_bits=0, refine=steps) for steps in (0, 4)]
        plain, refined = (mean_kl(encoding, rows, 1.0) for encoding in built if encoding is not None)
        assert refined < plain

    def test_constants_that_could_round_are_refused(self, learnt: Basis) -> None:
        """A hostile or damaged basis whose sums could pass 2²⁴."""
        with pytest.raises(UnknownEncodingError, match="2\\^24"):
            replace(learnt, basis_RC=np.full_like(learnt.basis_RC, 32767))

    def test_missing_or_foreign_constants_are_refused(self, learnt: Basis) -> None:
        """None, too few, of another type, of another size."""
        short = {name: array for name, array in learnt.constants.items() if name != "mean"}
        floats = {**learnt.constants, "basis": learnt.basis_RC.astype(np.float32)}
        for constants in (None, short, floats):
            with pytest.raises(UnknownEncodingError):
                make_encoding("basis", classes=CLASSES, params=learnt.params, constants=constants)
        with pytest.raises(UnknownEncodingError):
            make_encoding("basis", classes=CLASSES + 1, params=learnt.params, constants=learnt.constants)
        with pytest.raises(UnknownEncodingError, match="arrays"):
            make_encoding("q8", classes=CLASSES, constants=learnt.constants)

    def test_a_pilot_that_teaches_nothing_is_refused(self) -> None:
        """Too few rows, or NaN; or no room for a coefficient."""
        with pytest.raises(EncodingError, match="pilot"):
            spectrum_of(low_rank(8, 1))
        broken = low_rank(100, 1)
        broken[3, 3] = np.nan
        with pytest.raises(EncodingError, match="finite"):
            spectrum_of(broken)
        with pytest.raises(EncodingError, match="fits"):
            learn_basis(low_rank(100, 1), row_bytes=4)

    def test_a_pilot_of_identical_rows_still_makes_a_basis_or_says_why(self) -> None:
        """No direction varies, so no bits are assigned."""
        with pytest.raises(EncodingError):
            learn_basis(np.repeat(low_rank(1, 1), 64, axis=0), row_bytes=40)


class TestLearning:
    def test_bits_go_where_the_variance_is(self) -> None:
        """Falling widths within the budget, equal ones for equal variances."""
        widths = allocate(np.array([16.0, 1.0, 1.0, 0.01]), 2)
        assert list(widths) == sorted(widths, reverse=True)
        assert widths[0] > widths[1]
        assert widths.sum() <= 16

    def test_sums_stay_exact(self, learnt: Basis) -> None:
        """The unit is as fine as 2²⁴ allows, within a factor of two or of int16."""
        bound = largest_sum(learnt.basis_RC, learnt.mean_C, learnt.widths_R)
        assert bound < EXACT
        assert bound > EXACT / 4 or np.abs(learnt.basis_RC).max() > 16_000


class TestLevels:
    @pytest.mark.parametrize("bits", range(1, WIDEST + 1))
    def test_codes_are_the_nearest_levels(self, bits: int) -> None:
        """For every whole number that the table covers."""
        levels = levels_of(bits)
        values = np.arange(-1024, 1024)
        nearest = np.abs(values[:, None] - levels).min(axis=1)
        assert np.array_equal(np.abs(values - levels[code_table()[bits]]), nearest)

    def test_the_optimal_levels_have_the_distortion_of_the_literature(self) -> None:
        """Max 1960, table I: 0.3634, 0.1175, 0.03454, 0.009497."""
        found = [distortion(bits) for bits in (1, 2, 3, 4)]
        assert np.allclose(found, [0.3634, 0.1175, 0.03454, 0.009497], rtol=0.01)

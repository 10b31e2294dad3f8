"""Error statistics: accumulation and merging."""

from __future__ import annotations

import json

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import Sampled, TopK, make_encoding, rng_keys
from softlabels.softmath import kl_divergence, log_soften

RNG = np.random.default_rng(0)
ROWS = RNG.normal(0, 2, size=(2_000, 60))
ROWS -= ROWS.max(axis=1, keepdims=True)


def audit_of(name: str, rows: np.ndarray, temperatures: tuple[float, ...] = (1.0, 4.0)) -> Audit:
    encoding = make_encoding(name, classes=rows.shape[1])
    audit = Audit(temperatures)
    audit.add(rows, encoding.decode(encoding.encode(rows)), captured=1.0)
    return audit


class TestAudit:
    def test_kl_is_that_of_the_rows(self) -> None:
        """Mean and max as computed whole, p99 within 9% above."""
        encoding = make_encoding("q4", classes=60)
        kept = encoding.decode(encoding.encode(ROWS)).astype(np.float64)
        exact = kl_divergence(log_soften(ROWS, temperature=4.0), log_soften(kept, temperature=4.0))
        found = audit_of("q4", ROWS).summary()["kl_nats"]["4"]
        assert found["mean"] == pytest.approx(exact.mean())
        assert found["max"] == pytest.approx(exact.max())
        assert 0.99 <= found["p99"] / np.quantile(exact, 0.99) <= 1.1

    def test_parts_merge_to_the_whole_through_json(self) -> None:
        """Shards audited apart, their receipts read back, are the audit of all rows."""
        whole, merged = audit_of("q3", ROWS).summary(), Audit()
        for part in np.array_split(ROWS, 7):
            receipt = json.loads(json.dumps(audit_of("q3", part).to_json(), allow_nan=False))
            merged.merge(Audit.from_json(receipt))
        found = merged.summary()
        assert found["rows"] == 2_000
        assert found["kl_nats"]["1"]["p99"] == whole["kl_nats"]["1"]["p99"]
        assert found["kl_nats"]["1"]["mean"] == pytest.approx(whole["kl_nats"]["1"]["mean"])
        assert found["gradient"]["bias"] == pytest.approx(whole["gradient"]["bias"])
        assert found["gradient"]["rms_error"] == pytest.approx(whole["gradient"]["rms_error"])

    def test_exact_rows_have_no_error(self) -> None:
        """All figures are 0, and top-1 agrees everywhere."""
        found = audit_of("f32", ROWS.astype(np.float32)).summary()
        assert found["top1_agreement"] == 1
        assert found["dropped_mass"] == 0
        assert found["gradient"] == {"rms_error": 0, "bias": 0, "bias_ratio": 0}

    def test_dropped_mass_is_what_was_cut_off(self) -> None:
        """As stored by the encoding, or the mass of classes that decode to 0."""
        encoding = TopK(classes=60, k=5, tail="renormalise")
        encoded = encoding.encode(ROWS)
        decoded = encoding.decode(encoded)
        told, read = Audit(), Audit()
        told.add(ROWS, decoded, captured=1.0, dropped_mass_B=encoded["tail_mass"])
        read.add(ROWS, decoded, captured=1.0)
        assert told.summary()["dropped_mass"] == pytest.approx(float(encoded["tail_mass"].mean()), rel=1e-5)
        assert read.summary()["dropped_mass"] == pytest.approx(told.summary()["dropped_mass"], rel=1e-4)

    def test_a_sample_is_unbiased_and_a_cut_is_not(self) -> None:
        """The bias ratio is about 1 for `sampled` and grows with the rows for a renormalised top-k."""
        sampled, cut = Sampled(classes=60, head=3, draws=4), TopK(classes=60, k=7, tail="renormalise")
        ratios = []
        for encoding in (sampled, cut):
            audit = Audit()
            rows = np.repeat(ROWS[:1], 2_000, axis=0)
            encoded = encoding.encode(rows, keys_B=rng_keys("audit", np.arange(2_000)))
            audit.add(rows, encoding.decode(encoded), captured=1.0)
            ratios.append(audit.summary()["gradient"]["bias_ratio"])
        assert ratios[0] < 3
        assert ratios[1] > 500

    def test_infinite_kl_is_counted_and_not_averaged(self) -> None:
        """JSON has no infinity, and a mean that is infinite says nothing."""
        encoding = Sampled(classes=60, head=3, draws=4)
        audit = Audit((1.0,))
        encoded = encoding.encode(ROWS, keys_B=rng_keys("audit", np.arange(len(ROWS))))
        audit.add(ROWS, encoding.decode(encoded), captured=1.0)
        found = Audit.from_json(json.loads(json.dumps(audit.to_json(), allow_nan=False))).summary()
        assert found["kl_nats"] == {}
        assert found["infinite_kl_rows"] == {"1": 2_000}

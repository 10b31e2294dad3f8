"""Judgement of what a store returned: right, refused with a code, or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from softlabels.errors import SoftLabelsError
from softlabels.target_store import TargetStore
from softlabels.targets import SoftTargets
from tests.faults.generator.stores import Model

RIGHT, REFUSED, HARMLESS, VOID, WRONG = "right", "refused", "harmless", "void", "WRONG"


class WrongError(Exception):
    """Something was returned that is not what was written."""


@dataclass(kw_only=True)
class Verdict:
    """What came of one case.

    Attributes:
        rows: how many rows were returned, all of them right unless `wrong` says otherwise.
        codes: codes of what was refused.
        wrong: what was returned although it is wrong, or raised although it is no refusal.
        harmless: why a change was not noticed and need not be.
        void: why nothing was changed, so that there was nothing to notice.
    """

    rows: int = 0
    codes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    harmless: str | None = None
    void: str | None = None

    @property
    def outcome(self) -> str:
        """One word for it."""
        if self.wrong:
            return WRONG
        if self.void:
            return VOID
        if self.codes:
            return REFUSED
        return HARMLESS if self.harmless else RIGHT

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Judge a part: a refusal is noted, anything else that is raised is wrong."""
        try:
            yield
        except SoftLabelsError as error:
            self.codes.append(error.code)
        except WrongError as error:
            self.wrong.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001 whatever is raised here is what the user would see
            self.wrong.append(f"{what}: {type(error).__name__}: {error}")

    def refuse_other_codes(self, allowed: frozenset[str]) -> None:
        """Take a refusal for wrong whose code does not name what was damaged."""
        self.wrong += [f"refused with {code!r}" for code in sorted(set(self.codes) - allowed)]


def judge_batch(batch: SoftTargets, model: Model, views: list[int] | None) -> int:
    """Raise WrongError unless a batch is what its ids' samples were made of; return its rows."""
    ids = batch.ids.tolist()
    if any(name not in model.positions for name in ids):
        raise WrongError(f"ids {ids[:5]} of another store")
    arrays = {**batch.encoded, "labels": batch.labels, "fingerprints": batch.fingerprints, "inputs": batch.inputs}
    arrays["view_parameters"] = batch.view_parameters
    for name, array in arrays.items():
        if array is not None:
            judge_array(name, array, model, ids, views)
    if batch.temperature != model.temperature:
        raise WrongError(f"temperature {batch.temperature}, not {model.temperature}")
    if batch.members is None:
        if batch.captured_temperature != 1.0:
            raise WrongError(f"captured at {batch.captured_temperature}, not 1")
        expected = model.decoded(ids, views)
        judge_logits(batch.logits(), expected)
    if batch.row_offsets is not None:
        lengths = [len(model.rows["labels"][model.positions[sample]]) for sample in ids]
        if np.diff(batch.row_offsets).tolist() != lengths:
            raise WrongError("rows were given to other samples of their batch")
    return len(ids)


def judge_array(name: str, array: Any, model: Model, ids: list[Any], views: list[int] | None) -> None:
    """Raise WrongError unless an array has the rows of these samples, bit by bit."""
    expected = np.asarray(model.expected(name, ids, views))
    expected = expected.reshape(array.shape) if expected.size == array.size else expected
    if expected.shape != array.shape:
        raise WrongError(f"{name}: {array.shape} where {expected.shape} is due")
    if not np.array_equal(expected, array):
        where = np.flatnonzero(np.any(np.asarray(expected != array).reshape(len(array), -1), axis=1))
        raise WrongError(f"{name}: {len(where)} of {len(array)} rows, the first at {where[:1].tolist()}")


def judge_logits(found: Any, expected: Any) -> None:
    """Raise WrongError unless decoded rows are those of the encoding as it was made."""
    if found.shape != expected.shape or not np.array_equal(found, expected):
        raise WrongError(f"{int(np.any(found != expected, axis=-1).sum())} rows were decoded to something else")


class Questions:
    """What is asked of a store in one case: drawn once, asked as often as wanted."""

    def __init__(self, rng: np.random.Generator, model: Model, only_first: int | None = None) -> None:
        self._rng, self.kind = rng, model.kind
        self._model, self._only_first = model, only_first

    def draw_ids(self, count: int) -> list[Any]:
        """Return some of the ids, in any order; of an unfinished store, of its committed shards."""
        return [self._model.ids[i] for i in self._rng.integers(self._only_first or len(self._model.ids), size=count)]

    def draw_views(self, count: int) -> list[int] | None:
        """Return a view for each sample, where the store has views."""
        return self._rng.integers(self.kind.views, size=count).tolist() if self.kind.views > 1 else None

    def batch(self, store: TargetStore, ids: list[Any], views: list[int] | None) -> SoftTargets:
        """Ask for a batch with every field that the store has."""
        arrays = store.manifest.arrays
        keys: dict[str, Any] = {} if views is None else {"views": views}
        return store.batch(
            ids,
            fingerprints=True,
            view_parameters="view_parameters" in arrays,
            inputs="inputs" in arrays,
            **keys,
        )

    def some(self, store: TargetStore, models: dict[str, Model], verdict: Verdict) -> None:
        """Read one batch."""
        with verdict.part("batch"):
            model = model_of(store, models)
            ids = self.draw_ids(24)
            views = self.draw_views(24)
            batch = self.batch(store, ids, views)
            if batch.ids.tolist() != ids:
                raise WrongError("rows of other samples than asked for")
            verdict.rows += judge_batch(batch, model, views)

    def everything(self, store: TargetStore, models: dict[str, Model], verdict: Verdict) -> None:
        """Read every row in every way: ids, a batch, an epoch, the whole store at once, a range of a sequence."""
        with verdict.part("ids"):
            if store.ids().tolist() != model_of(store, models).ids:
                raise WrongError("ids() gives other ids, or another order")
        self.some(store, models, verdict)
        if self._only_first is not None:
            return
        self.epoch(store, models, verdict)
        with verdict.part("all"):
            model = model_of(store, models)
            views = self.draw_views(len(model.ids))
            verdict.rows += judge_batch(self.batch(store, model.ids, views), model, views)
        if self.kind.sequences:
            with verdict.part("spans"):
                self._span(store, model_of(store, models), verdict)

    def epoch(self, store: TargetStore, models: dict[str, Model], verdict: Verdict) -> None:
        """Read an epoch: every sample once."""
        seed, number = int(self._rng.integers(1 << 30)), int(self._rng.integers(6))
        with verdict.part("epoch"):
            model, seen = model_of(store, models), []
            for batch in store.epoch(seed=seed, epoch=number, batch_size=32):
                views = [number % self.kind.views] * len(batch) if self.kind.views > 1 else None
                verdict.rows += judge_batch(batch, model, views)
                seen += batch.ids.tolist()
            if sorted(seen) != sorted(model.ids):
                raise WrongError(f"an epoch of {len(seen)} samples lost some or had some twice")

    def _span(self, store: TargetStore, model: Model, verdict: Verdict) -> None:
        longest = [number for number, rows in enumerate(model.rows["labels"]) if len(rows) == 2]
        position = longest[int(self._rng.integers(len(longest)))]
        begin = int(self._rng.integers(2))
        batch = store.batch([model.ids[position]], spans=[(begin, begin + 1)])
        for name in batch.encoded:
            if not np.array_equal(batch.encoded[name], model.rows[name][position][begin : begin + 1]):
                raise WrongError(f"{name}: another row of the sequence")
        verdict.rows += 1


def model_of(store: TargetStore, models: dict[str, Model]) -> Model:
    """Return the model of the digest that a store claims; raise WrongError where no store has it."""
    model = models.get(store.digest)
    if model is None:
        raise WrongError(f"opened under a digest that no store has: {store.digest[:12]}")
    return model


Ask = Callable[[TargetStore, dict[str, Model], Verdict], None]

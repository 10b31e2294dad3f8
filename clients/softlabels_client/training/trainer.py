"""How does a student learn from soft targets? One plain loop: fetch, forward, distillation loss, step.

Legend: B rows, C classes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import softlabels
from softlabels.errors import DivergenceError, MissingExtraError, RequestError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.progress import QUIET, Progress
from softlabels_client.data.dataset import SoftTargetDataset, data_loader
from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.training.checkpoint import CheckpointFolder
from softlabels_client.training.optimization import rate_factor
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.step import Learner
from softlabels_client.training.training_log import Figures, Logbook, PairRecord, TrainingLog
from softlabels_client.training.training_state import (
    TrainingState,
    copied_weights,
    draw_states,
    refuse_other_training,
    seeded,
    set_draw_states,
    training_identity,
)

Evaluate = Callable[[nn.Module], float]
"""How bad a student is, in eval mode and without gradients: `count_errors`, or any figure that should fall."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What came of a training.

    Attributes:
        losses: mean of the whole loss over each epoch's rows, as the student was while it learnt them.
        divergences: mean KL(target, student) at T over each epoch's rows, nats: 0 when the targets are learnt.
        errors: what `evaluate` returned, each time; empty without it.
        final_errors: of the student as it is now: the lowest of them where the best weights were kept, else the last.
        steps: of the optimiser.
        stopped_early: whether evaluations had ceased to improve.
        resumed_at: the step of the checkpoint that this process went on from; None where it began.
        seconds: of the whole training, evaluation and earlier processes included.
    """

    losses: tuple[float, ...]
    divergences: tuple[float, ...]
    errors: tuple[float, ...]
    final_errors: float | None
    steps: int
    stopped_early: bool
    resumed_at: int | None
    seconds: float


def distill(
    student: nn.Module,
    dataset: SoftTargetDataset,
    settings: DistillSettings,
    *,
    evaluate: Evaluate | None = None,
    progress: Progress = QUIET,
    checkpoints: CheckpointFolder | None = None,
    logs: Sequence[TrainingLog] = (),
    record: PairRecord | None = None,
) -> DistillResult:
    """Train `student` in place on the data set's soft targets; the same arguments give the same weights on one machine.

    With checkpoints that holds for a training that was killed at any moment and resumed, too. One process trains; under
    several ranks use a framework's trainer.

    Args:
        student: maps a batch of inputs to logits_BC, one a class of the store.
        dataset: inputs paired with targets, which carry the temperature.
        settings: see there.
        evaluate: called after each epoch, or every `evaluate_every` steps.
        progress: advanced by the rows of each step.
        checkpoints: where the training is kept, and taken up again.
        logs: where figures go.
        record: which pairs were learnt.
    Raises:
        ShapeMismatchError: the student's classes are not the store's.
        FingerprintMismatchError, UnknownIdError: the inputs are not those that the targets were computed for.
        CheckpointMismatchError: the checkpoints are of another training.
        RequestError: settings that do not fit each other.
        DivergenceError: the loss is no longer a finite number.
    """
    if evaluate is None and (settings.patience or settings.keep_best or settings.evaluate_every):
        raise RequestError("patience, keep_best and evaluate_every need something to evaluate on: pass `evaluate`")
    learner = Learner(student, settings)
    training = _Training(
        learner,
        dataset,
        settings,
        evaluate=evaluate,
        progress=progress,
        checkpoints=checkpoints,
        logbook=Logbook(logs, record),
    )
    with seeded(settings.seed, learner.device):
        training.take_up()
        training.learn()
    return training.result()


class _Training:
    """One course through the epochs: what comes when, and where it goes on after a break."""

    def __init__(
        self,
        learner: Learner,
        dataset: SoftTargetDataset,
        settings: DistillSettings,
        *,
        evaluate: Evaluate | None,
        progress: Progress,
        checkpoints: CheckpointFolder | None,
        logbook: Logbook,
    ) -> None:
        self._learner, self._dataset, self._settings = learner, dataset, settings
        self._evaluate, self._progress, self._checkpoints, self._logbook = evaluate, progress, checkpoints, logbook
        self._loader = data_loader(
            dataset,
            batch_size=settings.batch_size,
            seed=settings.seed,
            workers=settings.workers,
            rank=0,
            world_size=1,
            ahead=True,
        )
        self._rows_a_step = settings.batch_size * settings.accumulate
        self._steps_an_epoch = -(-len(dataset) // self._rows_a_step)
        self._state = TrainingState.beginning(learner.device)
        self._resumed_at: int | None = None
        self._started_s = time.monotonic()

    def take_up(self) -> None:
        """Go on from the newest checkpoint, where there is one and it is of this training."""
        if self._checkpoints is None or (kept := self._checkpoints.newest()) is None:
            return
        refuse_other_training(kept["training"], self._identity, where=str(self._checkpoints.path))
        self._learner.load(kept)
        set_draw_states(kept["draws"], self._learner.device)
        self._state = TrainingState.from_tree(kept["state"], self._learner.device)
        self._loader.load_state_dict(kept["place"])
        self._resumed_at = self._state.step

    def learn(self) -> None:
        """Learn what is left of every epoch."""
        with self._logbook.opened(self._state.step):
            while not self._over:
                self._learner.student.train()
                self._loader.set_epoch(self._state.epoch)
                with contextlib.closing(iter(self._loader)) as batches:
                    self._learn_from(batches)

    def result(self) -> DistillResult:
        """What came of it; the student has its best weights where those were kept."""
        state = self._state
        final = state.errors[-1] if state.errors else None
        if state.best_weights is not None:
            self._learner.student.load_state_dict(state.best_weights)
            final = state.best_errors
        return DistillResult(
            losses=tuple(state.losses),
            divergences=tuple(state.divergences),
            errors=tuple(state.errors),
            final_errors=final,
            steps=state.step,
            stopped_early=state.stopped,
            resumed_at=self._resumed_at,
            seconds=self._seconds,
        )

    @property
    def _over(self) -> bool:
        return self._state.stopped or self._state.epoch == self._settings.epochs

    @property
    def _seconds(self) -> float:
        return self._state.seconds + time.monotonic() - self._started_s

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return training_identity(self._learner.student, self._dataset, self._settings)

    def _learn_from(self, batches: Iterator[DistillationBatch]) -> None:
        """Learn from the batches that an epoch has left."""
        state, rows_an_epoch = self._state, len(self._dataset)
        for batch in batches:
            self._logbook.add_pairs(state.step + 1, state.epoch + 1, batch)
            # Steps begin at multiples of a full step's rows; at an epoch's end alone one has fewer.
            begun = state.cursor // self._rows_a_step * self._rows_a_step
            rows_of_the_step = min(self._rows_a_step, rows_an_epoch - begun)
            # Summed on the device: reading a figure at each step would make the host wait for it.
            state.sums += len(batch) * self._learner.backward(batch, len(batch) / rows_of_the_step)
            state.cursor += len(batch)
            self._progress.advance(len(batch))
            if state.cursor - begun == rows_of_the_step:
                self._learner.step(rate_factor(self._settings, state.step, self._steps_an_epoch))
                self._after_step(epoch_over=state.cursor == rows_an_epoch)
            if state.stopped:
                return

    def _after_step(self, *, epoch_over: bool) -> None:
        """Count the step; evaluate, log and keep what is due after it."""
        state, settings = self._state, self._settings
        state.step += 1
        last = epoch_over and state.epoch + 1 == settings.epochs
        evaluates = self._evaluate is not None and (last or self._due(settings.evaluate_every, epoch_over))
        logs = epoch_over or evaluates or (settings.log_every is not None and state.step % settings.log_every == 0)
        samples = state.epoch * len(self._dataset) + state.cursor
        means = state.means_since_last_row(samples) if logs else (0.0, 0.0)
        if epoch_over:
            _refuse_divergence(state.end_epoch(len(self._dataset)), state.epoch)
        errors = self._evaluated() if evaluates else None
        if logs:
            self._log(samples, *means, errors)
        if self._checkpoints is not None and (self._over or self._due(self._checkpoints.every, epoch_over)):
            self._keep(self._checkpoints)

    def _due(self, every: int | None, epoch_over: bool) -> bool:
        return epoch_over if every is None else self._state.step % every == 0

    def _evaluated(self) -> float:
        assert self._evaluate is not None
        state, settings, student = self._state, self._settings, self._learner.student
        student.eval()
        with torch.no_grad():
            errors = float(self._evaluate(student))
        student.train()
        if math.isnan(errors):
            raise RequestError(f"the evaluation after step {state.step} gave no number: mend it, or the student")
        if state.judge(errors, settings) and (settings.keep_best or settings.patience is not None):
            state.best_weights = copied_weights(student)
        return errors

    def _log(self, samples: int, loss: float, divergence: float, errors: float | None) -> None:
        state = self._state
        epoch = -(-samples // len(self._dataset))
        self._logbook.add(
            Figures(
                step=state.step,
                epoch=epoch,
                samples=samples,
                learning_rate=self._learner.learning_rate,
                loss=loss,
                divergence=divergence,
                errors=errors,
                seconds=round(self._seconds, 3),
            )
        )
        told = f", errors {state.errors[-1]:g}" if state.errors else ""
        self._progress.note(f"epoch {epoch} of {self._settings.epochs}, loss {loss:.4f}{told}")

    def _keep(self, checkpoints: CheckpointFolder) -> None:
        _refuse_divergence(self._state.sums.tolist(), self._state.epoch + 1)
        self._logbook.sync()  # a checkpoint must not know of a row that a power cut could take
        checkpoints.write(
            self._state.step,
            {
                **self._learner.tree(),
                "training": self._identity,
                "state": {**self._state.tree(), "seconds": self._seconds},
                "place": self._loader.state_dict(),
                "draws": draw_states(self._learner.device),
                "written_by": {"softlabels": softlabels.__version__, "torch": torch.__version__},
            },
        )


def _refuse_divergence(losses: Sequence[float], epoch: int) -> None:
    if not all(map(math.isfinite, losses)):
        raise DivergenceError(
            f"the loss is no longer a finite number in epoch {epoch}: the training diverged; try a smaller "
            "learning_rate, and check the student's inputs and outputs",
            epoch=epoch,
        )

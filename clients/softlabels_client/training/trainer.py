"""The student's trainer: one plain loop of fetch, forward, distillation loss, backward and optimizer step.

Legend: B rows, C classes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import softlabels
from softlabels.errors import DivergenceError, RequestError
from softlabels.extras import needs_extra
from softlabels.progress import QUIET, Progress
from softlabels_client.data.dataset import SoftTargetDataset
from softlabels_client.data.sampler import EpochProgress
from softlabels_client.data.stream_dataset import epoch_loader
from softlabels_client.training.checkpoint import CheckpointFolder, weights_digest
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.step import ErrorCount, batch_sums, make_optimizer, make_scheduler
from softlabels_client.training.training_log import LogRow, PairRecord, TrainingLog
from softlabels_client.training.training_state import (
    TrainingState,
    check_same_training,
    load_optimizer,
    load_student,
    rng_states,
    seeded,
    set_rng_states,
    student_tree,
    training_identity,
)

with needs_extra("torch", "training a student"):
    import torch
    from torch import nn

    from softlabels.losses import make_loss

Evaluate = Callable[[nn.Module], float | ErrorCount]
"""Returns a figure that should fall, or counted errors; called in eval mode without gradients."""

_MIXED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Outcome of a training.

    Attributes:
        losses: mean training loss of each epoch.
        divergences: mean KL(target, student) at T of each epoch, nats; 0 when the targets are learned exactly.
        accuracies: percent of each epoch's labelled training samples predicted correctly; None without labels.
        errors: results of all evaluations; empty without `evaluate`.
        final_errors: result for the final weights: the lowest if the best weights were kept, else the last.
        test_samples: labelled test samples, if the evaluation counted errors.
        steps: optimizer steps.
        stopped_early: whether early stopping ended the training.
        resumed_at: step of the checkpoint that this process resumed from; None if it started from the beginning.
        seconds: duration of the training, earlier processes and evaluation included.
        samples_per_second: training rate of this process, evaluation and checkpoints included.
    """

    losses: tuple[float, ...]
    divergences: tuple[float, ...]
    accuracies: tuple[float | None, ...]
    errors: tuple[float, ...]
    final_errors: float | None
    test_samples: int | None
    steps: int
    stopped_early: bool
    resumed_at: int | None
    seconds: float
    samples_per_second: float


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
    """Train `student` in place on the data set's soft targets.

    The same arguments give the same weights on the same machine, also if the training is killed at any moment and
    resumed from its checkpoints. This is one process; to train with several ranks, use a framework's trainer.

    Args:
        student: maps a batch of inputs to logits_BC, one logit per class of the store.
        dataset: inputs paired with targets, which carry the temperature.
        settings: how to train.
        evaluate: called after each epoch, or every `evaluate_every` steps.
        progress: advanced by the samples of each batch.
        checkpoints: where to save the training and resume it from.
        logs: destinations of metrics.
        record: destination of the (sample, target) pairs trained on.
    Raises:
        ShapeMismatchError: the student's outputs are not the store's classes.
        FingerprintMismatchError, UnknownIdError: the inputs are not those that the targets were computed for.
        CheckpointMismatchError: the checkpoints belong to another training.
        RequestError: settings that contradict each other.
        DivergenceError: the loss is no longer finite.
    """
    if evaluate is None and (settings.patience or settings.keep_best or settings.evaluate_every):
        raise RequestError("patience, keep_best and evaluate_every need something to evaluate on: pass `evaluate`")
    trainer = _Trainer(student, dataset, settings, evaluate, progress, checkpoints, logs, record)
    with seeded(settings.seed, trainer.device):
        trainer.resume()
        trainer.train()
    return trainer.result()


@dataclass
class _Trainer:
    """One training; the fields are the arguments of `distill`."""

    student: nn.Module
    dataset: SoftTargetDataset
    settings: DistillSettings
    evaluate: Evaluate | None
    progress: Progress
    checkpoints: CheckpointFolder | None
    logs: Sequence[TrainingLog]
    record: PairRecord | None

    def __post_init__(self) -> None:
        settings = self.settings
        self.device = _device(settings.device)
        self.student.to(self.device)
        self.identity = training_identity(self.student, self.dataset, settings)
        weights = {} if settings.hard_weight is None else {"hard_weight": settings.hard_weight}
        self.loss = make_loss(settings.loss, **{**weights, **settings.loss_args})
        self.optimizer = make_optimizer(self.student, settings)
        self.optimizer.zero_grad()  # the caller may have left gradients on the student
        self.mixed = _MIXED.get(settings.precision)
        # Scales the loss so that float16 gradients do not underflow, and skips a step whose gradients overflow.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mixed is torch.float16)
        self.loader = epoch_loader(
            self.dataset, batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers
        )
        self.state = TrainingState.initial(self.device)
        self.rows_per_step = settings.batch_size * settings.accumulate
        self.resumed_at: int | None = None
        self.started_s = time.monotonic()

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        if self.checkpoints is not None:
            saved = self.checkpoints.newest()
            if saved is None:
                self.checkpoints.run = weights_digest(self.student)
            else:
                check_same_training(saved["training"], self.identity, where=str(self.checkpoints.path))
                load_student(self.student, saved)
                load_optimizer(self.optimizer, saved["optimizer"])
                self.scaler.load_state_dict(saved["scaler"])
                set_rng_states(saved["draws"], self.device)
                self.state = TrainingState.from_tree(saved["state"], self.device)
                # The identity above covers the loader's order; only the position in it is new.
                self.loader.begin_at(EpochProgress(epoch=self.state.epoch, cursor=self.state.cursor))
                self.resumed_at = self.state.step
        steps_per_epoch = -(-len(self.dataset) // self.rows_per_step)
        # After the optimizer's state was loaded, which would overwrite the rates that the scheduler sets.
        self.scheduler = make_scheduler(
            self.optimizer, self.settings, steps_per_epoch=steps_per_epoch, done_steps=self.state.step
        )
        self.first_sample = self.logged_sample = self.samples
        self.logged_s = self.started_s

    def train(self) -> None:
        """Train until the last epoch ends or early stopping does."""
        state, settings, student = self.state, self.settings, self.student
        with contextlib.ExitStack() as stack:
            for log in self.all_logs:
                stack.callback(log.close)
                log.begin(state.step)
            while not self.finished:
                student.train()
                self.loader.set_epoch(state.epoch)
                with contextlib.closing(iter(self.loader)) as batches:
                    for batch in batches:
                        if self.record is not None:
                            self.record.add(state.step + 1, state.epoch + 1, batch)
                        # A step has the same number of rows each time, but for the last one of an epoch.
                        step_start = state.cursor - state.cursor % self.rows_per_step
                        step_end = min(step_start + self.rows_per_step, len(self.dataset))
                        on_device = batch.to(self.device, non_blocking=True)
                        with torch.autocast(self.device.type, self.mixed, enabled=self.mixed is not None):
                            logits_BC = student(on_device.inputs)
                        loss = self.loss.parts(logits_BC, on_device.targets)
                        # Losses are means over a batch: weighted by their share, the accumulated gradients are
                        # those of one batch of the whole step.
                        share = len(batch) / (step_end - step_start)
                        self.scaler.scale(loss.total * share).backward()  # type: ignore[no-untyped-call]
                        state.sums += batch_sums(loss, logits_BC, on_device.targets)
                        state.cursor += len(batch)
                        self.progress.advance(len(batch))
                        if state.cursor < step_end:
                            continue  # accumulate the gradients of further batches
                        if settings.max_gradient_norm is not None:
                            # The limit is on the norm of the true gradients, not of the scaled ones.
                            self.scaler.unscale_(self.optimizer)
                            nn.utils.clip_grad_norm_(student.parameters(), settings.max_gradient_norm)
                        self.scaler.step(self.optimizer)
                        self.scaler.update()
                        self.optimizer.zero_grad()
                        self.after_step(epoch_over=state.cursor == len(self.dataset))
                        if state.stopped:
                            break

    def after_step(self, *, epoch_over: bool) -> None:
        """Count the step, then evaluate, log and write a checkpoint where they are due."""
        state, settings = self.state, self.settings
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        state.step += 1
        is_last = epoch_over and state.epoch + 1 == settings.epochs
        evaluates = self.evaluate is not None and (is_last or self.is_due(settings.evaluate_every, epoch_over))
        logs = epoch_over or evaluates or (settings.log_every is not None and state.step % settings.log_every == 0)
        samples = self.samples
        # Read from the device only when needed, and before the end of an epoch resets them.
        means = state.means_since_last_row(samples) if logs else (0.0, 0.0, None)
        if epoch_over:
            self.check_finite()
            state.end_epoch(len(self.dataset))
        errors = self.evaluated() if evaluates else None
        if logs:
            self.log(samples, learning_rate, means, errors)
        if self.checkpoints is not None and (self.finished or self.is_due(self.checkpoints.every, epoch_over)):
            self.save(self.checkpoints)

    def evaluated(self) -> float:
        """Evaluate the student, keep its weights if they are the best so far, and return the figure."""
        assert self.evaluate is not None
        state, settings = self.state, self.settings
        self.student.eval()
        with torch.no_grad():
            result = self.evaluate(self.student)
        self.student.train()
        state.test_samples = result.samples if isinstance(result, ErrorCount) else None
        errors = float(result.errors if isinstance(result, ErrorCount) else result)
        if math.isnan(errors):
            raise RequestError(f"the evaluation after step {state.step} returned NaN: correct it, or the student")
        if state.add_evaluation(errors, settings) and (settings.keep_best or settings.patience is not None):
            # A copy on the host, which further steps do not change.
            state.best_weights = {
                name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
                for name, value in self.student.state_dict().items()
            }
        return errors

    def log(
        self, samples: int, learning_rate: float, means: tuple[float, float, float | None], errors: float | None
    ) -> None:
        """Add a row to the logs, and the newest figures to the progress display."""
        state, now_s = self.state, time.monotonic()
        loss, divergence, accuracy = means
        tested = None if errors is None or not state.test_samples else ErrorCount(int(errors), state.test_samples)
        row = LogRow(
            step=state.step,
            epoch=-(-samples // len(self.dataset)),
            samples=samples,
            learning_rate=learning_rate,
            loss=loss,
            divergence=divergence,
            errors=errors,
            seconds=round(self.seconds, 3),
            accuracy=accuracy,
            test_accuracy=None if tested is None else tested.accuracy,
            samples_per_second=round((samples - self.logged_sample) / max(now_s - self.logged_s, 1e-9), 1),
        )
        self.logged_sample, self.logged_s = samples, now_s
        for log in self.logs:
            log.add(row)
        told = "" if accuracy is None else f", accuracy {accuracy:.1f}%"
        told += f", errors {state.errors[-1]:g}" if state.errors else ""
        self.progress.note(f"epoch {row.epoch} of {self.settings.epochs}, KL {divergence:.4f} nats{told}")

    def save(self, checkpoints: CheckpointFolder) -> None:
        self.check_finite()
        for log in self.all_logs:
            log.sync()  # a checkpoint must not be newer than rows that a power cut could take
        checkpoints.write(
            self.state.step,
            {
                **student_tree(self.student),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "training": self.identity,
                "state": {**vars(self.state), "seconds": self.seconds},
                "draws": rng_states(self.device),
                "written_by": {"softlabels": softlabels.__version__, "torch": torch.__version__},
            },
        )

    def result(self) -> DistillResult:
        """Return the outcome; the student gets its best weights if they were kept."""
        state = self.state
        final = state.errors[-1] if state.errors else None
        if state.best_weights is not None:
            self.student.load_state_dict(state.best_weights)
            final = state.best_errors
        return DistillResult(
            losses=tuple(state.losses),
            divergences=tuple(state.divergences),
            accuracies=tuple(state.accuracies),
            errors=tuple(state.errors),
            final_errors=final,
            test_samples=state.test_samples,
            steps=state.step,
            stopped_early=state.stopped,
            resumed_at=self.resumed_at,
            seconds=self.seconds,
            samples_per_second=(self.samples - self.first_sample) / max(time.monotonic() - self.started_s, 1e-9),
        )

    def check_finite(self) -> None:
        if not torch.isfinite(self.state.sums).all():
            raise DivergenceError(
                f"the loss is not finite in epoch {self.state.epoch + 1}: the training diverged; try a smaller "
                "learning_rate, and check the student's inputs and outputs"
            )

    def is_due(self, every: int | None, epoch_over: bool) -> bool:
        return epoch_over if every is None else self.state.step % every == 0

    @property
    def all_logs(self) -> list[TrainingLog | PairRecord]:
        return [*self.logs, *([] if self.record is None else [self.record])]

    @property
    def finished(self) -> bool:
        return self.state.stopped or self.state.epoch == self.settings.epochs

    @property
    def samples(self) -> int:
        return self.state.epoch * len(self.dataset) + self.state.cursor

    @property
    def seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.started_s


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device is {name!r}; choose 'auto', 'cpu', 'cuda' or another that torch knows") from error

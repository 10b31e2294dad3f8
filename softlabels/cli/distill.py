"""`softlabels distill`: train a student on the targets of a store, in a folder or behind a server."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

from cyclopts import Parameter

from softlabels.cli.options import flags_of, json_object, settings_from
from softlabels.errors import ReferenceLoadError, RequestError, SoftLabelsError
from softlabels.extras import needs_extra
from softlabels.transfer_set import TransferSet
from softlabels_client.training.settings import DistillSettings

if TYPE_CHECKING:
    from torch import nn

    from softlabels_client.data.dataset import SoftTargetDataset
    from softlabels_client.training.trainer import DistillResult, Evaluate

    TrainingFlags = DistillSettings
else:
    TrainingFlags = flags_of(DistillSettings)

Reference: TypeAlias = Annotated[str, Parameter(metavar="REF")]
JsonText: TypeAlias = Annotated[str, Parameter(metavar="JSON")]


@Parameter(name="*", group="Student, data and targets")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Student, data, targets and outputs. A reference is package.module:name, or file.py:name.

    Attributes:
        student: reference to what makes the student, a torch module
        student_args: keyword arguments of the student, a JSON object
        inputs: reference to what makes the transfer set with the inputs, or a kind that a job file knows, such as
            image_folder; the inputs that the store keeps if not given
        inputs_args: keyword arguments of the inputs, a JSON object
        test: reference to what makes a labelled transfer set to count errors on
        test_args: keyword arguments of the test set, a JSON object
        out: file for the student's weights, as safetensors
        temperature: temperature of the soft targets; the store's default if not given
        check: when inputs are compared with the fingerprints of what the teacher saw
        token: bearer token, for a server that asks for one
        timeout: limit of one request in seconds, retries included
        cache: keep what the server sends on this machine, so that every row is sent once; without DIR in
            $SOFTLABELS_CACHE or ~/.cache/softlabels
        checkpoint: folder for checkpoints
        checkpoint_every: optimizer steps between checkpoints; one an epoch if not given
        checkpoint_keep: number of checkpoints to keep, the newest
        resume: continue from the newest checkpoint, to the same weights; start anew where there is none
        log: CSV file for loss, KL, accuracy, errors and rates
        tensorboard: folder for the same figures, for TensorBoard
        record: CSV file of the target that each sample was trained with
    """

    student: Reference
    student_args: JsonText = "{}"
    inputs: Reference | None = None
    inputs_args: JsonText = "{}"
    test: Reference | None = None
    test_args: JsonText = "{}"
    out: Path
    temperature: float | None = None
    check: Literal["first", "always", "never"] = "first"
    token: str | None = None
    timeout: float = 30.0
    cache: Annotated[str | None, Parameter(metavar="[DIR]")] = None
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    checkpoint_keep: int = 3
    resume: bool = False
    log: Path | None = None
    tensorboard: Path | None = None
    record: Path | None = None


def distill_student(
    store: str,
    /,
    *,
    run: RunOptions,
    training: Annotated[TrainingFlags, Parameter(name="*", group="Training")] = TrainingFlags(),  # noqa: B008
) -> None:
    r"""Train a student on the soft targets of a store, without ever loading a teacher.

    Inputs are paired with targets by sample id and checked against the fingerprints of what the teacher saw.

    For example, where `--resume` continues after any interruption:

        softlabels distill http://127.0.0.1:8000/mnist \
          --student nets.py:student --student-args '{"hidden": 800}' \
          --inputs data.py:training_set --test data.py:test_set \
          --epochs 20 --temperature 4 --loss dkd --loss-args '{"beta": 8}' \
          --checkpoint runs/mnist --resume --out student.safetensors

    Args:
        store: address http(s)://host:port/NAME, or a folder
    """
    settings: DistillSettings = settings_from(training, DistillSettings)
    _check_options(run, settings)
    with needs_extra("torch", "training a student"):
        import torch

    from softlabels.target_store import open_store
    from softlabels_client.data.dataset import SoftTargetDataset, ViewDataset
    from softlabels_client.training.checkpoint import save_student
    from softlabels_client.training.step import measure_errors

    cache = True if run.cache == "" else run.cache
    # Every row each time it is read: training takes long enough for a disk to fail, and reading is a small part of it.
    with open_store(store, token=run.token, timeout_s=run.timeout, cache=cache, verify="every-read") as targets:
        inputs = _transfer_set("--inputs", run.inputs, run.inputs_args) if run.inputs else None
        test = _transfer_set("--test", run.test, run.test_args) if run.test else None
        # Before the student is made, so that its initial weights follow from the seed too.
        torch.manual_seed(settings.seed)
        student = _made("--student", run.student, run.student_args)
        if not isinstance(student, torch.nn.Module):
            raise ReferenceLoadError(f"--student {run.student!r} made a {type(student).__name__}, no torch module")
        kind = ViewDataset if targets.manifest.layout.kind == "views" else SoftTargetDataset
        dataset = kind(inputs, targets, temperature=run.temperature, check=run.check)
        name = dataset.samples.name
        print(f"{targets!r}\n{len(dataset)} samples of {name!r}, temperature {dataset.temperature:g}", flush=True)
        evaluate = None if test is None else partial(measure_errors, samples=test)
        result = _train(student, dataset, settings, evaluate, run)
        facts = {"softlabels.store": targets.digest, "softlabels.temperature": repr(dataset.temperature)}
    save_student(student, run.out, metadata=facts)
    _report(result, test)
    print(f"the student's weights are in {run.out}")


def _check_options(run: RunOptions, settings: DistillSettings) -> None:
    if run.test is None and (settings.patience or settings.keep_best or settings.evaluate_every):
        raise RequestError("--patience, --keep-best and --evaluate-every need a set to count errors on: add --test")
    if run.checkpoint is None and (run.resume or run.checkpoint_every):
        raise RequestError("--resume and --checkpoint-every need a folder of checkpoints: add --checkpoint DIR")
    for path in (run.out, run.log, run.record):
        if path is not None and not path.parent.is_dir():
            raise RequestError(f"there is no folder {str(path.parent)!r} for {path.name!r}: make it first")


def _train(
    student: nn.Module,
    dataset: SoftTargetDataset,
    settings: DistillSettings,
    evaluate: Evaluate | None,
    run: RunOptions,
) -> DistillResult:
    from softlabels.progress import track
    from softlabels_client.training.checkpoint import CheckpointFolder
    from softlabels_client.training.trainer import distill
    from softlabels_client.training.training_log import CsvLog, PairRecord, TensorBoardLog, TrainingLog

    checkpoints, newest = None, None
    if run.checkpoint is not None:
        every, keep = run.checkpoint_every, run.checkpoint_keep
        checkpoints = CheckpointFolder(run.checkpoint, every=every, keep=keep, resume=run.resume)
        newest = checkpoints.newest()
    done = 0 if newest is None else newest["state"]["epoch"] * len(dataset) + newest["state"]["cursor"]
    logs: list[TrainingLog] = [] if run.log is None else [CsvLog(run.log)]
    logs += [] if run.tensorboard is None else [TensorBoardLog(run.tensorboard)]
    with track(settings.epochs * len(dataset), "distill", "samples", done=done) as progress:
        return distill(
            student,
            dataset,
            settings,
            evaluate=evaluate,
            progress=progress,
            checkpoints=checkpoints,
            logs=logs,
            record=None if run.record is None else PairRecord(run.record),
        )


def _report(result: DistillResult, test: TransferSet | None) -> None:
    if result.resumed_at is not None:
        print(f"resumed at step {result.resumed_at} of {result.steps}")
    if result.losses:
        accuracy = result.accuracies[-1]
        on_training = "" if accuracy is None else f", accuracy on the training samples {accuracy:.2f}%"
        rate = f"{result.samples_per_second:,.0f} samples/s, {result.seconds:.1f} s"
        print(f"KL to the targets {result.divergences[-1]:.4f} nats{on_training}, {rate}")
    if result.stopped_early:
        print(f"ended at step {result.steps}: the errors had ceased to fall")
    if test is not None and result.final_errors is not None:
        accuracy = 100 * (1 - result.final_errors / (result.test_samples or len(test)))
        print(f"{result.final_errors:.0f} errors on the {len(test)} samples of {test.name!r}, accuracy {accuracy:.2f}%")


def _transfer_set(option: str, reference: str, arguments: str) -> TransferSet:
    from softlabels.transfer_sets import KINDS, load_transfer_set

    if reference in KINDS:
        return load_transfer_set(reference, json_object(f"{option}-args", arguments), base=Path.cwd())
    made = _made(option, reference, arguments)
    if not (hasattr(made, "take") and hasattr(made, "name") and hasattr(made, "__len__")):
        raise ReferenceLoadError(
            f"{option} {reference!r} made a {type(made).__name__}, which is no transfer set: return a "
            "softlabels.transfer_set.ArrayTransferSet, or an object with `name`, `__len__` and `take`"
        )
    return cast("TransferSet", made)


def _made(option: str, reference: str, arguments: str) -> Any:
    from softlabels.references import load_reference

    keywords = json_object(f"{option}-args", arguments)
    maker = load_reference(reference)
    if not callable(maker):
        raise ReferenceLoadError(f"{option} {reference!r} is a {type(maker).__name__}, which cannot be called")
    try:
        return maker(**keywords)
    except SoftLabelsError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise ReferenceLoadError(
            f"{option}: {reference!r} called with {arguments} failed with {type(error).__name__}: {error}"
        ) from error

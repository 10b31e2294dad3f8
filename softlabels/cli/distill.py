"""`softlabels distill`: how is a student trained from the command line, from a served store or one on disk?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softlabels.errors import MissingExtraError, ReferenceLoadError, RequestError, SoftLabelsError
from softlabels.transfer_set import TransferSet
from softlabels_client.training.settings import OPTIMIZERS, PRECISIONS, SCHEDULES, DistillSettings

if TYPE_CHECKING:
    from torch import nn

    from softlabels_client.data.dataset import SoftTargetDataset
    from softlabels_client.training.trainer import DistillResult, Evaluate

_DESCRIPTION = """\
Train a student on the soft targets of a store, near or far, without ever loading a teacher. Inputs are paired with
targets by sample id and checked against the fingerprints of what the teacher saw.
"""

_EXAMPLE = """\
example:
  softlabels distill http://127.0.0.1:8000/mnist \\
      --student nets.py:student --student-args '{"hidden": 800}' --inputs data.py:training_set \\
      --test data.py:test_set --epochs 20 --temperature 4 --out student.safetensors

a long one, which the same command takes up again after whatever ended it:
  softlabels distill stores/photographs --student nets.py:small --epochs 240 --schedule step \\
      --step-epochs 150,180,210 --learning-rate 0.05 --weight-decay 5e-4 --loss dkd --loss-args '{"beta": 8}' \\
      --checkpoint runs/small --checkpoint-every 1000 --resume --log runs/small.csv --out small.safetensors
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `distill` to the command line."""
    parser = commands.add_parser(
        "distill",
        help="train a student on a store's soft targets",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="the store: http(s)://host:port/NAME, or a folder")
    _add_what_to_train(parser)
    _add_how_to_train(parser)
    _add_how_to_move(parser)
    _add_what_to_keep(parser)
    parser.set_defaults(run=run)


def _add_what_to_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to train, on what").add_argument
    reference = "package.module:name, or file.py:name, called with the arguments"
    add("--student", metavar="REF", required=True, help=f"what makes the student, a torch module: {reference}")
    add("--student-args", metavar="JSON", default="{}", help="its keyword arguments, a JSON object")
    add(
        "--inputs",
        metavar="REF",
        help="what makes the transfer set with the inputs: as --student, or a kind that a job file knows, such as "
        "image_folder (when left out: the inputs that the store keeps)",
    )
    add("--inputs-args", metavar="JSON", default="{}", help="its keyword arguments, a JSON object")
    add("--test", metavar="REF", help=f"what makes a labelled transfer set to count errors on: {reference}")
    add("--test-args", metavar="JSON", default="{}", help="its keyword arguments, a JSON object")
    add("--out", metavar="FILE", type=Path, required=True, help="where the student's weights go, as safetensors")
    add("--token", help="bearer token, for a server that asks for one")
    add(
        "--timeout", metavar="SECONDS", type=float, default=30.0, help="for one request, retries included (%(default)s)"
    )
    add(
        "--cache",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=True,
        default=False,
        help="keep what the server sends on this machine, so that every row is sent once: there, or without DIR in "
        "$SOFTLABELS_CACHE or ~/.cache/softlabels",
    )


def _add_how_to_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how to train").add_argument
    add("--epochs", metavar="N", type=int, default=20, help="passes over the inputs (%(default)s)")
    add("--batch-size", metavar="N", type=int, default=128, help="samples a forward pass and a request (%(default)s)")
    add("--accumulate", metavar="N", type=int, default=1, help="batches a step of the optimiser (%(default)s)")
    add("--loss", metavar="NAME", default="kd", help="kd, dkd or dist (%(default)s)")
    add("--loss-args", metavar="JSON", default="{}", help="that loss's own options, a JSON object")
    add("--hard-weight", metavar="W", type=float, help="of the labels; T² × soft has 1 (0.5 for kd, 1 for others)")
    add("--temperature", metavar="T", type=float, help="of the soft targets (the store's own when left out)")
    add("--precision", default="float32", choices=PRECISIONS, help="of the forward pass (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of first weights, order and dropout (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, …; auto takes an accelerator where there is one (%(default)s)")
    add("--workers", metavar="N", type=int, default=0, help="processes that fetch; 0: a thread does (%(default)s)")
    add(
        "--check",
        default="first",
        choices=("first", "always", "never"),
        help="compare inputs with the fingerprints of what the teacher saw: the first time each is seen, always, or "
        "never (%(default)s)",
    )
    add("--evaluate-every", metavar="N", type=int, help="steps between counts of errors on --test (once an epoch)")
    add("--patience", metavar="N", type=int, help="end after N counts that are no better; the best weights are kept")
    add("--min-delta", metavar="D", type=float, default=0.0, help="what is no better: a fall by less (%(default)s)")
    add("--keep-best", action="store_true", help="keep the weights of the best count, not the last ones")


def _add_how_to_move(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimiser and learning rate").add_argument
    names = ", ".join(OPTIMIZERS)
    add("--optimizer", metavar="NAME", default="sgd", help=f"{names}, or module:name of another (%(default)s)")
    add("--optimizer-args", metavar="JSON", default="{}", help="its further arguments, a JSON object")
    add("--momentum", metavar="M", type=float, default=0.9, help="of sgd (%(default)s)")
    add("--weight-decay", metavar="D", type=float, default=0.0, help="of any (%(default)s)")
    add("--max-gradient-norm", metavar="NORM", type=float, help="scale larger gradients down to it (no bound)")
    add("--learning-rate", metavar="RATE", type=float, default=0.1, help="the schedule's peak (%(default)s)")
    add("--schedule", default="one_cycle", choices=SCHEDULES, help="of the learning rate (%(default)s)")
    add("--warm-up", metavar="SHARE", type=float, help="of all steps, with a linear rise (the schedule's own)")
    add("--step-epochs", metavar="N,…", type=_numbers, default=(), help="after which --schedule step lowers the rate")
    add("--step-factor", metavar="F", type=float, default=0.1, help="by how much each time (%(default)s)")


def _add_what_to_keep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to keep of the training").add_argument
    add("--checkpoint", metavar="DIR", type=Path, help="keep checkpoints there")
    add("--checkpoint-every", metavar="N", type=int, help="steps between them (one an epoch)")
    add("--checkpoint-keep", metavar="N", type=int, default=3, help="how many, the newest (%(default)s)")
    add(
        "--resume", action="store_true", help="go on from the newest checkpoint, to the same weights; begin without one"
    )
    add("--log", metavar="FILE", type=Path, help="loss, divergence, errors and rates as CSV")
    add("--tensorboard", metavar="DIR", type=Path, help="the same for TensorBoard")
    add("--log-every", metavar="N", type=int, help="steps between rows of either (one an epoch and count of errors)")
    add("--record", metavar="FILE", type=Path, help="which target each sample was learnt with, as CSV")


def run(options: argparse.Namespace) -> int:
    """Train the student, keep its weights, say what came of it."""
    settings = _settings(options)
    _refuse_what_does_not_fit(options)
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
        ) from error

    from softlabels.target_store import open_store
    from softlabels_client.data.dataset import SoftTargetDataset
    from softlabels_client.data.view_dataset import ViewDataset
    from softlabels_client.training.checkpoint import save_student
    from softlabels_client.training.step import measure_errors

    with open_store(options.store, token=options.token, timeout_s=options.timeout, cache=options.cache) as store:
        inputs = _transfer_set("--inputs", options.inputs, options.inputs_args) if options.inputs else None
        test = _transfer_set("--test", options.test, options.test_args) if options.test else None
        torch.manual_seed(settings.seed)
        student = _made("--student", options.student, options.student_args)
        if not isinstance(student, torch.nn.Module):
            raise ReferenceLoadError(f"--student {options.student!r} made a {type(student).__name__}, no torch module")
        kind = ViewDataset if store.manifest.layout.kind == "views" else SoftTargetDataset
        dataset = kind(inputs, store, temperature=options.temperature, check=options.check)
        name = dataset.samples.name
        print(f"{store!r}\n{len(dataset)} samples of {name!r}, temperature {dataset.temperature:g}", flush=True)
        evaluate = None if test is None else partial(measure_errors, samples=test)
        result = _trained(student, dataset, settings, evaluate, options)
        facts = {"softlabels.store": store.digest, "softlabels.temperature": repr(dataset.temperature)}
    save_student(student, options.out, metadata=facts)
    _tell(result, test)
    print(f"the student's weights are in {options.out}")
    return 0


def _refuse_what_does_not_fit(options: argparse.Namespace) -> None:
    if options.test is None and (options.patience or options.keep_best or options.evaluate_every):
        raise RequestError("--patience, --keep-best and --evaluate-every need a set to count errors on: add --test")
    if options.checkpoint is None and (options.resume or options.checkpoint_every):
        raise RequestError("--resume and --checkpoint-every need a folder of checkpoints: add --checkpoint DIR")
    for path in (options.out, options.log, options.record):
        if path is not None and not path.parent.is_dir():
            raise RequestError(f"there is no folder {str(path.parent)!r} to keep {path.name!r} in: make it first")


def _trained(
    student: nn.Module,
    dataset: SoftTargetDataset,
    settings: DistillSettings,
    evaluate: Evaluate | None,
    options: argparse.Namespace,
) -> DistillResult:
    from softlabels.progress import track
    from softlabels_client.training.checkpoint import CheckpointFolder
    from softlabels_client.training.trainer import distill
    from softlabels_client.training.training_log import CsvLog, PairRecord, TensorBoardLog, TrainingLog

    checkpoints = None
    if options.checkpoint is not None:
        checkpoints = CheckpointFolder(
            options.checkpoint, every=options.checkpoint_every, keep=options.checkpoint_keep, resume=options.resume
        )
    kept = None if checkpoints is None else checkpoints.newest()
    done = 0 if kept is None else kept["state"]["epoch"] * len(dataset) + kept["state"]["cursor"]
    logs: list[TrainingLog] = [] if options.log is None else [CsvLog(options.log)]
    logs += [] if options.tensorboard is None else [TensorBoardLog(options.tensorboard)]
    with track(settings.epochs * len(dataset), "distill", "samples", done=done) as progress:
        return distill(
            student,
            dataset,
            settings,
            evaluate=evaluate,
            progress=progress,
            checkpoints=checkpoints,
            logs=logs,
            record=None if options.record is None else PairRecord(options.record),
        )


def _tell(result: DistillResult, test: TransferSet | None) -> None:
    if result.resumed_at is not None:
        print(f"resumed at step {result.resumed_at} of {result.steps}")
    if result.losses:
        accuracy = result.accuracies[-1]
        told = "" if accuracy is None else f", accuracy on the training samples {accuracy:.2f}%"
        rate = f"{result.samples_per_second:,.0f} samples/s, {result.seconds:.1f} s"
        print(f"KL to the targets {result.divergences[-1]:.4f} nats{told}, {rate}")
    if result.stopped_early:
        print(f"ended at step {result.steps}: the errors had ceased to fall")
    if test is not None and result.final_errors is not None:
        accuracy = 100 * (1 - result.final_errors / (result.test_samples or len(test)))
        print(f"{result.final_errors:.0f} errors on the {len(test)} samples of {test.name!r}, accuracy {accuracy:.2f}%")


def _settings(options: argparse.Namespace) -> DistillSettings:
    """The arguments that say how to train."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(DistillSettings)}
    for name in ("loss_args", "optimizer_args"):
        given[name] = _json_object("--" + name.replace("_", "-"), given[name])
    return DistillSettings(**given)


def _transfer_set(option: str, reference: str, arguments: str) -> TransferSet:
    from softlabels.transfer_sets import KINDS, load_transfer_set

    if reference in KINDS:
        return load_transfer_set(reference, _json_object(f"{option}-args", arguments), base=Path.cwd())
    made = _made(option, reference, arguments)
    if not (hasattr(made, "take") and hasattr(made, "name") and hasattr(made, "__len__")):
        raise ReferenceLoadError(
            f"{option} {reference!r} made a {type(made).__name__}, which is no transfer set: give back a "
            "softlabels.transfer_set.ArrayTransferSet, or an object with `name`, `__len__` and `take`"
        )
    found: TransferSet = made
    return found


def _made(option: str, reference: str, arguments: str) -> Any:
    """What a reference gives when it is called with the arguments of the command line."""
    from softlabels.references import load_reference

    keywords = _json_object(f"{option}-args", arguments)
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


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{option} is no JSON ({error}): write it like '{{\"hidden\": 800}}'") from error
    if not isinstance(found, dict):
        raise RequestError(f"{option} is {text}, no JSON object: write it like '{{\"hidden\": 800}}'")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))

"""`softlabels distill`: how is a student trained from the command line, from a served store or one on disk?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from softlabels.errors import MissingExtraError, ReferenceLoadError, RequestError, SoftLabelsError
from softlabels.transfer import TransferSet
from softlabels_client.settings import OPTIMIZERS, PRECISIONS, SCHEDULES, DistillSettings

_DESCRIPTION = """\
Train a student on the soft targets of a store, near or far, without ever loading a teacher. Inputs are paired with
targets by sample id and checked against the fingerprints of what the teacher saw.
"""

_EXAMPLE = """\
example:
  softlabels distill http://127.0.0.1:8000/mnist \\
      --student nets.py:student --student-args '{"hidden": 800}' --inputs data.py:training_set \\
      --test data.py:test_set --epochs 20 --temperature 4 --out student.safetensors
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


def _add_how_to_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how to train").add_argument
    add("--epochs", metavar="N", type=int, default=20, help="passes over the inputs (%(default)s)")
    add("--batch-size", metavar="N", type=int, default=128, help="samples a step and a request (%(default)s)")
    add("--learning-rate", metavar="RATE", type=float, default=0.1, help="the schedule's peak (%(default)s)")
    add("--hard-weight", metavar="W", type=float, default=0.5, help="of the labels; T² × soft has 1 (%(default)s)")
    add("--temperature", metavar="T", type=float, help="of the soft targets (the store's own when left out)")
    add("--optimizer", default="sgd", choices=OPTIMIZERS, help="SGD with Nesterov momentum, or AdamW (%(default)s)")
    add("--momentum", metavar="M", type=float, default=0.9, help="of SGD (%(default)s)")
    add("--weight-decay", metavar="D", type=float, default=0.0, help="of either optimizer (%(default)s)")
    add("--max-gradient-norm", metavar="NORM", type=float, help="scale larger gradients down to it (no bound)")
    add("--schedule", default="one_cycle", choices=SCHEDULES, help="of the learning rate (%(default)s)")
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


def run(options: argparse.Namespace) -> int:
    """Train the student, keep its weights, say what came of it."""
    settings = _settings(options)
    if not options.out.parent.is_dir():
        raise RequestError(f"there is no folder {str(options.out.parent)!r} to keep the student in: make it first")
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
        ) from error

    from softlabels.opening import open_store
    from softlabels.progress import track
    from softlabels_client.datasets import SoftTargetDataset
    from softlabels_client.evaluation import count_errors
    from softlabels_client.trainer import distill
    from softlabels_client.weights import save_student

    with open_store(options.store, token=options.token, timeout_s=options.timeout) as store:
        inputs = _transfer_set("--inputs", options.inputs, options.inputs_args) if options.inputs else None
        test = _transfer_set("--test", options.test, options.test_args) if options.test else None
        torch.manual_seed(settings.seed)
        student = _made("--student", options.student, options.student_args)
        if not isinstance(student, torch.nn.Module):
            raise ReferenceLoadError(f"--student {options.student!r} made a {type(student).__name__}, no torch module")
        dataset = SoftTargetDataset(inputs, store, temperature=options.temperature, check=options.check)
        print(f"{store!r}\n{len(dataset)} samples of {dataset.samples.name!r}, temperature {dataset.temperature:g}", flush=True)
        evaluate = None if test is None else partial(count_errors, samples=test)
        with track(settings.epochs * len(dataset), "distill", "samples") as progress:
            result = distill(student, dataset, settings, evaluate=evaluate, progress=progress)
        facts = {"softlabels.store": store.digest, "softlabels.temperature": repr(dataset.temperature)}
    save_student(student, options.out, metadata=facts)
    print(f"loss {result.losses[-1]:.4f}, KL to the targets {result.divergences[-1]:.4f} nats, {result.seconds:.1f} s")
    if test is not None:
        print(f"{result.errors[-1]:.0f} errors on the {len(test)} samples of {test.name!r}")
    print(f"the student's weights are in {options.out}")
    return 0


def _settings(options: argparse.Namespace) -> DistillSettings:
    """The arguments that say how to train."""
    names = (field.name for field in dataclasses.fields(DistillSettings))
    return DistillSettings(**{name: getattr(options, name) for name in names})


def _transfer_set(option: str, reference: str, arguments: str) -> TransferSet:
    made = _made(option, reference, arguments)
    if not (hasattr(made, "take") and hasattr(made, "name") and hasattr(made, "__len__")):
        raise ReferenceLoadError(
            f"{option} {reference!r} made a {type(made).__name__}, which is no transfer set: give back a "
            "softlabels.transfer.ArrayTransferSet, or an object with `name`, `__len__` and `take`"
        )
    found: TransferSet = made
    return found


def _made(option: str, reference: str, arguments: str) -> Any:
    """What a reference gives when it is called with the arguments of the command line."""
    from softlabels.references import load_reference

    try:
        keywords = json.loads(arguments)
    except ValueError as error:
        raise RequestError(f"{option}-args is no JSON ({error}): write it like '{{\"hidden\": 800}}'") from error
    if not isinstance(keywords, dict):
        raise RequestError(f"{option}-args is {arguments}, no JSON object: write it like '{{\"hidden\": 800}}'")
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

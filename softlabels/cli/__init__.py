"""The `softlabels` command: one function a subcommand, imported when that subcommand runs."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from itertools import zip_longest

from cyclopts import App, CycloptsError, Parameter

from softlabels import __version__
from softlabels.errors import SoftLabelsError

__all__ = ["app", "main"]

EXIT_ERROR = 1
EXIT_BAD_ARGUMENTS = 2
EXIT_INTERRUPTED = 130
"""What shells report for a process ended by Ctrl-C: 128 + SIGINT."""

COMMANDS = {
    "plan": ("jobs:plan", "bytes, hours and the error of every encoding, before a job runs"),
    "precompute": ("jobs:run_job", "run the teachers of a job file once over its transfer set"),
    "resume": ("jobs:resume_store", "continue an interrupted precompute"),
    "status": ("stores:status", "progress of a store: shards, rate, time left, workers, error so far"),
    "inspect": ("stores:inspect", "show the manifest of a store"),
    "verify": ("stores:verify_store", "check a store: every checksum, every row, every file"),
    "repair": ("stores:repair_store", "take faulty shards out of a store, so that resume computes only those"),
    "merge": ("stores:merge_stores", "unite shards that were computed in several places"),
    "convert": ("stores:convert", "copy a store into another container (Zarr, HDF5), bit-exact"),
    "convert-weights": ("jobs:convert_weights", "write the weights of a pickled checkpoint as safetensors"),
    "serve": ("serve:serve", "serve the stores of a folder over HTTP"),
    "distill": ("distill:distill_student", "train a student on a store's soft targets"),
    "cache": ("stores:cache", "show or clear the rows of served stores that are kept on this machine"),
    "demo": ("jobs:demo", "run the whole main job on MNIST: train, precompute, serve, distill, compare"),
}
"""Where each subcommand is, below `softlabels.cli`, and its line in `softlabels --help`."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the operating system for a disk that is full, failing, or not writable by this user."""

app = App(
    name="softlabels",
    help="Run a teacher ensemble once, store its soft targets, serve them, train students without a teacher.",
    version=f"softlabels {__version__}",
    help_format="markdown",
    # Flags have no --no-… form; of an option that is repeated, the last value counts.
    default_parameter=Parameter(negative=(), allow_repeating=True),
)
app.register_install_completion_command()
for _name, (_where, _help) in COMMANDS.items():
    # By import path, so that `softlabels status` does not wait for what `softlabels distill` needs.
    app.command(f"softlabels.cli.{_where}", name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; expected errors end in one plain message on stderr."""
    tokens = _with_empty_values(sys.argv[1:] if arguments is None else list(arguments))
    command = " ".join(["softlabels", *tokens[:1]])
    # Asked here, because cyclopts imports every subcommand to suggest one.
    if not tokens or not (tokens[0] in COMMANDS or tokens[0].startswith("-")):
        print(f"{command}: expected one of {', '.join(COMMANDS)}\n(try `softlabels --help`)", file=sys.stderr)
        return EXIT_BAD_ARGUMENTS
    try:
        code = _run(tokens)
    except CycloptsError as error:
        print(f"{command}: {error}\n(try `{command} --help`)", file=sys.stderr)
        return EXIT_BAD_ARGUMENTS
    except SoftLabelsError as error:
        print(f"{command}: {error}\n[{error.code}]", file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = "" if error.filename is None else f" ({error.filename})"
        print(
            f"{command}: {error.strerror}{where}: nothing half-written was kept, whatever was committed stays; make "
            "room or allow it, then run the same command again",
            file=sys.stderr,
        )
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def _run(tokens: list[str]) -> object:
    if tokens[0] in COMMANDS:
        # Imported here, because cyclopts hides the class of an error in an import, such as a missing extra.
        importlib.import_module(f"softlabels.cli.{COMMANDS[tokens[0]][0].partition(':')[0]}")
        app[tokens[0]].help = None  # `softlabels COMMAND --help` shows the function's docstring instead
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def _with_empty_values(tokens: list[str]) -> list[str]:
    """Write `--cache` without a folder as `--cache=`: cyclopts has no options with an optional value."""
    return [
        "--cache=" if token == "--cache" and (after is None or after.startswith("-")) else token
        for token, after in zip_longest(tokens, tokens[1:])
    ]

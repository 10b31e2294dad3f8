"""The `softlabels` command: one file a subcommand, and the way from arguments to it."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from softlabels import __version__
from softlabels.cli import (
    cache,
    convert,
    convert_weights,
    demo,
    distill,
    inspect,
    merge,
    plan,
    precompute,
    repair,
    resume,
    serve,
    status,
    verify,
)
from softlabels.errors import SoftLabelsError

__all__ = ["build_parser", "main"]

EXIT_ERROR = 1
_DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What the operating system says of a disk that takes no more, or takes nothing from this user."""

EXIT_INTERRUPTED = 130
"""What shells report for a process ended by Ctrl-C: 128 + SIGINT."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; each one's file adds its own arguments and names its own `run`."""
    parser = argparse.ArgumentParser(
        prog="softlabels",
        description="Run a teacher ensemble once, keep its soft targets, serve them, train students without a teacher.",
    )
    parser.add_argument("--version", action="version", version=f"softlabels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        plan,
        precompute,
        resume,
        status,
        inspect,
        verify,
        repair,
        merge,
        convert,
        convert_weights,
        serve,
        distill,
        cache,
        demo,
    ):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error that the product foresees ends in one plain message and exit code 1."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except SoftLabelsError as error:
        print(f"softlabels {options.command}: {error}\n[{error.code}]", file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        print(f"softlabels {options.command}: {_disk_trouble(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"\nsoftlabels {options.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _disk_trouble(error: OSError) -> str:
    where = "" if error.filename is None else f" ({error.filename})"
    return (
        f"{error.strerror}{where}: nothing half-written was kept, whatever was committed stays; make room or allow it, "
        "then run the same command again"
    )

"""`softlabels demo`: the whole main job on real digits, in a few minutes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from softlabels.errors import MissingExtraError
from softlabels.progress import duration

NEXT = """\
try next
  softlabels inspect {store}
  softlabels serve {stores}          then, in another terminal or on another machine:
  python -c "import softlabels; print(softlabels.open('http://127.0.0.1:8000/{name}').batch([0, 1, 2]).p(4.0))"
  your own teachers: start from {job}, the job file that this demo ran\
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "demo",
        help="run the whole main job on MNIST: train, precompute, serve, distil, compare",
        description="Train a small ensemble of teachers on MNIST, precompute their soft targets, serve them from a "
        "process of their own, train a student alone and one from the service, and compare. Takes a few minutes on two "
        "cores. MNIST comes from SOFTLABELS_DATA, the cache, its public mirrors or npm; where none can be had, "
        "scikit-learn's bundled digits stand in.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (%(default)s)")
    parser.add_argument("--small", action="store_true", help="use the bundled 8 × 8 digits: half a minute")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo and say what came of it."""
    try:
        from softlabels.demo.end_to_end import run_demo
    except ImportError as error:
        if isinstance(error, MissingExtraError):
            raise
        raise MissingExtraError(
            f"the demo needs {error.name or error}, which is not installed: pip install 'softlabels[demo]'",
            extra="demo",
        ) from error

    started_s = time.monotonic()
    report = run_demo(options.out, small=options.small)
    print("\n" + "\n".join(report.lines()))
    print(f"\nall of it took {duration(time.monotonic() - started_s)}")
    print(f"report   {options.out / 'report.json'}")
    print(f"picture  {options.out / 'soft_targets.png'}   (digits with their soft targets at T = 1 and T = 20)\n")
    stores = options.out / "stores"
    print(NEXT.format(store=stores / report.data, stores=stores, name=report.data, job=options.out / "job.toml"))
    return 0

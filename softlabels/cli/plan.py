"""`softlabels plan`: bytes, hours and errors of a job before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.progress import duration

if TYPE_CHECKING:
    from softlabels.precompute.planning.forecast import Forecast, Option

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


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
    kept = f" × {found.members} members" if found.members > 1 else ""
    counted = f" ({found.rows:,} rows)" if found.rows != found.samples else ""
    name, own = found.own
    priced = "" if price is None else f"{'cost':>12}"
    head = [
        f"{found.samples:,} samples{counted} × {found.classes:,} classes{kept}; a pilot of {found.pilot_rows:,} rows",
        f"teachers: {found.rows_per_s:,.0f} rows/s here, {_span(found.teacher_hours)} for all of them"
        + ("" if price is None else f", {found.teacher_hours * price:,.2f} at {price:g} an hour"),
        f"the job's own encoding, {name}: {own.row_bytes:,} bytes a row, {size(found.store_bytes(own))} in all, "
        f"{_span(found.hours(own))}" + ("" if price is None else f", {found.hours(own) * price:,.2f}"),
        *_inputs_line(found),
        "",
        f"{'encoding':<34}{'bytes a row':>12}{'store':>10}"
        + "".join(f"{f'KL, T = {t:g}':>14}" for t in found.temperatures)
        + f"{'top-1':>9}{'rms error':>11}{'time':>14}{priced}",
    ]
    return head + [_line(found, option, price) for option in found.options]


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


def _inputs_line(found: Forecast) -> list[str]:
    if not found.input_bytes:
        return []
    return [f"inputs: {found.input_bytes:,} bytes a sample, {size(found.samples * found.input_bytes)} in all"]


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

"""`softlabels status` and `softlabels inspect`: the progress of a store, and its manifest."""

from __future__ import annotations

import time
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from cyclopts import Parameter

from softlabels.manifest import INPUTS, ArraySpec, Manifest
from softlabels.progress import duration

if TYPE_CHECKING:
    from softlabels.store.ledger import Status


def status(
    store: Path, /, *, watch: Annotated[float | None, Parameter(metavar="SECONDS")] = None, json: bool = False
) -> None:
    """Show the progress of a store while other processes write it, or that it is finished.

    Args:
        store: folder of the store
        watch: repeat at this interval until the store is finished
        json: print it as JSON, for programs
    """
    from softlabels.store.ledger import read_status

    while True:
        found = read_status(store)
        print(_as_json(found) if json else "\n".join(_lines(found)), flush=True)
        if watch is None or found.manifest.finished:
            return
        time.sleep(watch)


def inspect(where: str, /, *, json: bool = False) -> None:
    """Show the manifest of a store in a folder or behind a server.

    It says what was computed, by which teachers, for which data, at which temperature, and how far the stored targets
    are from the exact ones.

    Args:
        where: folder of the store, or its http(s) address
        json: print the whole manifest as JSON
    """
    import softlabels

    with softlabels.open(where) as store:
        manifest, digest = store.manifest, store.digest
    if json:
        print(dumps({"digest": digest, "manifest": manifest.to_json()}, indent=2))
    else:
        print("\n".join(f"{label:<14}{value}" for label, value in _described(manifest, digest)))


def _lines(status: Status) -> list[str]:
    manifest = status.manifest
    count = manifest.shards.count
    state = "finished" if manifest.finished else "in work" if status.in_work else "waiting for `softlabels resume`"
    rate = "" if status.rows_per_s is None else f", {status.rows_per_s:,.0f} rows/s"
    left = "" if not status.left_s else f", {duration(status.left_s)} left"
    found = [
        f"{manifest.name}: {state}",
        f"  shards  {len(status.committed)} of {count} committed, {len(status.in_work)} held by a running process",
        f"  rows    {status.rows:,} of {manifest.rows:,} ({100 * status.rows / manifest.rows:.0f}%){rate}{left}",
    ]
    for temperature, kl in status.audit["kl_nats"].items():
        found.append(f"  KL      T = {temperature}: mean {kl['mean']:.2g}, max {kl['max']:.2g} nats so far")
    return found


def _as_json(status: Status) -> str:
    facts = asdict(status)
    facts["manifest"] = {
        "name": status.manifest.name,
        "rows": status.manifest.rows,
        "finished": status.manifest.finished,
    }
    return dumps(facts)


def _described(manifest: Manifest, digest: str) -> list[tuple[str, str]]:
    t, shards, data = manifest.temperature, manifest.shards, manifest.transfer_set
    locked = f"locked to {t.captured:g}" if t.locked else f"{t.default:g} by default, any other on request"
    lines = [
        ("store", f"{manifest.name} ({manifest.container}, {'finished' if manifest.finished else 'UNFINISHED'})"),
        ("digest", digest),
        ("samples", f"{manifest.samples} × {manifest.classes} classes, ids: {manifest.ids.kind}"),
        ("encoding", f"{manifest.encoding.name}, {manifest.target_row_bytes} bytes a row"),
        ("temperature", locked),
        ("mean", manifest.mean),
        *(("teacher", f"{m.name}: {m.model}, weights {(m.weights_sha256 or 'none')[:16]}") for m in manifest.teachers),
        *([("precision", manifest.precision)] if manifest.precision else []),
        ("transfer set", f"{data.name} from {data.source}, fingerprint {data.fingerprint}"),
        *(("inputs", f"{kept}, {spec.row_bytes} bytes a sample") for kept, spec in _kept_inputs(manifest)),
        ("shards", f"{shards.count} of {shards.rows_per_shard} rows, chunks of {shards.rows_per_chunk}"),
    ]
    audit = manifest.audit or {}
    for temperature, kl in audit.get("kl_nats", {}).items():
        lines.append(
            (f"KL, T = {temperature}", f"mean {kl['mean']:.3g}, p99 {kl['p99']:.3g}, max {kl['max']:.3g} nats")
        )
    if audit:
        lines.append(("top-1", f"{100 * audit['top1_agreement']:.4g}% as the exact targets"))
    return lines


def _kept_inputs(manifest: Manifest) -> list[tuple[str, ArraySpec]]:
    spec = manifest.arrays.get(INPUTS)
    return [] if spec is None else [(f"{np.dtype(spec.dtype)}{list(spec.row_shape)}", spec)]

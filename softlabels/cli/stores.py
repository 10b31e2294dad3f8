"""Commands about stores: `status`, `inspect`, `verify`, `repair`, `merge`, `convert`, and `cache list | clear`."""

from __future__ import annotations

import json as json_library
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from cyclopts import App, Parameter
from cyclopts.validators import Number

from softlabels.cli.options import Wait
from softlabels.errors import JobError, MissingExtraError
from softlabels.manifest import INPUTS, Compression, Container, Manifest
from softlabels.progress import duration, track

if TYPE_CHECKING:
    from softlabels.store.ledger import Status
    from softlabels.store.repair import Repair
    from softlabels.store.shard_checks import Report
    from softlabels_client.cache import CachedStore, CacheFolder

cache = App(name="cache", help_format="markdown", default_parameter=Parameter(negative=()))


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
        print(_status_json(found) if json else "\n".join(_progress(found)), flush=True)
        if watch is None or found.manifest.finished:
            return
        time.sleep(watch)


def _progress(status: Status) -> list[str]:
    manifest = status.manifest
    count = manifest.shards.count
    state = "finished" if manifest.finished else "in work" if status.in_work else "waiting for `softlabels resume`"
    rate = "" if status.rows_per_s is None else f", {status.rows_per_s:,.0f} rows/s"
    left = "" if not status.left_s else f", {duration(status.left_s)} left"
    return [
        f"{manifest.name}: {state}",
        f"  shards  {len(status.committed)} of {count} committed, {len(status.in_work)} held by a running process",
        f"  rows    {status.rows:,} of {manifest.rows:,} ({100 * status.rows / manifest.rows:.0f}%){rate}{left}",
        *(
            f"  KL      T = {temperature}: mean {kl['mean']:.2g}, max {kl['max']:.2g} nats so far"
            for temperature, kl in status.audit["kl_nats"].items()
        ),
    ]


def _status_json(status: Status) -> str:
    manifest = status.manifest
    brief = {"name": manifest.name, "rows": manifest.rows, "finished": manifest.finished}
    return json_library.dumps({**asdict(status), "manifest": brief})


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
        print(json_library.dumps({"digest": digest, "manifest": manifest.to_json()}, indent=2))
    else:
        print("\n".join(f"{label:<14}{value}" for label, value in _described(manifest, digest)))


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
    ]
    if (inputs := manifest.arrays.get(INPUTS)) is not None:
        kind = f"{np.dtype(inputs.dtype)}{list(inputs.row_shape)}"
        lines.append(("inputs", f"{kind}, {inputs.row_bytes} bytes a sample"))
    lines.append(("shards", f"{shards.count} of {shards.rows_per_shard} rows, chunks of {shards.rows_per_chunk}"))
    audit = manifest.audit or {}
    for temperature, kl in audit.get("kl_nats", {}).items():
        errors = f"mean {kl['mean']:.3g}, p99 {kl['p99']:.3g}, max {kl['max']:.3g} nats"
        lines.append((f"KL, T = {temperature}", errors))
    if audit:
        lines.append(("top-1", f"{100 * audit['top1_agreement']:.4g}% as the exact targets"))
    return lines


def verify_store(
    store: Path,
    /,
    *,
    all: bool = False,
    sample: Annotated[int | None, Parameter(metavar="N", validator=Number(gte=1))] = None,
    against_teacher: Annotated[Path | None, Parameter(metavar="JOB")] = None,
    json: bool = False,
) -> int:
    """Check a store against its own checksums, receipts and plan, and that its rows make sense.

    Ends with exit code 1 at the first fault and names shard, chunk and rows; with 0 where nothing is wrong.

    Args:
        store: folder of the store
        all: list all faults instead of stopping at the first
        sample: check this many random chunks instead of every one
        against_teacher: also run the teachers of this job file (TOML) again on random samples and compare the targets
        json: print the report as JSON
    """
    from softlabels.store.verify import verify

    report = verify(store, sample=sample, every_fault=all, show=track)
    agreement: dict[str, object] = {}
    damaged = not report.sound
    if against_teacher is not None and not damaged:
        from softlabels.precompute import load_job
        from softlabels.precompute.checks.verify_teachers import verify_against_teachers

        agreement = verify_against_teachers(store, load_job(against_teacher), report, show=track).to_json()
    if json:
        print(json_library.dumps({**report.to_json(), **({"agreement": agreement} if agreement else {})}, indent=2))
    else:
        print("\n".join(_verified(report, store)))
        if against_teacher is not None and damaged:
            print("the teachers were not asked: mend the store first")
    return 0 if report.sound else 1


def _verified(report: Report, where: Path) -> list[str]:
    checked = (
        f"{report.rows:,} rows in {report.chunks:,} chunks of {report.committed} of {report.shards} shards verified"
    )
    if report.sound:
        return [f"{where}: sound; {checked}"]
    lines = [f"{where}: {len(report.faults)} fault{'s' if len(report.faults) > 1 else ''}; {checked}"]
    lines += [f"  {fault}" for fault in report.faults]
    if any(fault.kind not in ("unfinished", "agreement") and fault.path != "ledger" for fault in report.faults):
        lines.append(f"repair with: softlabels repair {where}")
    elif any(fault.kind == "agreement" for fault in report.faults):
        lines.append("every stored byte is as it was written: `softlabels repair` has nothing to mend here")
    return lines


def repair_store(store: Path, /, *, wait: Wait = None) -> int:
    """Verify a store and move what is faulty into its folder damaged/.

    What follows from intact parts (id index, metadata, manifest) is written again. `softlabels resume` then computes
    the missing shards. The exit code is 0 where the store is complete, else 1.

    Args:
        store: folder of the store
        wait: seconds to wait for another process that holds the store's lock, 600 if not given
    """
    from softlabels.store.ledger import lock_wait
    from softlabels.store.repair import repair

    with lock_wait(wait):
        done = repair(store, show=track)
    print("\n".join(_repaired(done, store)))
    return 0 if done.digest is not None else 1


def _repaired(done: Repair, where: Path) -> list[str]:
    wrong = [fault for fault in done.faults if fault.kind != "unfinished"]
    lines = [f"{where}: {len(wrong)} fault{'' if len(wrong) == 1 else 's'}", *(f"  {fault}" for fault in wrong)]
    lines += [f"  moved {path} to {new_path}" for path, new_path in done.moved.items()]
    lines += [f"  wrote {path} again" for path in done.rebuilt]
    if done.plan_lost:
        lines.append("the plan is lost: run `softlabels precompute` with the same job file; committed shards are kept")
        return lines
    if done.dropped:
        lines.append(f"dropped shards: {', '.join(map(str, done.dropped))}")
    if done.busy:
        lines.append(f"left to the process that is writing them: shards {', '.join(map(str, done.busy))}")
    if done.mixed:
        lines.append("which shards were replaced is not known: restore the store from a copy, or compute it again")
    elif done.digest is None:
        lines.append(f"the store is unfinished; continue with: softlabels resume {where}")
    else:
        lines.append(f"the store is complete, digest {done.digest}")
    return lines


def merge_stores(
    source: Path, destination: Path, /, *more: Path, without_teachers: bool = False, wait: Wait = None
) -> int:
    """Unite the committed shards of stores that were begun from the very same plan.

    Takes SOURCE … DESTINATION: the last folder is the destination, all before it are sources. Every file is verified
    while it is copied; the sources stay as they are. The destination is published when no shard is missing. First, the
    job that the sources keep is loaded, and its data and teachers are compared with a few rows of each source.

    Args:
        source: folder of a store, finished or not
        destination: new folder, or a store of that plan
        more: further folders; the last one is the destination
        without_teachers: do not ask the teachers, where they or the data are not on this machine
        wait: seconds to wait for another process that holds the destination's lock, 600 if not given
    """
    from softlabels.store.copies import merge
    from softlabels.store.ledger import lock_wait

    folders = [source, destination, *more]
    sources, into = folders[:-1], folders[-1]
    if not without_teachers:
        _ask_teachers(sources)
    with lock_wait(wait):
        done = merge(sources, into, show=track)
    for folder in sources:
        print(f"  {folder}: {done.copied.get(str(folder), 0)} shards copied")
    for shard, message in sorted(done.damaged.items()):
        print(f"  shard {shard} is damaged: {message}")
    if done.digest is None:
        missing = "1 shard is" if len(done.missing) == 1 else f"{len(done.missing)} shards are"
        print(f"{into}: {missing} missing; merge more, or: softlabels resume {into}")
        return 1
    print(f"{into}: complete, digest {done.digest}")
    return 0


def _ask_teachers(stores: Sequence[Path]) -> None:
    """Compare data and teachers of the kept job with rows of each store; raise JobError where they cannot be loaded."""
    from softlabels.store.store_documents import JOB

    if not any((store / JOB).is_file() for store in stores):
        return  # not made by a job: there is nobody to ask
    try:
        from softlabels.precompute.checks.committed_rows import ask_about_stores
    except MissingExtraError as error:
        raise JobError(
            f"the teachers cannot be asked ({error}); merge elsewhere, or pass --without-teachers"
        ) from error
    ask_about_stores(stores)


def convert(
    source: Annotated[Path, Parameter(name="SRC")],
    target: Annotated[Path, Parameter(name="DST")],
    /,
    *,
    container: Container | None = None,
    compress: Compression | None = None,
    wait: Wait = None,
) -> None:
    """Copy a finished store into another container.

    Every chunk is verified on the way and every array stays bit by bit the same; a store converted there and back has
    its old digest again. Run the same command again after an interruption: it continues where it stopped.

    Args:
        source: folder of the store to copy
        target: folder of the store to make
        container: format of the new store; that of SRC if not given
        compress: compress chunks, for an archive: smaller, but each row costs its whole chunk (zarr: zstd, blosc;
            hdf5: gzip)
        wait: seconds to wait for another process that holds DST's lock, 600 if not given
    """
    from softlabels.store.copies import convert_store
    from softlabels.store.ledger import lock_wait
    from softlabels.store.store_documents import load_manifest

    total = load_manifest(source).rows
    with lock_wait(wait), track(total, f"convert {source}", "rows") as progress:
        manifest = convert_store(source, target, container=container, compression=compress, advance=progress.advance)
    compressed = f", {manifest.shards.compression}" if manifest.shards.compression else ""
    print(f"{target}: {manifest.rows:,} rows in {manifest.container}{compressed}, digest {manifest.digest}")


@cache.command(name="list")
def list_cache(*, folder: Path | None = None) -> None:
    """Show the rows of served stores that are kept on this machine, by store version.

    Args:
        folder: folder of the cache; $SOFTLABELS_CACHE or ~/.cache/softlabels if not given
    """
    where, opened = _open_cache(folder)
    print(f"cache in {where}")
    _show_cached(opened.stores())


@cache.command(name="clear")
def clear_cache(*, folder: Path | None = None, digest: str = "") -> None:
    """Remove the rows of served stores from this machine; versions that a process has open stay.

    Args:
        folder: folder of the cache; $SOFTLABELS_CACHE or ~/.cache/softlabels if not given
        digest: remove only versions whose digest begins so
    """
    where, opened = _open_cache(folder)
    removed, stayed = opened.clear(digest)
    print(f"removed from {where}: {len(removed)}; stays, because a process has it open: {len(stayed)}")
    _show_cached(stayed)


def _open_cache(folder: Path | None) -> tuple[Path, CacheFolder]:
    from softlabels_client.cache import CacheFolder, default_folder

    where = folder or default_folder()
    return where, CacheFolder(where)


def _show_cached(stores: Sequence[CachedStore]) -> None:
    for store in stores:
        opened = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.last_opened_s))
        print(
            f"{store.name}  {store.digest[:12]}  {store.cached_rows} of {store.rows} rows  "
            f"{store.disk_bytes / 1e6:.1f} MB on disk, {store.size_bytes / 1e6:.1f} at most  "
            f"{'in use' if store.in_use else f'last opened {opened}'}"
        )

"""`softlabels inspect WHERE`: what a store says of itself."""

from __future__ import annotations

import argparse
import json

import numpy as np

from softlabels.manifest import INPUTS, ArraySpec, Manifest


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "inspect",
        help="show what a store says of itself",
        description="Show the manifest of a store on disk or behind a server: what was computed, by whom, for which "
        "data, at which temperature, and how far the kept targets are from the exact ones.",
    )
    parser.add_argument("where", help="a store's folder or its http(s) address")
    parser.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the manifest."""
    import softlabels

    with softlabels.open(options.where) as store:
        manifest, digest = store.manifest, store.digest
    if options.json:
        print(json.dumps({"digest": digest, "manifest": manifest.to_json()}, indent=2))
    else:
        print("\n".join(f"{label:<14}{value}" for label, value in described(manifest, digest)))
    return 0


def described(manifest: Manifest, digest: str) -> list[tuple[str, str]]:
    """The manifest in a few labelled lines."""
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
    """The type of the samples that a store keeps beside its targets, if it does: "uint8[3, 224, 224]"."""
    spec = manifest.arrays.get(INPUTS)
    return [] if spec is None else [(f"{np.dtype(spec.dtype)}{list(spec.row_shape)}", spec)]

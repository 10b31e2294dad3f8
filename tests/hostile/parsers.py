"""Every parser of bytes that come from outside, as a function of bytes: each returns, or raises one of our errors.

`python tests/hostile/parsers.py NAME SECONDS FOLDER` fuzzes one of them with atheris, guided by the coverage of this
package, until the seconds have passed or an input breaks it; FOLDER keeps what it learnt and the input that broke it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Parser = Callable[[bytes], object]

NEVER_MORE_MB = 2048
"""No hostile input of a few kilobytes may take this much memory."""


def safetensors_file(raw: bytes) -> object:
    """A batch reply or the frame of a stream."""
    from softlabels import wire

    return wire.from_bytes(raw)


def problem_details(raw: bytes) -> object:
    """The body of an error reply."""
    from softlabels import wire

    document = _json(raw)
    return wire.from_problem(document) if isinstance(document, dict) else None


def response_head(raw: bytes) -> object:
    """The head of a reply, as the client's own connection reads it."""
    from softlabels_client.http.raw_connection import parse_usual

    return parse_usual(raw)


def sealed_document(raw: bytes) -> object:
    """Any document with a digest."""
    from softlabels.documents import open_sealed

    return open_sealed(raw, what="it")


def manifest(raw: bytes) -> object:
    """The body of a manifest or plan whose digest is right."""
    from softlabels.manifest import Manifest

    document = _json(raw)
    return Manifest.from_json(document) if isinstance(document, dict) else None


def receipt(raw: bytes) -> object:
    """The body of a receipt whose digest is right."""
    from softlabels.documents import seal
    from softlabels.store.ledger import parse_receipt

    document = _json(raw)
    with contextlib.suppress(ValueError):  # 1e999 has no JSON form, so that no digest of it can be right
        return parse_receipt(seal(document), what="it") if isinstance(document, dict) else None
    return None


def job_file(raw: bytes) -> object:
    """A job in TOML."""
    from softlabels.precompute.job import load_job

    return _in_file(load_job, raw)


def job_document(raw: bytes) -> object:
    """A job in JSON, as a store keeps it."""
    from softlabels.precompute.job import job_from_json

    document = _json(raw)
    return job_from_json(document, base=Path("/")) if isinstance(document, dict) else None


def epoch_query(raw: bytes) -> object:
    """The query of an epoch stream; a cursor among it."""
    from softlabels.order import EpochConfig
    from softlabels_server.api.requests import read_query

    return EpochConfig.from_query(read_query(raw.decode("latin-1")))


def batch_query(raw: bytes) -> object:
    """The query of a batch with a binary body: what is before the first line feed; the body is what follows."""
    from softlabels_server.api.requests import from_binary
    from softlabels_server.settings import Settings

    query, _, body = raw.partition(b"\n")
    return from_binary(body, query.decode("latin-1"), _settings(Settings))


def batch_body(raw: bytes) -> object:
    """The JSON body of a batch."""
    from softlabels.manifest import Manifest
    from softlabels_server.api.requests import from_json
    from softlabels_server.settings import Settings

    plan = Manifest.from_json(json.loads(seeds("manifest")[0]))
    return from_json(raw, plan, _settings(Settings))


def sampler_state(raw: bytes) -> object:
    """The state of a sampler in a checkpoint."""
    from softlabels_client.data.sampler import EpochSampler

    document = _json(raw)
    sampler = EpochSampler(100, digest="a" * 64, batch_size=8, rank=0, world_size=1, seed=1)
    return sampler.load_state_dict(document) if isinstance(document, dict) else None


def checkpoint(raw: bytes) -> object:
    """A checkpoint of a training."""
    from softlabels_client.training.checkpoint import read_checkpoint

    return _in_file(read_checkpoint, raw)


def cache_table(raw: bytes) -> object:
    """The description of one store's rows in a trainer's cache."""
    import softlabels
    from softlabels_client.cache.cache_folder import CacheFolder

    root = _shared_store()
    with softlabels.open(root) as store:
        folder = CacheFolder(root.parent / "cache")
        folder.open(store.manifest, store.digest)
        next((root.parent / "cache").rglob("table.json")).write_bytes(raw)
        return folder.stores(), folder.open(store.manifest, store.digest)


def sorted_ids(raw: bytes) -> object:
    """The index of a store with looked-up ids, listed in the manifest with the digest that it has."""
    return _open_with_index("index/sorted_ids.npy", raw)


def positions(raw: bytes) -> object:
    """The positions of looked-up ids, listed in the manifest with the digest that they have."""
    return _open_with_index("index/positions.npy", raw)


PARSERS: dict[str, Parser] = {
    parser.__name__: parser
    for parser in (
        safetensors_file, problem_details, response_head, sealed_document, manifest, receipt, job_file, job_document,
        epoch_query, batch_query, batch_body, sampler_state, checkpoint, cache_table, sorted_ids, positions,
    )
}  # fmt: skip


def accepts(parser: Parser, raw: bytes) -> bool:
    """Return whether a parser took an input. Every error that is not one of ours is raised."""
    from softlabels.errors import SoftLabelsError

    try:
        parser(raw)
    except SoftLabelsError:
        return False
    return True


@functools.lru_cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Return valid inputs of a parser: what this version of the package writes itself."""
    if name in _TEXT_SEEDS:
        return _TEXT_SEEDS[name]
    with tempfile.TemporaryDirectory() as folder:
        return tuple(_written(name, Path(folder)))


def mutations(name: str, *, count: int, seed: int) -> Iterator[bytes]:
    """Yield changed copies of a parser's seeds: bits, bytes, slices removed, repeated, exchanged and cut off."""
    rng = random.Random(f"{name} {seed}")
    for _ in range(count):
        raw = bytearray(rng.choice(seeds(name)))
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            _mutate(raw, rng)
        yield bytes(raw)


_INTERESTING = (
    b"\0", b"\xff" * 8, b"\x7f" * 4, b"-1", b"1e999", b"NaN", b"null", b"true", b"{}", b"[]", b'""', b"9" * 40, b"\n",
    b"%00", b"\\ud800", b"\xf0\x9f\x92\xa9", b'"', b"}", b"]", b",", b"0x10", b"../../etc/passwd", b"\r\n\r\n",
)  # fmt: skip


def _mutate(raw: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(len(raw) + 1), rng.choice((1, 2, 4, 8, 64))
    other = rng.randrange(len(raw) + 1)
    match rng.randrange(7):
        case 0 if at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            del raw[at : at + length]
        case 2:
            raw[at:at] = raw[other : other + length]
        case 3:
            raw[at:at] = rng.choice(_INTERESTING)
        case 4:
            raw[at : at + length] = raw[other : other + length]
        case 5:
            del raw[at:]
        case _:
            replacement = rng.choice(_INTERESTING)
            raw[at : at + len(replacement)] = replacement


_JOB = b"""
[store]
path = "targets"
format = "zarr"

[transfer_set]
source = "softlabels.data:mnist"
arguments = { split = "train", rows = [0, 100] }

[targets]
encoding = "f16"
temperature = 4.0
mean = "arithmetic"

[[teachers]]
model = "softlabels.demo.nets:LargeNet"
weights = "teacher-0.safetensors"
weight = 2.0

[run]
batch_size = 256
"""

_TEXT_SEEDS: dict[str, tuple[bytes, ...]] = {
    "problem_details": (
        b'{"type":"urn:softlabels:error:unknown-id","title":"x","status":404,"detail":"no","code":"unknown-id",'
        b'"context":{"ids":[1,2]}}',
        b'{"status":500,"code":"checksum-mismatch","detail":"it","context":{"rows":[0,7],"shard":1}}',
    ),
    "response_head": (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.safetensors\r\ncontent-length: 123\r\nvary: accept\r\n\r\n",
    ),
    "job_file": (_JOB,),
    "epoch_query": (
        b"epoch=3&seed=7&batch_size=256&rank=1&world_size=4&cursor=1024&shuffle=true&block=64&remainder=pad&view=2",
    ),
    "batch_query": (b"fields=targets,labels&temperature=4&columns=ids,views\n" + bytes(32), b"decode=p\n" + bytes(8)),
    "batch_body": (
        b'{"ids":[1,2,3],"fields":["targets","labels"],"temperature":4.0,"digest":"' + b"a" * 64 + b'"}',
        b'{"ids":[4,5],"views":[0,1],"spans":[[0,1],[0,2]],"decode":"logits"}',
    ),
}


def _written(name: str, folder: Path) -> Iterator[bytes]:
    import numpy as np

    from softlabels import wire

    if name == "safetensors_file":
        arrays = {"targets": np.zeros((3, 4), dtype="<f2"), "ids": np.arange(3)}
        yield wire.to_bytes(arrays, {"format": "softlabels-batch/2", "digest": "a" * 64})
        yield wire.to_bytes({}, {"format": "softlabels-end/2"})
    elif name == "sampler_state":
        from softlabels_client.data.sampler import EpochSampler

        sampler = EpochSampler(100, digest="a" * 64, batch_size=8, rank=0, world_size=1, seed=1)
        yield json.dumps(sampler.state_dict()).encode()
    elif name == "checkpoint":
        from softlabels_client.training.checkpoint import CheckpointFolder

        written = CheckpointFolder(folder / "checkpoints").write(1, {"step": 1, "values": [1.5, None, {"a": "b"}]})
        yield Path(written).read_bytes()
    elif name == "job_document":
        from softlabels.precompute.job import load_job

        (folder / "job.toml").write_bytes(_JOB)
        document = load_job(folder / "job.toml").to_json()
        yield json.dumps({key: value for key, value in document.items() if key != "base"}).encode()
    elif name == "cache_table":
        import softlabels
        from softlabels_client.cache.cache_folder import CacheFolder

        with softlabels.open(_make_store(folder / "store")) as store:
            CacheFolder(folder / "cache").open(store.manifest, store.digest)
        yield next((folder / "cache").rglob("table.json")).read_bytes()
    else:
        store_root = _make_store(folder / "store")
        files = {
            "sealed_document": ("manifest.json", "plan.json", "ledger/00000000.json"),
            "manifest": ("manifest.json", "plan.json"),
            "receipt": ("ledger/00000000.json",),
            "sorted_ids": ("index/sorted_ids.npy",),
            "positions": ("index/positions.npy",),
        }[name]
        for path in files:
            raw = (store_root / path).read_bytes()
            yield json.dumps(json.loads(raw)["body"]).encode() if name in ("manifest", "receipt") else raw


def _make_store(root: Path) -> Path:
    """Write a finished store of 20 samples with looked-up ids in two shards."""
    import numpy as np

    from softlabels.audit import Audit
    from softlabels.encodings import make_encoding
    from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
    from softlabels.store import StoreWriter, plan_store

    plan = plan_store(
        name="hostile",
        samples=20,
        ids=IdSpec(kind="int", dense_start=None),
        encoding=make_encoding("f16", classes=4),
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={"split": "train"}, labelled=True),
        rows_per_shard=16,
        rows_per_chunk=8,
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            numbers = np.arange(claim.rows.start, claim.rows.stop)
            claim.commit(
                ids=numbers[::-1] * 3,
                encoded={"targets": np.zeros((len(numbers), 4), dtype=np.float16)},
                fingerprints=np.zeros((len(numbers), 16), dtype=np.uint8),
                labels=numbers % 4,
                audit=Audit().to_json(),
            )
    writer.finish()
    return root


@functools.lru_cache
def _shared_store() -> Path:
    # Removed with the process: a parser that is tried 100,000 times cannot write a store each time.
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    return _make_store(Path(folder.name) / "hostile")


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _open_with_index(path: str, raw: bytes) -> object:
    import hashlib

    import numpy as np

    import softlabels
    from softlabels.documents import open_sealed, seal

    root = _shared_store()
    intact, document = (root / path).read_bytes(), (root / "manifest.json").read_bytes()
    body = open_sealed(document, what="it")
    body["metadata_sha256"][path] = hashlib.sha256(raw).hexdigest()
    try:
        (root / path).write_bytes(raw)
        (root / "manifest.json").write_bytes(seal(body))
        with softlabels.open(root) as store:
            found = store.ids()
            return store.batch(np.asarray(found)[:4]), store.batch([0, 3])
    finally:
        (root / path).write_bytes(intact)
        (root / "manifest.json").write_bytes(document)


@functools.lru_cache
def _settings(kind: Any) -> Any:
    return kind()


def _json(raw: bytes) -> object:
    # Hostile JSON itself is for `sealed_document`; here the values count.
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(raw)
    return None


def _in_file(parse: Callable[[Path], object], raw: bytes) -> object:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        path.write_bytes(raw)
        return parse(path)


def _fuzz(name: str, seconds: int, folder: Path) -> None:
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["softlabels", "softlabels_server", "softlabels_client"]):
        for number, seed in enumerate(seeds(name)):
            (corpus / f"seed-{number}").write_bytes(seed)
            accepts(PARSERS[name], seed)  # imports, instrumented, everything that the parser needs
    # libFuzzer's dictionary: the keys and values of the seeds, which blind changes of bytes would never find.
    words = sorted({word for seed in seeds(name) for word in re.findall(rb"[A-Za-z_]{2,}", seed)})
    (folder / f"{name}.dict").write_bytes(b"".join(b'"%b"\n' % word for word in (*words, b"format")))
    limits = (
        f"-max_total_time={seconds}",
        "-timeout=20",
        f"-rss_limit_mb={NEVER_MORE_MB}",
        "-max_len=8192",
        "-len_control=0",
    )
    options = (f"-dict={folder / name}.dict", f"-artifact_prefix={folder}/{name}-", "-print_final_stats=1")
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], lambda raw: accepts(PARSERS[name], raw) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    _fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

"""Faults between client and server: requests and replies of every route changed, exchanged, replayed, misdirected."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.target_store import TargetStore
from softlabels_client import HttpRows, RetryPolicy
from softlabels_client.cache import CachedRows
from tests.faults.generator.damage import changed
from tests.faults.generator.disk_cases import Shelf
from tests.faults.generator.judging import Questions, Verdict, WrongError
from tests.faults.generator.layers import BYTE_OPERATIONS, LATE
from tests.faults.generator.network import Change, Message, Proxy, Tampering, kind_of, read_message
from tests.faults.generator.readers import Server, expected_weights, trained
from tests.faults.generator.stores import VERSIONS, Model, Stores, write_tree

Rng = np.random.Generator

KINDS = (
    *("zarr", "zarr-wide", "hdf5-int", "zarr-str", "zarr-topk", "hdf5-gzip", "zarr-members"),
    *("zarr-views", "zarr-sequences", "zarr-inputs"),
)
WITH_CONSTANTS = ("zarr-hidden", "hdf5-hidden")
UNFINISHED = ("zarr", "zarr-wide", "zarr-topk")
"""Kinds that are also served before their last shard; their ids count up, so that they can be looked up."""

TRAINED = ("zarr", "zarr-wide", "hdf5-int", "zarr-str", "zarr-topk", "zarr-inputs", *WITH_CONSTANTS)

OBSERVERS = ("client", "cache", "distill")

QUICK = RetryPolicy(attempts=2, attempts_at_first=2, first_pause_s=0.001, longest_pause_s=0.002)
TIMEOUT_S = 1.0


class Network:
    """Servers over each version of every store, in processes of their own, and the proxy before them."""

    def __init__(self, folder: Path, shelf: Shelf) -> None:
        self._shelf = shelf
        self.servers: dict[str, Server] = {}
        for version in VERSIONS:
            root = folder / version
            for kind in (*KINDS, *WITH_CONSTANTS):
                write_tree(root / kind, shelf.stores(kind).trees[version])
            for kind in UNFINISHED if version == "current" else ():
                write_tree(root / f"{kind}-begun", shelf.stores(kind).trees["begun"])
            self.servers[version] = Server(root)
        self.proxy = Proxy()

    def port(self, version: str) -> int:
        """Return the port of the server over a version."""
        return int(self.servers[version].address().rpartition(":")[2])

    def url(self, kind: str) -> str:
        """Return the address of a store behind the proxy."""
        return f"http://127.0.0.1:{self.proxy.port}/{kind}"

    def close(self) -> None:
        """End servers and proxy."""
        self.proxy.close()
        for server in self.servers.values():
            server.close()


class NetworkFault:
    """One fault on the way between client and server.

    Args:
        rng: random numbers of the case.
        network: servers and proxy.
        stores: the store that is asked for.
        layer, operation: the pair to try.
    """

    def __init__(
        self, rng: Rng, network: Network, stores: Stores, layer: str, operation: str, version: str = "current"
    ) -> None:
        self.rng, self.network, self.stores, self.layer, self.operation = rng, network, stores, layer, operation
        self.version = version
        self.told = operation

    def tampering(self) -> Tampering:
        """Return what the proxy is to do."""
        operation = self.operation
        if operation == "change after the first read":
            operation = str(self.rng.choice(BYTE_OPERATIONS))
        many = self.rng.random() < 0.3
        return Tampering(
            port=self.network.port("current"),
            layer=self.layer,
            change=self._change(operation),
            skip=int(self.rng.integers(2)) if self.layer.endswith("batch") and not many else 0,
            most=None if many else 1,
        )

    def honest(self) -> Tampering:
        """Return a proxy that changes nothing."""
        return Tampering(port=self.network.port("current"))

    def _change(self, operation: str) -> Change:
        if operation in BYTE_OPERATIONS:
            return self._bytes(operation)
        if operation == "exchange replies":
            return self._other_question if self.rng.random() < 0.8 else self._frames
        if operation == "replay an older version" and self.rng.random() < 0.5:
            return self._earlier_reply
        version = "older" if operation == "replay an older version" else "rival"
        if operation == "change under an open handle":
            version = str(self.rng.choice(["older", "rival"]))
        return self._from_version(version)

    def _bytes(self, operation: str) -> Change:
        row_bytes = sum(spec.row_bytes for spec in self.stores.kind.plan.arrays.values())
        on_head = self.rng.random() < 0.15
        reframed = self.rng.random() < 0.5
        rows = int(self.rng.choice([row_bytes, *(spec.row_bytes for spec in self.stores.kind.plan.arrays.values())]))
        seed = int(self.rng.integers(1 << 30))
        self.told = f"{operation} in the {'head' if on_head else 'body'}"

        def change(message: Message) -> list[bytes]:
            # The same change to each message, as a broken proxy makes it.
            rng = np.random.default_rng(seed)
            if on_head or not message.body:
                return [changed(rng, operation, message.head, 16) + message.body]
            if operation == "extend" and rng.random() < 0.3:
                return [message.raw, message.raw]
            body = changed(rng, operation, message.body, rows)
            head = message.head
            if reframed and len(body) != len(message.body):
                head = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % len(body), head)
            return [head + body]

        return change

    def _other_question(self, message: Message) -> list[bytes] | None:
        self.told = "the reply to another question"
        asked = self._last_request(self.layer.partition(": ")[2])
        return [message.raw] if asked is None else self._ask("current", other_question(self.rng, asked))

    def _frames(self, message: Message) -> list[bytes]:
        self.told = "two frames change places"
        frames = frames_of(message.body)
        if len(frames) > 2:
            one, two = self.rng.choice(len(frames) - 1, size=2, replace=False)
            frames[one], frames[two] = frames[two], frames[one]
        return [message.head + b"".join(frames)]

    def _earlier_reply(self, message: Message) -> list[bytes]:
        self.told = "an earlier reply"
        known = self.network.proxy.tampering.replies.get(self.layer.partition(": ")[2], [])
        fitting = [old for old in known if old.raw != message.raw] or [message]
        same = [old for old in fitting if len(old.body) == len(message.body)] or fitting
        return [same[int(self.rng.integers(len(same)))].raw]

    def _from_version(self, version: str) -> Change:
        self.told = f"answered by the {version} version"
        digests = self.stores.digests
        # A server of another version refuses a pinned digest; a peer that wants to be believed answers all the same.
        forged = self.rng.random() < 0.5

        def change(message: Message) -> list[bytes] | None:
            mine, theirs = digests[self.version].encode(), digests[version].encode()
            asked = self._last_request(self.layer.partition(": ")[2])
            if asked is None:
                return [message.raw]
            raw = asked.raw.replace(mine, theirs) if forged else asked.raw
            reply = self._ask(version, raw)
            return None if reply is None else [reply[0].replace(theirs, mine)] if forged else reply

        return change

    def _last_request(self, kind: str) -> Message | None:
        return self.network.proxy.tampering.requests.get(kind)

    def _ask(self, version: str, raw: bytes) -> list[bytes] | None:
        with socket.create_connection(("127.0.0.1", self.network.port(version)), timeout=2) as far:
            far.sendall(raw)
            reply, _ = read_message(far, b"")
            return None if reply is None else [reply.raw]


def other_question(rng: Rng, asked: Message) -> bytes:
    """Return a request of the same form that asks for something else: other samples, views, spans, seed or cursor."""
    head, body = asked.head, asked.body
    target = head.split(b" ", 2)[1]
    if kind_of(target.decode("latin-1")) == "epoch":
        name = (rb"seed=", rb"epochs/", rb"cursor=")[int(rng.integers(3))]
        return re.sub(rb"(" + name + rb")(\d+)", lambda m: m[1] + str(int(m[2]) ^ 1).encode(), head) + body
    if kind_of(target.decode("latin-1")) != "batch":
        other = (b"/zarr/" if target.endswith(b"/constants") else b"/zarr-wide ") if b"hidden" in target else b"/zarr "
        return re.sub(rb"/zarr-\w+[/ ]|/hdf5-\w+[/ ]|/zarr[/ ]", other, head, count=1) + body
    if body.startswith(b"{"):
        document: dict[str, Any] = json.loads(body)
        column = "views" if "views" in document and rng.random() < 0.5 else "ids"
        document[column] = document[column][::-1] if column == "ids" else [int(v) ^ 1 for v in document[column]]
        body = json.dumps(document).encode()
        return re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % len(body), head) + body
    words = np.frombuffer(body, "<i8").copy()
    if b"columns=ids,views" in target and rng.random() < 0.7:
        words[len(words) // 2 :] ^= 1
    elif b"columns=ids,spans" in target:
        words[len(words) // 3 :] ^= 1
    else:
        words = words[::-1]
    return head + words.tobytes()


def frames_of(body: bytes) -> list[bytes]:
    """Return the safetensors files that a stream consists of."""
    found, begin = [], 0
    while begin + 8 <= len(body):
        length = int.from_bytes(body[begin : begin + 8], "little")
        table = json.loads(body[begin + 8 : begin + 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        end = begin + 8 + length + max(ends, default=0)
        found.append(body[begin:end])
        begin = end
    return found


class HttpReader:
    """Reads through the proxy: by our client, through its cache, or in a training."""

    def __init__(
        self, url: str, cache: Path, stores: Stores, questions: Questions, observer: str, models: dict[str, Model]
    ) -> None:
        self._url, self._cache, self._stores, self._questions = url, cache, stores, questions
        self._observer, self._models = observer, models
        self._store: TargetStore | None = None

    def open(self, verdict: Verdict) -> None:
        """Open the store, unless it is open."""
        if self._store is None:
            with verdict.part("open"):
                rows: Any = HttpRows(self._url, timeout_s=TIMEOUT_S, retry=QUICK)
                if self._observer == "cache":
                    rows = CachedRows(rows, folder=self._cache)
                self._store = TargetStore(rows, where=self._url)

    def read(self, verdict: Verdict) -> None:
        """Read everything, or train."""
        if self._store is None:
            return
        if self._observer != "distill":
            self._questions.everything(self._store, self._models, verdict)
            return
        with verdict.part("distill"):
            if self._store.digest not in self._models:
                raise WrongError("opened under a digest that no store has")
            if trained(self._stores, self._store) != expected_weights(self._stores, self._store.digest):
                raise WrongError("the student learned something else")
            verdict.rows += 2 * len(self._store)

    def is_of(self, digest: str) -> bool:
        """Return whether the store was opened under this digest."""
        return self._store is not None and self._store.digest == digest

    def close(self) -> None:
        """Close the store, to be opened again."""
        if self._store is not None:
            self._store.close()
            self._store = None


def run_http_case(
    network: Network, shelf: Shelf, cache: Path, rng: Rng, layer: str, operation: str, observer: str, verdict: Verdict
) -> str:
    """Run one case; return what was done, in words."""
    choices: tuple[str, ...] = WITH_CONSTANTS if layer.endswith("constants") else (*KINDS, *WITH_CONSTANTS)
    if observer == "distill":
        choices = tuple(kind for kind in choices if kind in TRAINED)
    if layer.endswith("epoch") and observer == "distill":
        choices = tuple(kind for kind in choices if kind in TRAINED)
    kind = str(rng.choice(choices))
    stores = shelf.stores(kind)
    begun = layer.endswith("description") and observer == "client" and rng.random() < 0.4
    if begun:
        kind = str(rng.choice(UNFINISHED))
        stores = shelf.stores(kind)
    fault = NetworkFault(rng, network, stores, layer, operation, version="begun" if begun else "current")
    questions = Questions(rng, stores.models[stores.digests["current"]], only_first=60 if begun else None)
    # A description of another store, whole, opens that store: what it says is then right of that one.
    models = {
        digest: model for name in (*KINDS, *WITH_CONSTANTS) for digest, model in shelf.stores(name).models.items()
    }
    reader = HttpReader(network.url(f"{kind}-begun" if begun else kind), cache, stores, questions, observer, models)
    proxy = network.proxy
    proxy.tampering = fault.honest()
    with contextlib.closing(reader):
        if operation in LATE:
            reader.open(verdict)
            reader.read(verdict)
            if verdict.codes:
                verdict.void, verdict.codes = f"busy: the honest server was refused: {verdict.codes}", []
                return kind
            replies = proxy.tampering.replies
            proxy.tampering = fault.tampering()
            proxy.tampering.replies = replies
            proxy.cut()
            if layer.endswith(("description", "constants")):
                reader.close()
        else:
            proxy.tampering = fault.tampering()
        reader.open(verdict)
        reader.read(verdict)
        done, seen = proxy.tampering.done, proxy.tampering.seen
        _read_honestly(proxy, fault, reader, verdict)
    if not done and not verdict.wrong:
        verdict.void = "no such message was sent" if not seen else "the bytes were equal before"
    for server in network.servers.values():
        server.refuse_death(verdict)
    return f"{kind}: {fault.told}"


def _read_honestly(proxy: Proxy, fault: NetworkFault, reader: HttpReader, verdict: Verdict) -> None:
    """Read without a fault: whatever happened before, honest replies are taken again."""
    proxy.tampering = fault.honest()
    again = Verdict()
    if not reader.is_of(fault.stores.digests[fault.version]):
        reader.close()
    reader.open(again)
    reader.read(again)
    if "unreachable" in again.codes:  # an idle connection to a server that hung up is refused once, on a busy machine
        again = Verdict()
        reader.open(again)
        reader.read(again)
    verdict.wrong += again.wrong
    verdict.wrong += [f"an honest reply is refused afterwards: {code}" for code in sorted(set(again.codes))]

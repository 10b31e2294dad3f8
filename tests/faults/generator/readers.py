"""Readers of a store under damage: from its folder, from a server with and without our client, cached, and training."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from softlabels.errors import ServerUnreachableError
from softlabels.store.store_reader import LocalRows
from softlabels.target_store import TargetStore
from softlabels.wire import from_problem
from softlabels_client import HttpRows, RetryPolicy
from softlabels_client.cache import CachedRows
from softlabels_client.data.dataset import SoftTargetDataset
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.trainer import distill
from tests.faults.generator.judging import Questions, Verdict, WrongError, judge_array, model_of
from tests.faults.generator.stores import Model, Stores

QUICK = RetryPolicy(attempts=2, attempts_at_first=2, first_pause_s=0.001, longest_pause_s=0.002)
TIMEOUT_S = 5.0
SERVER_START_S = 60.0

TRAINING = DistillSettings(epochs=2, batch_size=30, learning_rate=0.05, device="cpu", seed=1, hard_weight=0.0)


class Reader(Protocol):
    """Something that opens a store once, and reads it as often as it is told to."""

    def open(self, verdict: Verdict) -> None:
        """Open the store; a refusal is noted."""
        ...

    def read(self, verdict: Verdict) -> None:
        """Read all of it, in every way that there is; nothing, where it could not be opened."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class TargetReader:
    """Reads through a `TargetStore`; what makes it is the subclass's."""

    def __init__(self, place: Place, stores: Stores, questions: Questions) -> None:
        self.place, self.stores, self.questions = place, stores, questions
        self.store: TargetStore | None = None

    def make(self) -> TargetStore:
        """Open the store."""
        return TargetStore(self.place.rows(), where="here")

    def open(self, verdict: Verdict) -> None:
        """Open the store; a refusal is noted."""
        with verdict.part("open"):
            self.store = self.make()

    def read(self, verdict: Verdict) -> None:
        """Read all of it."""
        if self.store is not None:
            self.questions.everything(self.store, self.stores.models, verdict)

    def close(self) -> None:
        """Close it."""
        if self.store is not None:
            self.store.close()
            self.store = None


class FolderReader(TargetReader):
    """Opens the folder."""


class ClientReader(TargetReader):
    """Opens the store behind the server with our client."""

    def make(self) -> TargetStore:
        """Open the store at its address."""
        url = self.place.url()
        return TargetStore(HttpRows(url, timeout_s=TIMEOUT_S, retry=QUICK), where=url)


class CacheReader(TargetReader):
    """Reads twice through a cache on the trainer's disk: from the source, then from the cache."""

    over_http = False

    def make(self) -> TargetStore:
        """Open the store, cached."""
        url = self.place.url() if self.over_http else ""
        source: Any = HttpRows(url, timeout_s=TIMEOUT_S, retry=QUICK) if self.over_http else self.place.rows()
        return TargetStore(CachedRows(source, folder=self.place.cache), where="cached")

    def read(self, verdict: Verdict) -> None:
        """Read all of it twice."""
        super().read(verdict)
        super().read(verdict)


class CachedClientReader(CacheReader):
    """Reads twice through a cache in front of the server."""

    over_http = True


class ServerReader:
    """Asks the server itself, in every format that it answers in, without the checks of our client."""

    def __init__(self, place: Place, stores: Stores, questions: Questions) -> None:
        self.place, self.stores, self.questions = place, stores, questions
        self._digest: str | None = None

    def open(self, verdict: Verdict) -> None:
        """Read the description; the digest is pinned from now on."""
        with verdict.part("description"):
            found = self._get("")
            if found["digest"] not in self.stores.models:
                raise WrongError("described under a digest that no store has")
            self._digest = found["digest"]
            self._judge_description(found["manifest"])

    def read(self, verdict: Verdict) -> None:
        """Ask for rows as JSON, decoded by the server, and for the constants."""
        if self._digest is None:
            return
        model = self.stores.models[self._digest]
        for decode in (None, "p"):
            with verdict.part(f"JSON, decode={decode}"):
                verdict.rows += self._judge_rows(model, decode)
        self.place.server.refuse_death(verdict)

    def close(self) -> None:
        """Nothing is held."""

    def _judge_description(self, manifest: dict[str, Any]) -> None:
        assert self._digest is not None
        model = self.stores.models[self._digest]
        if manifest["temperature"]["default"] != model.temperature or manifest["classes"] != model.kind.classes:
            raise WrongError("the description is another store's")

    def _judge_rows(self, model: Model, decode: str | None) -> int:
        ids = self.questions.draw_ids(24)
        views = self.questions.draw_views(24)
        document: dict[str, Any] = {"ids": ids, "digest": self._digest}
        document |= {} if views is None else {"views": views}
        document |= {} if decode is None else {"decode": decode, "temperature": 1.0}
        if decode is not None and model.kind.members:
            return 0
        reply = self._get("/batch", document)
        arrays = reply["arrays"]
        found = arrays["ids"]
        if found != ids:
            raise WrongError("rows of other samples than asked for")
        names = [name for name in arrays if name in model.rows]
        for name in names:
            dtype = np.asarray(model.rows[name][0]).dtype
            judge_array(name, _as_numbers(arrays[name], dtype), model, ids, views)
        if decode is not None:
            logits = model.decoded(ids, views).astype(np.float64)
            p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
            if not np.allclose(np.array(arrays["p"]), p, rtol=1e-4, atol=1e-6):
                raise WrongError("rows were decoded by the server to something else")
        return len(ids)

    def _get(self, path: str, document: dict[str, Any] | None = None) -> Any:
        body = None if document is None else json.dumps(document).encode()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        request = urllib.request.Request(self.place.api() + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                raise from_problem(json.loads(error.read())) from error
        except OSError as error:
            raise ServerUnreachableError(f"no answer: {error}") from error


class TrainingReader:
    """Trains a student on the store; the weights must be those of a student of the undamaged store."""

    def __init__(self, place: Place, stores: Stores, questions: Questions) -> None:
        self.place, self.stores, self.questions = place, stores, questions
        self._store: TargetStore | None = None

    def open(self, verdict: Verdict) -> None:
        """Open the store."""
        with verdict.part("open"):
            self._store = TargetStore(self.place.rows(), where="here")

    def read(self, verdict: Verdict) -> None:
        """Train for two epochs."""
        if self._store is None:
            return
        with verdict.part("distill"):
            model_of(self._store, self.stores.models)
            found = trained(self.stores, self._store)
            if found != expected_weights(self.stores, self._store.digest):
                raise WrongError("the student learned something else")
            verdict.rows += 2 * len(self._store)

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()


READERS: dict[str, type[Reader]] = {
    "reader": FolderReader,
    "client": ClientReader,
    "server": ServerReader,
    "cache": CacheReader,
    "distill": TrainingReader,
}


class Place:
    """Where the damaged store of a case lies, and the server over it.

    Args:
        folder: folder of the worker.
        number: number of the case; the folder has a name of its own, so that no server knows it.
        server: server of the worker.
    """

    def __init__(self, folder: Path, number: int, server: Server) -> None:
        self.name = f"s{number}"
        self.root = folder / "served" / self.name
        self.aside = folder / "aside"
        self.cache = folder / f"cache{number}"
        self.server = server
        self.every_read = False

    def rows(self) -> LocalRows:
        """Open the store as a folder; where the fault is one that no process reports, comparing every row."""
        return LocalRows(self.root, verify="every-read" if self.every_read else "first-read")

    def url(self) -> str:
        """Address of the store, for our client."""
        return f"{self.server.address()}/{self.name}"

    def api(self) -> str:
        """Address of the store's routes."""
        return f"{self.server.address()}/v1/stores/{self.name}"

    def clear(self) -> None:
        """Remove what the case left."""
        for folder in (self.root, self.aside, self.cache):
            shutil.rmtree(folder, ignore_errors=True)


class Server:
    """`softlabels serve` in a process of its own, started when it is first needed, and again when it died."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self._log = folder.parent / f"log-{folder.name}"
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    def address(self) -> str:
        """Return the address, of a server that runs."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._address

    def refuse_death(self, verdict: Verdict) -> None:
        """Note it as wrong where the server died."""
        if self._process is not None and self._process.poll() is not None:
            verdict.wrong.append(f"the server died with {self._process.returncode}")
            self._process = None

    def close(self) -> None:
        """End it, as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        # The port of before, so that clients find the server again; another one where somebody else took it.
        for port in (self._address.rpartition(":")[2] or "0", "0"):
            with self._log.open("wb") as output:
                command = [sys.executable, "-m", "softlabels", "serve", str(self._folder), "--port", port]
                self._process = subprocess.Popen([*command, *self._options], stdout=output, stderr=output)
            give_up = time.monotonic() + SERVER_START_S
            while time.monotonic() < give_up and self._process.poll() is None:
                if found := re.search(r" at (http://\S+)", self._log.read_text()):
                    self._address = found.group(1)
                    return
                time.sleep(0.02)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()}")


def student(width: int, classes: int) -> torch.nn.Module:
    """Return a student with the same first weights each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(_Scaled(), torch.nn.Linear(width, classes))


class _Scaled(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Bring row numbers into a range that a linear layer learns from."""
        return inputs.float() / 100


def trained(stores: Stores, store: TargetStore, **options: Any) -> bytes:
    """Return the weights of a student trained on a store, as bytes."""
    net = student(stores.inputs.inputs.shape[1], stores.kind.classes)
    distill(net, SoftTargetDataset(stores.inputs, store), TRAINING, **options)
    return b"".join(weights.detach().numpy().tobytes() for weights in net.state_dict().values())


_EXPECTED: dict[tuple[str, str], bytes] = {}


def expected_weights(stores: Stores, digest: str) -> bytes:
    """Return the weights of a student of the undamaged store with this digest; trained once."""
    key = stores.name, digest
    if key not in _EXPECTED:
        import tempfile

        from tests.faults.generator.stores import write_tree

        version = next(name for name, known in stores.digests.items() if known == digest)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            write_tree(Path(folder) / "s", stores.trees[version])
            with contextlib.closing(TargetStore(LocalRows(Path(folder) / "s"), where="undamaged")) as store:
                _EXPECTED[key] = trained(stores, store)
    return _EXPECTED[key]


def _as_numbers(listed: Any, dtype: np.dtype[Any]) -> Any:
    # JSON has no −inf: null stands for the log-probability of a class with probability 0.
    array = np.array(listed, dtype=object)
    array[array == None] = -np.inf  # noqa: E711 element by element
    return array.astype(dtype)

"""A trainer in any order of events: read, train, resume, with servers killed, stores replaced, bits flipped, a cache.

The model beside it is plain Python: which version lies in the server's folder, whether it was damaged since, and which
version the client opened. What the client returns must be what the version with its digest was made of; while the
folder holds that version undamaged and the server runs, nothing may be refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from softlabels.errors import SoftLabelsError, StoreChangedError
from softlabels.order import EpochConfig
from softlabels.target_store import TargetStore
from softlabels_client import RetryPolicy, SoftTargetDataset, SoftTargetStream, data_loader, stream_loader
from softlabels_client.cache import CachedRows
from softlabels_client.http.http_rows import HttpRows
from softlabels_client.training.checkpoint import CheckpointFolder
from tests.faults.generator.damage import OF_BYTES, changed
from tests.faults.generator.judging import WrongError, judge_batch
from tests.faults.generator.readers import expected_weights, trained
from tests.faults.generator.stores import VERSIONS, Model, Stores, write_tree

SERVER_START_S = 60.0
SEED, BATCH_SIZE = 5, 8
RETRY = RetryPolicy(attempts=8)
"""More than a server needs to start again."""

SEEDS = st.integers(0, 2**32 - 1)


class FixedServer:
    """`softlabels serve` on one port, to be killed and started again."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("wb") as output:
            command = [sys.executable, "-m", "softlabels", "serve", str(self._folder), "--port", str(self.port)]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        give_up = time.monotonic() + SERVER_START_S
        while time.monotonic() < give_up and self._process.poll() is None:
            if re.search(r" at (http://\S+)", self._log.read_text()):
                return
            time.sleep(0.02)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()}")

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def refuse_death(self) -> None:
        """Raise if it ended by itself."""
        assert self._process is not None
        assert self._process.poll() is None, f"the server died with {self._process.returncode}"


class TrainerMachine(RuleBasedStateMachine):
    """One server over one store, one client. Class attributes are set by `machine_of`."""

    stores: Stores
    server: FixedServer
    root: Path
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(dir=self.folder))
        self.cache = self.place / "cache"
        self.store: TargetStore | None = None
        self.saved: tuple[dict[str, Any], str, list[Any]] | None = None
        self.loads = 0
        self.put("current")
        self.server.refuse_death()
        self.open(cached=True)

    def teardown(self) -> None:
        """Close the client and remove its files."""
        if self.store is not None:
            self.store.close()
        self.server.refuse_death()
        shutil.rmtree(self.place)

    # What happens to the server and its folder

    def put(self, version: str, *, in_place: bool = False) -> None:
        """Put a version in the place of what lies there: by renaming folders, or by writing over its files."""
        tree = self.stores.trees[version]
        if in_place:
            # Files are replaced one by one, as rsync does it; the manifest comes last.
            for path in sorted(tree, key=lambda name: (name == "manifest.json", name)):
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                partial = self.root / f"{path}.partial"
                partial.write_bytes(tree[path])
                os.replace(partial, self.root / path)
        else:
            new, old = self.root.with_name(".new"), self.root.with_name(".old")
            write_tree(new, tree)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.root, old)
            os.rename(new, self.root)
            shutil.rmtree(old, ignore_errors=True)
        self.version, self.damaged = version, False

    @rule(version=st.sampled_from(sorted(VERSIONS)), in_place=st.booleans())
    def replace(self, version: str, in_place: bool) -> None:
        """Another version, or another run of the same plan."""
        self.put(version, in_place=in_place)

    @rule(seed=SEEDS, operation=st.sampled_from(sorted(OF_BYTES)))
    def damage(self, seed: int, operation: str) -> None:
        """Change bytes of one of the store's files, under the server that may have it open."""
        rng = np.random.default_rng(seed)
        paths = sorted(path for path in self.root.rglob("*") if path.is_file() and "locks" not in path.parts)
        path = paths[int(rng.integers(len(paths)))]
        with path.open("r+b") as file:
            raw = changed(rng, operation, path.read_bytes(), 24)
            file.write(raw)
            file.truncate(len(raw))
        self.damaged = True

    @rule()
    def kill(self) -> None:
        """Kill the server and start it again."""
        self.server.kill()
        self.server.start()

    @precondition(lambda self: self.damaged)
    @rule()
    def mend(self) -> None:
        """Put the undamaged files back."""
        self.put(self.version)
        self.kill()

    @rule(seed=SEEDS, operation=st.sampled_from(sorted(OF_BYTES)))
    def damage_the_cache(self, seed: int, operation: str) -> None:
        """Change bytes of one of the cache's files, which the client has open."""
        rng = np.random.default_rng(seed)
        paths = sorted(path for path in self.cache.rglob("*") if path.is_file())
        if paths:
            path = paths[int(rng.integers(len(paths)))]
            with path.open("r+b") as file:
                raw = changed(rng, operation, path.read_bytes(), 24)
                file.write(raw)
                file.truncate(len(raw))

    # What the client does

    @rule(cached=st.booleans())
    def open(self, cached: bool) -> None:
        """Open the store anew, with a cache or without."""
        if self.store is not None:
            self.store.close()
            self.store = None
        with self.refusals(opened=self.digest_there()):
            rows: Any = HttpRows(f"http://127.0.0.1:{self.server.port}/s", retry=RETRY)
            rows = CachedRows(rows, folder=self.cache) if cached else rows
            self.store = TargetStore(rows, where="machine")
            assert self.store.digest in self.stores.models, "described under a digest that no store has"

    @precondition(lambda self: self.store is not None)
    @rule(seed=SEEDS)
    def batch(self, seed: int) -> None:
        """Ask for any samples."""
        rng = np.random.default_rng(seed)
        store, model = self.opened()
        ids = [model.ids[i] for i in rng.integers(len(model.ids), size=int(rng.integers(1, 30)))]
        with self.refusals():
            found = store.batch(ids, fingerprints=True)
            if found.ids.tolist() != ids:
                raise WrongError("rows of other samples than asked for")
            judge_batch(found, model, None)

    @precondition(lambda self: self.store is not None)
    @rule(
        epoch=st.integers(0, 3),
        rank=st.integers(0, 2),
        world_size=st.integers(1, 3),
        event=st.sampled_from(["nothing", "nothing", "kill", "current", "rival", "older"]),
        after=st.integers(0, 3),
    )
    def epoch(self, epoch: int, rank: int, world_size: int, event: str, after: int) -> None:
        """Read an epoch in which the server may be killed, or the store replaced: its samples, in its order, once."""
        store, model = self.opened()
        config = EpochConfig(
            seed=SEED, epoch=epoch, batch_size=BATCH_SIZE, rank=min(rank, world_size - 1), world_size=world_size
        )
        expected = [[model.ids[i] for i in step.positions] for step in config.batches(store.manifest, store.digest)]
        with self.refusals(event), contextlib.closing(store.epoch(config, fingerprints=True)) as steps:
            found = []
            for number, step in enumerate(steps):
                judge_batch(step, model, None)
                found.append(step.ids.tolist())
                if number == after:
                    self.happen(event)
            if found != expected:
                raise WrongError("an epoch that ended well has other samples, or another order")

    def happen(self, event: str) -> None:
        """Do what happens in the middle of an epoch."""
        if event == "kill":
            self.server.kill()
            threading.Timer(0.2, self.server.start).start()
        elif event != "nothing":
            self.put(event)

    @precondition(lambda self: self.store is not None)
    @rule(streams=st.booleans(), batches=st.integers(1, 8), epoch=st.integers(0, 2))
    def train_and_save(self, streams: bool, batches: int, epoch: int) -> None:
        """Take some batches of an epoch, and keep the loader's state and what was taken."""
        with self.refusals():
            loader = self.loader(streams)
            loader.set_epoch(epoch)
            taken: list[Any] = []
            with contextlib.closing(iter(loader)) as steps:
                for _, step in zip(range(batches), steps, strict=False):
                    taken += self.judged(step)
            self.saved = loader.state_dict(), self.opened()[0].digest, taken

    @precondition(lambda self: self.store is not None and self.saved is not None)
    @rule(streams=st.booleans())
    def resume(self, streams: bool) -> None:
        """Take the rest of the epoch: every sample once, or the state of another version is refused."""
        assert self.saved is not None
        state, digest, taken = self.saved
        store, model = self.opened()
        with self.refusals("resume" if digest != store.digest else "nothing"):
            loader = self.loader(streams="order" in state["data"])
            try:
                loader.load_state_dict(state)
            except StoreChangedError:
                assert digest != store.digest
                raise
            assert digest == store.digest, "a state of another version was accepted"
            if len(taken) == len(model.ids):
                return
            loader.set_epoch(state["epoch"])
            rest = [sample for step in loader for sample in self.judged(step)]
            if sorted([*taken, *rest]) != sorted(model.ids):
                raise WrongError("a resumed epoch has samples twice, or not at all")

    @precondition(lambda self: self.store is not None)
    @rule(breaks=st.booleans())
    def distill(self, breaks: bool) -> None:
        """Train a student with checkpoints, broken off or to its end; the folder may hold another version's."""
        store, _ = self.opened()
        folder = self.place / "checkpoints"
        evaluated = 0

        def evaluate(net: Any) -> float:
            nonlocal evaluated
            evaluated += 1
            if breaks:
                raise BrokenOffError
            return 0.0

        held = getattr(self, "trained_digest", None)
        with self.refusals("resume" if held not in (None, store.digest) else "nothing"):
            try:
                found = trained(
                    self.stores,
                    store,
                    checkpoints=CheckpointFolder(folder, every=2, resume=True),
                    evaluate=evaluate,
                )
            except BrokenOffError:
                self.trained_digest = store.digest
                return
            assert held in (None, store.digest), "checkpoints of another version were resumed"
            self.trained_digest = store.digest
            if found != expected_weights(self.stores, store.digest):
                raise WrongError("the student learned something else")
        if held not in (None, store.digest) or (folder.exists() and not any(folder.iterdir())):
            shutil.rmtree(folder, ignore_errors=True)
            self.trained_digest = None

    def loader(self, streams: bool) -> Any:
        """A loader of one kind or the other over the open store."""
        store, _ = self.opened()
        if streams:
            return stream_loader(SoftTargetStream(store, self.stores.inputs, batch_size=BATCH_SIZE, seed=SEED))
        return data_loader(SoftTargetDataset(self.stores.inputs, store), batch_size=BATCH_SIZE, seed=SEED)

    def judged(self, step: Any) -> list[Any]:
        """The ids of a batch whose targets are those of its samples."""
        model, ids = self.opened()[1], step.ids.tolist()
        expected = model.decoded(ids, None).astype(np.float32)
        if not np.array_equal(step.targets.logits_BC.numpy(), expected):
            raise WrongError("a batch has other targets than its samples'")
        return list(ids)

    def opened(self) -> tuple[TargetStore, Model]:
        """The open store and the model of its version."""
        assert self.store is not None
        return self.store, self.stores.models[self.store.digest]

    def digest_there(self) -> str:
        """Digest of the version that lies in the server's folder."""
        return self.stores.digests[self.version]

    @contextlib.contextmanager
    def refusals(self, event: str = "nothing", opened: str | None = None) -> Iterator[None]:
        """Let refusals pass where the model has a reason for one."""
        digest = opened or self.opened()[0].digest
        reason = self.damaged or digest != self.digest_there() or event == "resume"
        try:
            yield
        except SoftLabelsError as error:
            if not (reason or self.damaged or digest != self.digest_there()):
                raise WrongError(f"refused for no reason: {type(error).__name__}: {error}") from error
            only_version_differs = not self.damaged and event != "resume" and opened is None
            if only_version_differs and not isinstance(error, StoreChangedError):
                raise WrongError(f"the version changed, and the client says {type(error).__name__}: {error}") from error


class BrokenOffError(Exception):
    """The training ended here."""


def machine_of(stores: Stores, server: FixedServer, root: Path, folder: Path) -> Callable[[], TrainerMachine]:
    """Return the machine over a server's folder."""
    names = {"stores": stores, "server": server, "root": root, "folder": folder}
    machine: Callable[[], TrainerMachine] = type("Machine", (TrainerMachine,), names)
    return machine


def run_machine(kind: str, folder: Path, *, examples: int, steps: int) -> None:
    """Run the machine over one kind of store, with a server of its own."""
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    stores = Stores.make(kind, folder / "made")
    served = folder / "served"
    served.mkdir()
    write_tree(served / "s", stores.trees["current"])
    server = FixedServer(served, folder / "log")
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine_of(stores, server, served / "s", folder),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        server.kill()

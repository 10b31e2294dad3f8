"""Background check of the served stores (`softlabels serve --scrub 24h`): every file read again, at a bounded rate.

Rows are verified when they are first read, and compared with their sums when they are sent; what nobody asks for is
seen by neither. The scrubber compares every file with the SHA-256 in its receipt or manifest. A shard that is damaged
is refused by name until it is read intact again, or the store is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from softlabels.errors import ManifestError, SoftLabelsError, UnknownStoreError
from softlabels.manifest import Manifest
from softlabels.store.ledger import Ledger
from softlabels.store.safe_open import OpenFolder, safe_open
from softlabels.store.store_documents import load_manifest
from softlabels_server.catalog import Damage, ScrubState, Signature, StoreFolder
from softlabels_server.settings import Settings

BLOCK_BYTES = 1 << 20
"""Read at once: hashed in less than a millisecond, without the interpreter lock."""

SHARE_OF_INTERVAL = 0.9
"""A round is paced to end a little early, since the disk is not always as fast as the pace asks."""

REPORT_S = 5.0
"""How often progress is reported; damage is at once."""

_log = logging.getLogger(__name__)

Report = Callable[[ScrubState], None]


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file to check; `shard` is None for a file that all rows depend on."""

    path: str
    sha256: str
    size: int
    shard: int | None = None


@dataclass(frozen=True, kw_only=True)
class _OpenStore:
    """A version of a store, held open, so that its files are not taken for those of a later one."""

    name: str
    signature: Signature
    folder: OpenFolder
    manifest: Manifest


class Scrubber:
    """Reads the files of all served stores, once an interval.

    Args:
        stores: the stores.
        interval_s: from the start of one round to that of the next, seconds; the rate follows from it.
        report: called in the scrubber's thread with its state, after each damage, each round and some seconds.
    """

    def __init__(self, stores: StoreFolder, interval_s: float, report: Report) -> None:
        self._stores, self._interval_s, self._report = stores, interval_s, report
        self._state = ScrubState(interval_s=interval_s)
        self._damage: dict[tuple[str, Signature, int | None], Damage] = {}
        self._found = dict(self._damage)  # in the round under way
        self._stopped = threading.Event()
        self._reported_s = 0.0
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def run(self) -> None:
        """Check round after round until `stop`."""
        while not self._stopped.is_set():
            began_s = time.monotonic()
            try:
                self.check_all(began_s)
            except (SoftLabelsError, OSError) as error:  # the folder of the stores cannot be listed, for example
                _log.error("scrub: the round ended early: %s", error)
            self._stopped.wait(began_s + self._interval_s - time.monotonic())

    def stop(self) -> None:
        """End `run` after the block that is being read."""
        self._stopped.set()

    def check_all(self, began_s: float) -> None:
        """Check every file of every store once; `began_s` is the time from which on the pace is counted."""
        self._found = {}
        files = [(store, file) for store in self._open_stores() for file in self._files(store)]
        self._update(read_bytes=0, total_bytes=sum(file.size for _, file in files))
        for store, file in files:
            fault = self._fault(store, file, began_s)
            # Read again before it is called damage: it may have been replaced, or the store repaired, in that moment.
            if fault is not None and self._is_served(store) and (fault := self._fault(store, file)) is not None:
                self._note(store, file.shard, f"{file.path} {fault}")
            if self._stopped.is_set():
                return
        for key in self._damage.keys() - self._found.keys():
            _log.warning("scrub: %s is intact again, or replaced", _name_of(self._damage.pop(key)))
        self._update(rounds=self._state.rounds + 1, finished_s=time.time())

    def _open_stores(self) -> Iterator[_OpenStore]:
        for name in self._stores.names():
            signature, path = self._stores.version_of(name)
            if signature is None:
                continue  # removed since its name was read
            try:
                folder = OpenFolder(path)
                yield _OpenStore(name=name, signature=signature, folder=folder, manifest=load_manifest(folder))
            except (UnknownStoreError, FileNotFoundError):
                continue
            except (SoftLabelsError, OSError) as error:
                _log.error("scrub: store %r cannot be opened: %s", name, error)

    def _files(self, store: _OpenStore) -> Iterator[_File]:
        manifest, ledger = store.manifest, Ledger(store.folder, store.manifest)
        for path, digest in manifest.metadata_sha256.items():
            with contextlib.suppress(OSError):  # told when it is read
                size = os.stat(path, dir_fd=store.folder.descriptor).st_size
                yield _File(path=path, sha256=digest, size=size)
        for shard in range(manifest.shards.count) if manifest.finished else ledger.committed():
            try:
                receipt = ledger.read(shard)
                if receipt is None and manifest.finished:
                    raise ManifestError(f"{ledger.path_of(shard)} is missing from a finished store")
            except (SoftLabelsError, OSError) as error:
                if self._is_served(store):
                    self._note(store, shard, str(error))
                continue
            if receipt is not None:
                for path, record in receipt.files.items():
                    yield _File(path=path, sha256=record.sha256, size=record.size, shard=shard)

    def _fault(self, store: _OpenStore, file: _File, began_s: float | None = None) -> str | None:
        """Read a file, at the pace of the round that began at `began_s`; return what is wrong with it, or None."""
        digest, offset = hashlib.sha256(), 0
        try:
            descriptor = safe_open(store.folder, file.path)
            try:
                _drop_from_cache(descriptor)  # what no reader has mapped: it is the disk that is to be read
                while not self._stopped.is_set():
                    if began_s is not None and offset < file.size:
                        self._wait_for_turn(began_s)
                    count = os.preadv(descriptor, [self._buffer], offset)
                    if not count:
                        break
                    digest.update(self._buffer[:count])
                    offset += count
                    if began_s is not None:
                        self._state = replace(self._state, read_bytes=self._state.read_bytes + count)
                _drop_from_cache(descriptor)  # or it would displace rows that are served
            finally:
                os.close(descriptor)
        except (ManifestError, OSError) as error:
            return f"cannot be read ({error})"
        is_sound = digest.hexdigest() == file.sha256 or self._stopped.is_set()
        return None if is_sound else "is not what was written: its SHA-256 is another"

    def _wait_for_turn(self, began_s: float) -> None:
        """Wait until as much may have been read as was; report progress."""
        if time.monotonic() - self._reported_s > REPORT_S:
            self._update()
        share = self._state.read_bytes / max(1, self._state.total_bytes)
        self._stopped.wait(max(0.0, began_s + SHARE_OF_INTERVAL * self._interval_s * share - time.monotonic()))

    def _is_served(self, store: _OpenStore) -> bool:
        """Return whether this version is still the one that is served."""
        with contextlib.suppress(SoftLabelsError):
            return self._stores.version_of(store.name)[0] == store.signature
        return False

    def _note(self, store: _OpenStore, shard: int | None, what: str) -> None:
        key = store.name, store.signature, shard
        damage = Damage(store=store.name, signature=store.signature, shard=shard, message="")
        advice = "run `softlabels verify --all`, then `softlabels repair` and `softlabels resume`"
        message = f"{_name_of(damage)} is refused since the background check found it damaged: {what}; {advice}"
        if key not in self._damage:
            _log.error("scrub: %s", message)
        self._damage[key] = self._found[key] = replace(damage, message=message)
        self._update()

    def _update(self, **changed: object) -> None:
        self._state = replace(self._state, damage=tuple(self._damage.values()), **changed)
        self._reported_s = time.monotonic()
        self._report(self._state)


@contextlib.contextmanager
def scrubbing(root: Path, settings: Settings, report: Report) -> Iterator[None]:
    """Run a scrubber in a thread inside this context, if the settings ask for one."""
    if settings.scrub_interval_s is None:
        yield
        return
    scrubber = Scrubber(StoreFolder(root), settings.scrub_interval_s, report)
    thread = threading.Thread(target=scrubber.run, name="scrub", daemon=True)
    thread.start()
    try:
        yield
    finally:
        scrubber.stop()
        thread.join()


def _name_of(damage: Damage) -> str:
    store = f"store {damage.store!r}"
    return store if damage.shard is None else f"shard {damage.shard} of {store}"


def _drop_from_cache(descriptor: int) -> None:
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

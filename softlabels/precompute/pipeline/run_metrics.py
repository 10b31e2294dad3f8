"""How far is a long run, for programs? One JSON line a committed shard, added to a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from softlabels.audit import Audit
from softlabels.manifest import Manifest
from softlabels.precompute.pipeline.device import Lanes
from softlabels.precompute.pipeline.shard_loading import ShardWork


class Metrics:
    """A file of figures, one line whenever this run has committed a shard, written out at once.

    Each line has `time` (seconds since 1970), `store`, `shards` and `rows` that this run committed, `rows_done` and
    `rows_total` of the store (other processes' rows as of this run's beginning), `rows_per_s`, `left_s` (null before
    the first row), `kl_nats` (mean by temperature, of this run's rows so far) and `idle_share` (of the time in which no
    teacher ran).

    Args:
        path: added to, so that a resumed run goes on in the same file.
        plan: of the store.
        done: rows that are there already.
        lanes: of the device.
    """

    def __init__(self, path: Path, plan: Manifest, *, done: int, lanes: Lanes) -> None:
        self._path, self._plan, self._lanes = path, plan, lanes
        self._done_before, self._rows, self._shards = done, 0, 0
        self._audit = Audit()
        self._began_s = time.monotonic()

    def __enter__(self) -> Metrics:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def committed(self, work: ShardWork, audit: Audit) -> None:
        """Write a line: this shard is there now."""
        self._shards += 1
        self._rows += len(work.rows)
        self._audit.merge(audit)
        self._file.write(json.dumps(self._line()) + "\n")
        self._file.flush()

    def _line(self) -> dict[str, Any]:
        rate = self._rows / max(1e-9, time.monotonic() - self._began_s)
        done = self._done_before + self._rows
        kl = self._audit.summary()["kl_nats"]
        return {
            "time": time.time(),
            "store": self._plan.name,
            "shards": self._shards,
            "rows": self._rows,
            "rows_done": done,
            "rows_total": self._plan.rows,
            "rows_per_s": rate,
            "left_s": (self._plan.rows - done) / rate,
            "kl_nats": {temperature: figures["mean"] for temperature, figures in kl.items()},
            "idle_share": self._lanes.idle_share(),
        }

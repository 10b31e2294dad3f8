"""`--metrics FILE`: a JSON line for every shard, added to what stands there."""

from __future__ import annotations

import json
from pathlib import Path

from softlabels.cli import main
from softlabels.precompute import load_job

KEYS = {"time", "store", "shards", "rows", "rows_done", "rows_total", "rows_per_s", "left_s", "kl_nats", "idle_share"}


class TestMetrics:
    def test_a_line_for_every_shard(self, job_folder: Path) -> None:
        """How much is done, how fast, how long it takes yet, the error so far, and how idle the device was."""
        text = (job_folder / "job.toml").read_text().replace('"f32"', '"f16"')
        (job_folder / "job.toml").write_text(text)
        file = job_folder / "figures" / "run.jsonl"
        assert main(["precompute", str(job_folder / "job.toml"), "--metrics", str(file)]) == 0
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["rows_done"] for line in lines] == [256, 512, 768, 1000]
        assert all(set(line) == KEYS for line in lines)
        last = lines[-1]
        assert (last["shards"], last["rows"], last["rows_total"], last["left_s"]) == (4, 1000, 1000, 0.0)
        assert last["rows_per_s"] > 0
        assert 0 < last["kl_nats"]["4"] < 1e-4
        assert 0 <= last["idle_share"] <= 1

    def test_a_resumed_run_goes_on_in_the_same_file(self, job_folder: Path) -> None:
        """Rows that are there already count as done, not as done by this run."""
        job, file = load_job(job_folder / "job.toml"), job_folder / "run.jsonl"
        assert main(["precompute", str(job_folder / "job.toml"), "--metrics", str(file)]) == 0
        (job.store_path / "ledger" / "00000002.json").unlink()
        (job.store_path / "manifest.json").unlink()
        assert main(["resume", str(job.store_path), "--metrics", str(file)]) == 0
        last = json.loads(file.read_text().splitlines()[-1])
        assert len(file.read_text().splitlines()) == 5
        assert (last["rows"], last["rows_done"]) == (256, 1000)

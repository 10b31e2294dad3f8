"""The shard pipeline: the same bytes as a serial computation, and an orderly end whatever fails."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabels.audit import Audit
from softlabels.errors import JobError, ShardClaimedError, SoftLabelsError, TeacherError
from softlabels.manifest import IdSpec
from softlabels.precompute import Job, load_job, precompute, resume, teacher_from_module
from softlabels.precompute.job import RunTable, StoreTable, TargetsTable, TeacherTable, TransferSetTable
from softlabels.precompute.pipeline.device_step import pack_figures, unpack_figures
from softlabels.precompute.pipeline.inference import audit_temperatures
from softlabels.precompute.pipeline.shard_loading import ClaimedShard
from softlabels.precompute.planning.prepared_job import plan_job, prepare_job
from softlabels.progress import QUIET, Progress
from softlabels.store import LocalRows, StoreWriter
from softlabels.store.chunks import shard_rows
from softlabels.transfer_set import ArrayTransferSet, Samples

SAMPLES, SHARD, FEATURES, CLASSES = 600, 128, 6, 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


ASKED = 3
"""Forward passes before the first shard: a few samples twice and one of them alone, for the plan."""


class Net(nn.Module):
    """A small network that records batch sizes, runs a callback at a batch, and rejects more than `room` inputs."""

    def __init__(
        self, seed: int = 0, *, at: int | None = None, do: Callable[[], None] | None = None, room: int = 1 << 30
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES, generator=generator))
        self.batches: list[int] = []
        self.at, self.do, self.room = at, do, room

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits; what is to be done at batch number `at` is done first."""
        self.batches.append(len(inputs))
        if self.do is not None and self.at is not None and len(self.batches) > self.at:
            self.do()
        if len(inputs) > self.room:
            raise torch.OutOfMemoryError(f"{len(inputs)} inputs do not fit")
        return torch.tanh(inputs) @ self.weight.T


def transfer_set(samples: int = SAMPLES) -> ArrayTransferSet:
    """A labelled one."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, FEATURES)).astype(np.float32)
    return ArrayTransferSet("blobs", inputs, labels=rng.integers(0, CLASSES, samples))


def job(folder: Path, **run: Any) -> Job:
    """A job of this process's own teachers."""
    return Job(
        store=StoreTable(path="store", rows_per_shard=SHARD, rows_per_chunk=64),
        transfer_set=TransferSetTable(source="here:blobs"),
        targets=TargetsTable(temperature=4.0, encoding="f16"),
        teachers=(TeacherTable(model="here:Net"),),
        run=RunTable(**{"batch_size": 50, **run}),
        base=folder,
    )


def compute(job: Job, *models: nn.Module, data: Any = None, show: Any = None) -> None:
    """Run the job with these models."""
    teachers = [teacher_from_module(model, name=f"t{n}") for n, model in enumerate(models)]
    shown = {} if show is None else {"show": show}
    precompute(job, transfer_set=data or transfer_set(), teachers=teachers, **shown)


def tree_digest(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a store that belongs to its version."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.parent.name not in ("locks", "staging"))
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.name != "job.json"}


def kept_job(job: Job) -> dict[str, Any]:
    """The job as its store keeps it."""
    document: dict[str, Any] = json.loads((job.store_path / "job.json").read_text())["body"]
    return document


def free_shards(job: Job) -> list[int]:
    """Return the shards that are not claimed."""
    writer, free = StoreWriter.resume(job.store_path), []
    for shard in range(writer.plan.shards.count):
        with contextlib.suppress(ShardClaimedError), writer.claim(shard):
            free.append(shard)
    return free


class TestSameBytes:
    @pytest.mark.parametrize("encoding", ["f32", "q8", "topk3"])
    def test_as_a_serial_computation(self, tmp_path: Path, encoding: str) -> None:
        """A store computed without a pipeline, by the same maths in the same batches, is the same, file by file."""
        ours = job(tmp_path)
        ours = replace(ours, targets=replace(ours.targets, encoding=encoding))
        serial = replace(ours, store=replace(ours.store, path="serial", name="store"))
        models = [Net(0), Net(1)]
        compute(ours, *models)
        teachers = [teacher_from_module(model, name=f"t{n}") for n, model in enumerate(models)]
        planned = plan_job(prepare_job(serial, transfer_set=transfer_set(), teachers=teachers))
        ensemble, plan, coder = planned.prepared.ensemble, planned.plan, planned.encoding
        writer = StoreWriter.create(serial.store_path, plan, encoding=coder)
        for shard in writer.missing_shards():
            temperatures = audit_temperatures(plan)
            audit, parts = Audit(temperatures), []
            batches = list(ensemble.rows.batches(shard_rows(plan, shard), 50))
            for batch in batches:
                exact = ensemble.rows_to_store(ensemble.run(batch), plan)
                encoded = coder.encode_torch(exact, keys_B=batch.keys)
                packed = pack_figures(
                    exact,
                    coder.decode_torch(encoded),
                    temperatures=temperatures,
                    captured=plan.temperature.captured,
                    dropped_mass_B=encoded.get("tail_mass"),
                )
                audit.add_sums(unpack_figures(packed.numpy(), classes=plan.classes, temperatures=temperatures))
                parts.append({name: tensor.numpy() for name, tensor in encoded.items()})
            with writer.claim(shard) as claim:
                claim.commit(
                    encoded={name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
                    ids=np.concatenate([batch.ids for batch in batches]),
                    fingerprints=np.concatenate([b.fingerprints for b in batches if b.fingerprints is not None]),
                    labels=np.concatenate([batch.labels for batch in batches if batch.labels is not None]),
                    audit=audit.to_json(),
                )
        writer.finish()
        assert tree_digest(ours.store_path) == tree_digest(serial.store_path)

    def test_batches_begin_with_each_shard(self, tmp_path: Path) -> None:
        """No batch reaches over a shard's end, so that one shard computed again is computed in the same batches."""
        net = Net()
        compute(job(tmp_path), net)
        again = [13] * 5  # of every shard, before the store is published
        assert net.batches[ASKED:] == [50, 50, 28] * 4 + [50, 38] + again

    def test_the_number_of_loaders_changes_nothing(self, tmp_path: Path) -> None:
        """Loaders that make several batches at once give them in order; also where more are ahead than shards fit."""
        ours = replace(job(tmp_path), store=StoreTable(path="store", rows_per_shard=64, rows_per_chunk=64))
        many = replace(ours, store=replace(ours.store, path="many", name="store"), run=replace(ours.run, loaders=8))
        compute(ours, Net())
        compute(many, Net())
        assert tree_digest(ours.store_path) == tree_digest(many.store_path)

    def test_an_error_of_one_of_many_loaders(self, tmp_path: Path) -> None:
        """It comes out as it is, after the shards before it."""
        ours = job(tmp_path, loaders=3)
        with pytest.raises(OSError, match="cable"):
            compute(ours, Net(), data=Failing(at=2 * SHARD + 60, error=OSError("the cable is out")))
        assert StoreWriter.resume(ours.store_path).missing_shards() == [2, 3, 4]
        assert free_shards(ours) == [0, 1, 2, 3, 4]


class TestOutOfMemory:
    def test_the_batch_is_halved_until_it_fits(self, tmp_path: Path) -> None:
        """Every row is there and right, each shard in batches of one size, and the size is kept with the job."""
        ours, net, notes = job(tmp_path), Net(room=20), Notes()
        compute(ours, net, show=notes.show)
        compute(small := job(tmp_path / "small", batch_size=12), Net())
        with contextlib.closing(LocalRows(ours.store_path)) as a, contextlib.closing(LocalRows(small.store_path)) as b:
            everyone = np.arange(SAMPLES)
            np.testing.assert_array_equal(*(rows.fetch(everyone, ("targets",))["targets"] for rows in (a, b)))
        assert kept_job(ours)["found"] == {"batch_size": 12}
        again = [12, 1] * 5  # rows of every shard, before the store is published
        assert net.batches[-15:] == [12, 12, 12, 12, 4, *again]
        assert "batches of 12" in notes.last
        assert notes.advanced == SAMPLES

    def test_a_resumed_run_begins_with_the_size_that_fits(self, tmp_path: Path) -> None:
        """The search is not repeated; a job file that asks for another size gets that one."""
        ours, net = job(tmp_path), Net(room=20)
        with pytest.raises(ZeroDivisionError):
            compute(ours, net, data=Failing(at=300, error=ZeroDivisionError("broken")))
        again, changed = Net(), Net()
        compute(ours, again)
        assert max(again.batches[ASKED:]) == 12
        other = job(tmp_path / "other")
        with pytest.raises(ZeroDivisionError):
            compute(other, Net(room=20), data=Failing(at=300, error=ZeroDivisionError("broken")))
        compute(replace(other, run=RunTable(batch_size=30)), changed)
        assert max(changed.batches[ASKED:]) == 30

    def test_an_input_that_does_not_fit_is_an_error(self, tmp_path: Path) -> None:
        """With words on what to do, and without an endless loop."""
        net = Net(room=16)
        ours = job(tmp_path)
        with pytest.raises(TeacherError, match="single input"):
            compute(ours, net, data=Shrinking(net))
        assert free_shards(ours) == [0, 1, 2, 3, 4]


class Notes:
    """Progress that records its calls."""

    def __init__(self) -> None:
        self.last, self.advanced = "", 0

    @contextlib.contextmanager
    def show(self, total: int, description: str, unit: str, *, done: int = 0) -> Iterator[Progress]:
        """As `track`."""
        self.advanced = done
        yield self

    def advance(self, amount: int = 1) -> None:
        """So many more."""
        self.advanced += amount

    def note(self, text: str) -> None:
        """What is shown."""
        self.last = text


class Failing:
    """A transfer set that breaks off at a sample of a batch; single samples are read for the plan, before the run."""

    name = "blobs"

    def __init__(self, *, at: int, error: BaseException) -> None:
        self._inner, self._at, self._error = transfer_set(), at, error

    def __len__(self) -> int:
        return len(self._inner)

    def id_spec(self) -> IdSpec:
        """Ids count up from 0."""
        return IdSpec(kind="int", dense_start=0)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples, up to one of them."""
        if len(positions) > 1 and int(positions.max()) >= self._at:
            raise self._error
        return self._inner.take(positions)


class Shrinking(Failing):
    """A transfer set whose device has no memory left once the first rows were asked about."""

    def __init__(self, net: Net) -> None:
        super().__init__(at=SAMPLES, error=AssertionError())
        self._net = net

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples; from the second call on there is no room for any."""
        if self._net.batches:
            self._net.room = 0
        return super().take(positions)


class TestFaults:
    def test_a_transfer_set_that_breaks(self, tmp_path: Path) -> None:
        """Its own error comes out, shards before it are committed, no claim stays, and the job can be resumed."""
        ours = job(tmp_path)
        with pytest.raises(OSError, match="cable"):
            compute(ours, Net(), data=Failing(at=2 * SHARD + 60, error=OSError("the cable is out")))
        assert StoreWriter.resume(ours.store_path).missing_shards() == [2, 3, 4]
        assert free_shards(ours) == [0, 1, 2, 3, 4]
        compute(ours, Net())
        compute(undisturbed := job(tmp_path / "undisturbed"), Net())
        assert tree_digest(ours.store_path) == tree_digest(undisturbed.store_path)

    def test_a_teacher_that_fails_at_a_shards_first_batch(self, tmp_path: Path) -> None:
        """The shard before it, whose last batch was still on the device, is committed."""

        def fail() -> None:
            raise ValueError("a screw is loose")

        ours = job(tmp_path)
        with pytest.raises(TeacherError, match="a screw is loose"):
            compute(ours, Net(at=ASKED + 6, do=fail))
        assert StoreWriter.resume(ours.store_path).missing_shards() == [2, 3, 4]
        assert free_shards(ours) == [0, 1, 2, 3, 4]

    def test_a_writer_that_fails(self, tmp_path: Path) -> None:
        """A file that cannot be put in its place stops the other stages too, which may be waiting for the writer."""
        ours = job(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            compute(ours, Net(at=ASKED + 2, do=_interrupt))
        receipt = ours.store_path / "ledger" / "00000001.json"
        (receipt / "in the way").mkdir(parents=True)
        with pytest.raises((OSError, SoftLabelsError)):
            compute(ours, Net())
        (receipt / "in the way").rmdir()
        receipt.rmdir()
        assert free_shards(ours) == [0, 1, 2, 3, 4]
        compute(ours, Net())
        assert (ours.store_path / "manifest.json").is_file()

    def test_ctrl_c_in_the_middle(self, tmp_path: Path) -> None:
        """Committed shards are kept, no shard stays held, no thread stays behind; resumed, the store is the same."""
        ours, before = job(tmp_path), threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            compute(ours, Net(at=ASKED + 8, do=_interrupt))
        assert threading.active_count() == before
        missing = StoreWriter.resume(ours.store_path).missing_shards()
        assert {3, 4} <= set(missing)
        assert free_shards(ours) == [0, 1, 2, 3, 4]
        compute(ours, Net())
        compute(undisturbed := job(tmp_path / "undisturbed"), Net())
        assert tree_digest(ours.store_path) == tree_digest(undisturbed.store_path)

    def test_a_shard_claimed_by_another_process_is_skipped(self, tmp_path: Path) -> None:
        """The rest is computed; the other process publishes the store."""
        ours, notes = job(tmp_path), Notes()
        with pytest.raises(KeyboardInterrupt):
            compute(ours, Net(at=ASKED, do=_interrupt))
        with StoreWriter.resume(ours.store_path).claim(1):
            compute(ours, Net(), show=notes.show)
        assert StoreWriter.resume(ours.store_path).missing_shards() == [1]
        assert notes.last == "other processes work on this store too"


def _interrupt() -> None:
    raise KeyboardInterrupt


class TestBatchSize:
    def test_it_is_found_kept_and_used_again(self, tmp_path: Path) -> None:
        """The run, and every later one of this store, takes the size that was found on the first."""
        ours, net = job(tmp_path, batch_size="auto"), Net()
        with pytest.raises(ZeroDivisionError):
            compute(ours, net, data=Failing(at=300, error=ZeroDivisionError("broken")))
        found = kept_job(ours)["found"]["batch_size"]
        assert found in {1, 2, 4, 8, 16, 32, 64, 128}
        again = Net()
        compute(ours, again)
        assert max(again.batches[ASKED:]) == found
        assert kept_job(ours)["run"]["batch_size"] == "auto"

    def test_a_larger_batch_is_taken_where_it_is_faster(self, tmp_path: Path) -> None:
        """A pass of this network costs the same for one input as for a hundred."""
        ours = job(tmp_path, batch_size="auto")
        compute(ours, Net(at=0, do=lambda: time.sleep(0.01)))
        assert kept_job(ours)["found"]["batch_size"] >= 64

    def test_what_does_not_fit_is_not_taken(self, tmp_path: Path) -> None:
        """Trying a size that is too large for the device ends the search, not the run."""
        ours, net = job(tmp_path, batch_size="auto"), Net(room=16)
        compute(ours, net)
        assert kept_job(ours)["found"]["batch_size"] <= 16

    def test_a_limit_that_nothing_meets(self, tmp_path: Path) -> None:
        """Said before the run, with the setting's name."""
        with pytest.raises(JobError, match="memory_limit_gib"):
            compute(job(tmp_path, batch_size="auto", memory_limit_gib=0.001), Net())

    def test_resume_reads_a_job_with_findings(self, job_folder: Path) -> None:
        """`softlabels resume` takes what was found from the store's own job file."""
        text = (job_folder / "job.toml").read_text().replace("batch_size = 100", 'batch_size = "auto"')
        (job_folder / "job.toml").write_text(text)
        ours = load_job(job_folder / "job.toml")
        precompute(ours)
        assert resume(ours.store_path).finished
        assert "found" in kept_job(ours)


class TestMemory:
    def test_written_shards_are_released(self, tmp_path: Path) -> None:
        """However many shards there are, no more than three are held, claims and arrays included."""
        most = 0

        def count() -> None:
            nonlocal most
            most = max(most, sum(type(found) is ClaimedShard for found in gc.get_objects()))

        ours = replace(job(tmp_path), store=StoreTable(path="store", rows_per_shard=16, rows_per_chunk=16))
        compute(ours, Net(at=0, do=count))
        assert StoreWriter.resume(ours.store_path).plan.shards.count == 38
        assert 1 <= most <= 4  # the writer may just be about to drop one


class TestQuietly:
    def test_nothing_is_missing_nothing_is_done(self, tmp_path: Path) -> None:
        """A finished store is not computed again, whatever it is asked with."""
        compute(job(tmp_path), Net())
        net = Net()
        compute(job(tmp_path), net, show=lambda *args, **kwargs: contextlib.nullcontext(QUIET))
        assert len(net.batches) == ASKED

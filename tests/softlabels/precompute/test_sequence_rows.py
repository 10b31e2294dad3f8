"""Stores of sequences, from a job to a trainer: a row a position, whatever the shards, batches and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softlabels
from softlabels.encodings import rng_keys
from softlabels.errors import (
    BadIdsError,
    JobError,
    ShapeMismatchError,
    TeacherError,
    TeacherShapeError,
    TransferSetChangedError,
)
from softlabels.losses import SoftTargetBatch, distillation_loss
from softlabels.precompute import Teacher, precompute, teacher_from_module
from softlabels.precompute.job import Job, SequencesTable, job_from_json
from softlabels.precompute.sequence_rows import SequenceRows
from softlabels.store.verify import verify
from softlabels.transfer_set import ArrayTransferSet, Samples, sequence_fingerprints
from softlabels.transfer_sets.ragged import PADDING, RaggedTransferSet, pad_sequences

VOCABULARY, FEATURES = 300, 8
LENGTHS = (7, 1, 0, 20, 3, 12, 12, 5)


class TinyLanguageModel(torch.nn.Module):
    """Causal: position t depends on the mean of the embeddings up to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(VOCABULARY, FEATURES)
        self.head = torch.nn.Linear(FEATURES, VOCABULARY)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        there_BL = tokens_BL != PADDING
        states = self.embed(tokens_BL.clamp(min=0)) * there_BL[..., None]
        counts = there_BL.cumsum(dim=1).clamp(min=1)
        logits: torch.Tensor = self.head(4 * states.cumsum(dim=1) / counts[..., None])
        return logits


def sequences(seed: int = 0) -> list[np.ndarray]:
    """Token ids of every length above, an empty one among them."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in LENGTHS]


def texts(seed: int = 0) -> RaggedTransferSet:
    """The transfer set, with ids that are not dense."""
    ids = np.array([f"text-{n}" for n in range(len(LENGTHS))])
    return RaggedTransferSet("texts", sequences(seed), ids=ids)


def teacher() -> Teacher:
    """The model above as a teacher."""
    return teacher_from_module(TinyLanguageModel(), name="tiny", gives="positions", head="head")


def job(base: Path, encoding: Any = "f32", *, name: str = "store", **tables: Any) -> Job:
    """A job of sequences; shards of 16 rows cut most samples."""
    return job_from_json(
        {
            "store": {"path": name, "rows_per_shard": 16, "rows_per_chunk": 4},
            "transfer_set": {"source": "x:y"},
            "targets": {"temperature": 1.0, "encoding": encoding},
            "teachers": [{"model": "x:y"}],
            "sequences": {"labels": "next"},
            "run": {"batch_size": 3},
            **tables,
        },
        base=base,
    )


def live(token_ids: np.ndarray) -> np.ndarray:
    """Return the model's logits of one sequence alone, each row's largest 0."""
    if len(token_ids) == 0:
        return np.empty((0, VOCABULARY), np.float32)
    logits = teacher().logits(torch.from_numpy(token_ids[None]))[0].numpy()
    return np.asarray(logits - logits.max(axis=1, keepdims=True))


class TestPrecompute:
    def test_every_position_is_a_row(self, tmp_path: Path) -> None:
        """Row t of a sample is what the teacher says at its position t, though shards and batches cut anywhere."""
        manifest = precompute(job(tmp_path), transfer_set=texts(), teachers=[teacher()])
        assert (manifest.layout.kind, manifest.layout.samples, manifest.rows) == ("sequences", 8, sum(LENGTHS))
        store = softlabels.open(tmp_path / "store")
        for number, token_ids in enumerate(sequences()):
            batch = store.batch([f"text-{number}"], fingerprints=True)
            assert batch.row_offsets is not None
            assert batch.row_offsets.tolist() == [0, len(token_ids)]
            np.testing.assert_allclose(batch.logits(), live(token_ids), atol=1e-5)
            expected = sequence_fingerprints(token_ids[None], np.array([len(token_ids)]))
            np.testing.assert_array_equal(batch.fingerprints, expected)
        assert verify(tmp_path / "store").sound

    def test_the_label_of_a_position_is_the_next_token(self, tmp_path: Path) -> None:
        """The last position has no label."""
        precompute(job(tmp_path), transfer_set=texts(), teachers=[teacher()])
        batch = softlabels.open(tmp_path / "store").batch(["text-3", "text-1"])
        assert batch.labels is not None
        assert batch.labels.tolist() == [*sequences()[3][1:].tolist(), -1, -1]

    @pytest.mark.parametrize("tables", [{"run": {"batch_size": 1}}, {"sequences": {"positions_per_pass": 13}}])
    def test_batches_change_nothing(self, tmp_path: Path, tables: dict[str, Any]) -> None:
        """One sequence a pass, or as many as a few positions allow: the same rows within float32."""
        precompute(job(tmp_path), transfer_set=texts(), teachers=[teacher()])
        other = job(tmp_path, name="other", **tables)
        precompute(other, transfer_set=texts(), teachers=[teacher()])
        ids = [f"text-{n}" for n in range(len(LENGTHS))]
        one, two = (softlabels.open(tmp_path / name).batch(ids).logits() for name in ("store", "other"))
        np.testing.assert_allclose(one, two, atol=1e-5)

    def test_a_run_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        """A second run of the job adds the shard that is missing, and the store is the same as made at once."""
        whole = precompute(job(tmp_path), transfer_set=texts(), teachers=[teacher()])
        again = job(tmp_path, name="again")
        precompute(again, transfer_set=texts(), teachers=[teacher()])
        (tmp_path / "again" / "manifest.json").unlink()
        (receipt,) = (tmp_path / "again" / "ledger").rglob("*1.json")
        receipt.unlink()
        finished = precompute(again, transfer_set=texts(), teachers=[teacher()])
        assert finished.transfer_set.fingerprint == whole.transfer_set.fingerprint
        ids = [f"text-{n}" for n in range(len(LENGTHS))]
        one, two = (softlabels.open(tmp_path / name).batch(ids).logits() for name in ("store", "again"))
        np.testing.assert_array_equal(one, two)

    def test_frames_with_labels_of_their_own(self, tmp_path: Path) -> None:
        """Speech: a label a frame, floats padded with NaN, any model that answers once a frame."""
        rng = np.random.default_rng(1)
        frames = [rng.normal(size=(length, 6)).astype(np.float32) for length in LENGTHS]
        labels = [rng.integers(0, 5, length) for length in LENGTHS]
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 5)
        precompute(
            job(tmp_path, sequences={}),
            transfer_set=RaggedTransferSet("speech", frames, labels=labels),
            teachers=[teacher_from_module(model, name="frames")],
        )
        batch = softlabels.open(tmp_path / "store").batch([5, 3])
        expected = model(torch.from_numpy(np.concatenate([frames[5], frames[3]]))).detach()
        torch.testing.assert_close(torch.from_numpy(batch.p()), expected.softmax(dim=-1), atol=1e-6, rtol=1e-5)
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, np.concatenate([labels[5], labels[3]]))

    def test_equal_lengths_need_nothing_said(self, tmp_path: Path) -> None:
        """An array [N, L] of tokens is a transfer set of sequences as it is, with dense ids."""
        tokens = np.random.default_rng(2).integers(0, VOCABULARY, (6, 10))
        manifest = precompute(job(tmp_path), transfer_set=ArrayTransferSet("a", tokens), teachers=[teacher()])
        assert (manifest.rows, manifest.ids.dense_start) == (60, 0)
        kept = softlabels.open(tmp_path / "store").batch([4]).logits()
        np.testing.assert_allclose(kept, live(tokens[4]), atol=1e-5)


class TestEncodings:
    def test_topk_of_positions(self, tmp_path: Path) -> None:
        """Precomputed, verified, read by spans, and learnt from."""
        precompute(job(tmp_path, "topk40-ghost"), transfer_set=texts(), teachers=[teacher()])
        batch = softlabels.open(tmp_path / "store").batch(["text-3", "text-0"], spans=[(4, 20), (0, 2)])
        targets = SoftTargetBatch.from_soft_targets(batch)
        student = torch.zeros(len(targets.logits_BC), VOCABULARY, requires_grad=True)
        distillation_loss(student, targets, hard_weight=0.1).total.backward()
        assert student.grad is not None
        assert len(student.grad) == 18
        assert student.grad.isfinite().all()

    def test_draws_depend_on_sample_and_position(self, tmp_path: Path) -> None:
        """However a run is cut into batches and shards, a position draws the same tokens; no two positions do."""
        encoding = {"name": "sampled", "head": 2, "draws": 12}
        precompute(job(tmp_path, encoding), transfer_set=texts(), teachers=[teacher()])
        other = job(tmp_path, encoding, name="other", run={"batch_size": 1})
        precompute(other, transfer_set=texts(), teachers=[teacher()])
        # Keys hang on the store's name, so the other store's are its own.
        assert (rng_keys("a", np.array(["t", "t"]), np.array([0, 1])) != rng_keys("a", np.array(["t"]), 1)).any()
        store = softlabels.open(tmp_path / "store")
        assert verify(tmp_path / "store").sound
        constant = store.batch(["text-5"]).p()
        assert len(np.unique(constant.argmax(axis=1))) > 1
        np.testing.assert_allclose(constant.sum(axis=1), 1, atol=1e-5)


class TestHiddenStates:
    @pytest.mark.parametrize("kept_as", ["f32", "f16", "bf16", "q8"])
    def test_they_stand_for_the_live_logits_at_any_temperature(self, tmp_path: Path, kept_as: str) -> None:
        """Eight numbers a row in place of three hundred; the audit's reference are the live logits."""
        encoding = {"name": "hidden", "kept_as": kept_as}
        manifest = precompute(job(tmp_path, encoding), transfer_set=texts(), teachers=[teacher()])
        assert manifest.arrays["targets"].row_shape == (FEATURES,)
        assert manifest.audit is not None
        assert manifest.audit["rows"] == sum(LENGTHS)
        assert manifest.audit["kl_nats"]["1"]["max"] < {"f32": 1e-9, "f16": 1e-4}.get(kept_as, 0.01)
        assert verify(tmp_path / "store").sound
        store = softlabels.open(tmp_path / "store")
        for temperature in (0.5, 1.0, 4.0):
            expected = torch.from_numpy(live(sequences()[3])).div(temperature).softmax(dim=-1).numpy()
            found = store.batch(["text-3"], temperature=temperature).p()
            np.testing.assert_allclose(found, expected, atol={"f32": 1e-6, "f16": 1e-3}.get(kept_as, 0.03))

    def test_a_store_without_sequences(self, tmp_path: Path) -> None:
        """A classifier of samples keeps hidden states as well; the head's bias is kept."""
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 50))
        data = ArrayTransferSet("a", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
        made = teacher_from_module(model, name="net", head="2")
        document = {"name": "hidden", "kept_as": "f32"}
        manifest = precompute(job(tmp_path, document, sequences=None), transfer_set=data, teachers=[made])
        assert manifest.encoding.constants == ("bias", "head")
        batch = softlabels.open(tmp_path / "store").batch(np.arange(40))
        expected = model(torch.from_numpy(data.inputs)).softmax(dim=-1).detach().numpy()
        np.testing.assert_allclose(batch.p(), expected, atol=1e-6)

    def test_the_teachers_head_is_not_run(self, tmp_path: Path) -> None:
        """Beyond the few rows that the plan is made from: that is what makes such a capture cheap."""
        made = teacher()
        asked_rows: list[int] = []
        made.model.head.register_forward_hook(lambda module, given, out: asked_rows.append(len(out)))
        precompute(job(tmp_path, "hidden"), transfer_set=texts(), teachers=[made])
        assert sum(asked_rows) <= 4

    def test_what_comes_after_the_head_must_be_said(self, tmp_path: Path) -> None:
        """A model that caps its logits is refused, unless the job names the cap."""

        class Capped(TinyLanguageModel):
            def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
                return 2 * torch.tanh(super().forward(tokens_BL) / 2)

        made = teacher_from_module(Capped(), name="capped", gives="positions", head="head")
        with pytest.raises(TeacherError, match="softcap"):
            precompute(job(tmp_path, "hidden"), transfer_set=texts(), teachers=[made])
        capped = {"name": "hidden", "softcap": 2.0, "kept_as": "f32"}
        manifest = precompute(job(tmp_path, capped), transfer_set=texts(), teachers=[made])
        assert manifest.audit is not None
        assert manifest.audit["kl_nats"]["1"]["max"] < 1e-9

    def test_several_teachers_are_refused(self, tmp_path: Path) -> None:
        """Their hidden states cannot be averaged."""
        with pytest.raises(JobError, match="cannot be averaged"):
            precompute(job(tmp_path, "hidden"), transfer_set=texts(), teachers=[teacher(), teacher()])

    def test_a_teacher_without_a_known_head_is_refused(self, tmp_path: Path) -> None:
        """The message says how to name it."""
        made = teacher_from_module(TinyLanguageModel(), name="tiny", gives="positions")
        with pytest.raises(TeacherError, match="`head`"):
            precompute(job(tmp_path, "hidden"), transfer_set=texts(), teachers=[made])


class TestRefusals:
    def test_one_answer_a_sample(self, tmp_path: Path) -> None:
        """The message for a classifier of whole samples says what is expected."""

        class Whole(torch.nn.Module):
            def forward(self, tokens: torch.Tensor) -> torch.Tensor:
                return torch.zeros(len(tokens), 5)

        with pytest.raises(TeacherShapeError, match="once for every position"):
            precompute(job(tmp_path), transfer_set=texts(), teachers=[teacher_from_module(Whole(), name="whole")])

    def test_data_that_change_under_the_job(self, tmp_path: Path) -> None:
        """A sequence that is not what it was when the table was made ends the run."""

        class Changing(RaggedTransferSet):
            calls = 0

            def take(self, positions: np.ndarray) -> Samples:
                self.calls += 1
                taken = super().take(positions)
                if self.calls > 1:
                    taken.inputs[0, 0] += 1
                return taken

        with pytest.raises(TransferSetChangedError, match="changed under the job"):
            precompute(job(tmp_path), transfer_set=Changing("texts", sequences()[:2]), teachers=[teacher()])

    def test_other_sequences_are_another_job(self, tmp_path: Path) -> None:
        """The table of samples is part of the plan, so that no store mixes two transfer sets."""
        precompute(job(tmp_path), transfer_set=texts(), teachers=[teacher()])
        with pytest.raises(softlabels.errors.StoreExistsError):
            precompute(job(tmp_path), transfer_set=texts(seed=1), teachers=[teacher()])

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (ArrayTransferSet("flat", np.zeros(4)), "not sequences"),
            (ArrayTransferSet("x", np.zeros((4, 3, 2), np.float32)), "token ids"),
            (RaggedTransferSet("none", [np.zeros(0, np.int64)]), "has a position"),
        ],
    )
    def test_data_that_are_no_sequences(self, tmp_path: Path, data: Any, message: str) -> None:
        """Single values, frames asked for next tokens, nothing at all: each is named before any teacher runs."""
        with pytest.raises(JobError, match=message):
            precompute(job(tmp_path), transfer_set=data, teachers=[teacher()])
        assert not (tmp_path / "store").exists()

    def test_labels_a_sample_are_no_labels_a_position(self) -> None:
        """[B] labels are refused, not spread."""
        data = ArrayTransferSet("x", np.zeros((4, 3), np.int64), labels=np.zeros(4))
        with pytest.raises(ShapeMismatchError, match="one label per position"):
            next(SequenceRows(data, SequencesTable(), store="s").batches(range(1), 1))

    def test_ids_that_repeat(self) -> None:
        """Two sequences of one id are refused."""
        with pytest.raises(BadIdsError, match="repeat"):
            RaggedTransferSet("x", sequences()[:2], ids=np.array([1, 1]))

    def test_unsigned_tokens_leave_no_padding(self) -> None:
        """A number that stands for padding must be free."""
        with pytest.raises(ShapeMismatchError, match="signed"):
            pad_sequences([np.zeros(2, np.uint16), np.zeros(3, np.uint16)])

    def test_views_and_sequences_in_one_job(self, tmp_path: Path) -> None:
        """A sample's rows are one or the other."""
        with pytest.raises(JobError, match="exclude each other"):
            job(tmp_path, views={"count": 2, "transform": "x:y"})

"""Hugging Face's own Trainer trains a student from a served store, and goes on in mid-epoch to the row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: `pip install softlabels[transformers]`")
pytest.importorskip("accelerate", reason="accelerate is not installed: `pip install softlabels[accelerate]`")

import torch
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import softlabels
from softlabels.errors import ConflictError, FingerprintMismatchError, RequestError, ShapeMismatchError
from softlabels.losses import DistillationLoss
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import SoftTargetDataset
from softlabels_client.integrations.huggingface import BATCH, DistillationTrainer, logits_in

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class CrashError(Exception):
    """Stands for a crash."""


class Recording(DistillationTrainer):
    """Notes each row that it learns from, and crashes at a batch."""

    crash_at: int | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        self.seen = getattr(self, "seen", [])
        self.batches = getattr(self, "batches", 0)
        if self.batches == self.crash_at:
            raise CrashError
        self.batches += 1
        batch = inputs[BATCH]
        rows = batch.targets.logits_BC.numpy()
        self.seen += [(int(sample), row.tobytes()) for sample, row in zip(batch.ids, rows, strict=True)]
        return super().compute_loss(model, inputs, *more, **named)


class TinyConfig(PretrainedConfig):
    """Of a model in the library's own form."""

    model_type = "tiny"


class TinyModel(PreTrainedModel):
    """A linear student that takes `pixel_values` and gives an output with `logits`, as the library's models do."""

    config_class = TinyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(4, 10)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.layer(pixel_values))


@pytest.fixture
def store(served_store: str) -> Iterator[softlabels.TargetStore]:
    """The tiny store behind its server."""
    with softlabels.open(served_store) as opened:
        yield opened


def trainer_of(store: Any, inputs: Any, folder: Path, *, crash_at: int | None = None, **changes: Any) -> Recording:
    """A trainer that keeps a checkpoint every five steps."""
    model = changes.pop("model", None)
    named = {"input_name": changes.pop("input_name")} if "input_name" in changes else {}
    known: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "save_steps": 5,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1000,
        "data_seed": 4,
        "dataloader_pin_memory": False,
    }
    torch.manual_seed(0)
    trainer = Recording(
        torch.nn.Linear(4, 10) if model is None else model,
        TrainingArguments(**{**known, **changes}),
        train_dataset=SoftTargetDataset(inputs, store),
        loss=DistillationLoss(hard_weight=0),
        **named,
    )
    trainer.crash_at = crash_at
    return trainer


WORKERS, ACCUMULATE = {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}
QUICK: list[Any] = [(ACCUMULATE, 18)]
MORE: list[Any] = [(changes, at) for changes in ({}, WORKERS, ACCUMULATE) for at in (7, 18, 24)]


@pytest.mark.parametrize(
    ("changes", "crash_at"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE if each not in QUICK)],
    ids=str,
)
def test_a_resumed_training_goes_on_to_the_row(
    store: Any, tiny_inputs: Any, tmp_path: Path, changes: dict[str, Any], crash_at: int
) -> None:
    """What was seen up to the checkpoint and what comes after it is what an uninterrupted training sees."""
    accumulate = changes.get("gradient_accumulation_steps", 1)
    changes = {**changes, "save_steps": 5 if accumulate == 1 else 3}
    whole = trainer_of(store, tiny_inputs, tmp_path / "whole", **changes)
    whole.train()
    assert len(whole.seen) == 400
    assert len({sample for sample, _ in whole.seen[:200]}) == len({sample for sample, _ in whole.seen[200:]}) == 200
    assert whole.seen[:200] != whole.seen[200:]

    crashing = trainer_of(store, tiny_inputs, tmp_path / "cut", crash_at=crash_at, **changes)
    with pytest.raises(CrashError):
        crashing.train()
    resumed = trainer_of(store, tiny_inputs, tmp_path / "cut", **changes)
    resumed.train(resume_from_checkpoint=True)
    steps = resumed._initial_global_step
    each = -(-13 // accumulate)
    taken = 200 * (steps // each) + 16 * accumulate * (steps % each)
    assert crashing.seen[:taken] + resumed.seen == whole.seen
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_checkpoint_between_epochs(store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    """The next epoch is the next one, not the first again."""
    whole = trainer_of(store, tiny_inputs, tmp_path / "whole", save_steps=13)
    whole.train()
    resumed = trainer_of(store, tiny_inputs, tmp_path / "whole", save_steps=13)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-13"))
    assert resumed.seen == whole.seen[200:]


def test_models_of_the_library(store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    """They take their inputs by name and return an output."""
    trainer = trainer_of(
        store, tiny_inputs, tmp_path, model=TinyModel(TinyConfig()), input_name="pixel_values", num_train_epochs=1
    )
    trainer.train()
    assert len(trainer.seen) == 200


class TestRefusals:
    def test_other_data_or_another_division_into_steps(
        self, store: Any, tiny_inputs: ArrayTransferSet, tmp_path: Path
    ) -> None:
        """Another batch size, the same samples in another order, or another seed: step 5 is then another place."""
        with pytest.raises(CrashError):
            trainer_of(store, tiny_inputs, tmp_path, num_train_epochs=1, crash_at=5).train()
        other = trainer_of(store, tiny_inputs, tmp_path, num_train_epochs=1, per_device_train_batch_size=8)
        with pytest.raises(ConflictError, match=r"after 5 steps .* 80 samples of epoch 0; .* would be 40 of epoch 0"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        turned = ArrayTransferSet("turned", tiny_inputs.inputs[::-1], ids=tiny_inputs.ids[::-1])
        place = str(tmp_path / "checkpoint-5")
        with pytest.raises(FingerprintMismatchError, match="another order"):
            trainer_of(store, turned, tmp_path, num_train_epochs=1).train(resume_from_checkpoint=place)
        with pytest.raises(ConflictError, match="seed = 4, here seed is 5"):
            trainer_of(store, tiny_inputs, tmp_path, num_train_epochs=1, data_seed=5).train(
                resume_from_checkpoint=place
            )

    def test_skipping_nothing(self, store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
        """An epoch begun anew would repeat samples."""
        with pytest.raises(RequestError, match="trained on twice"):
            trainer_of(store, tiny_inputs, tmp_path, ignore_data_skip=True)

    def test_another_number_of_classes(self, store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
        """By name, at the first step."""
        with pytest.raises(ShapeMismatchError, match="10 classes"):
            trainer_of(store, tiny_inputs, tmp_path, model=torch.nn.Linear(4, 9)).train()

    def test_a_model_without_logits(self) -> None:
        """What came instead is named."""
        assert logits_in((torch.zeros(1, 2), "more")).shape == (1, 2)
        with pytest.raises(RequestError, match="dict"):
            logits_in({"scores": 1})

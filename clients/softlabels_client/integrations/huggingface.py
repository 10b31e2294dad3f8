"""Hugging Face Trainer for a student: sample order, batches and loss come from a store, all else from the Trainer."""

from __future__ import annotations

from typing import Any

from softlabels.errors import ConflictError, RequestError
from softlabels.extras import needs_extra

with needs_extra("transformers,accelerate", "training with Hugging Face's Trainer"):
    import accelerate  # noqa: F401 - the Trainer does not work without it
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState

from softlabels.losses import DistillationLoss
from softlabels_client.data.dataset import SoftTargetDataset, data_identity
from softlabels_client.data.loader import DistillationBatch, collate_batches
from softlabels_client.data.sampler import EpochProgress, EpochSampler
from softlabels_client.training.step import Loss, step_loss

BATCH = "distillation_batch"
"""Key of a batch in the dictionary that the Trainer expects; the other keys are its inputs and ids."""


class DistillationTrainer(Trainer):
    """Hugging Face's Trainer with a store's sample order and a distillation loss.

    A checkpoint holds the sampler state. Resumed in the middle of an epoch, the Trainer skips the samples already
    trained on without fetching them. That needs the same number of ranks, batch size and accumulation as before;
    anything else raises a ConflictError. Evaluation is the Trainer's own.

    Args:
        model: maps inputs to logits_BC: a tensor, a tuple that starts with it, or an output with `logits`.
        args: gives batch size, seed (`data_seed`, else `seed`), workers and `dataloader_drop_last`.
        train_dataset: inputs paired with their targets.
        loss: maps logits and targets to a scalar; `DistillationLoss()` if None.
        input_name: keyword by which `model` takes its inputs; its first argument if None.
        more: further arguments of the Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: SoftTargetDataset,
        loss: Loss | None = None,
        input_name: str | None = None,
        **more: Any,
    ) -> None:
        if args.ignore_data_skip:
            raise RequestError(
                "ignore_data_skip restarts a resumed epoch, so samples would be trained on twice; leave it out: those "
                "already trained on are skipped without being fetched"
            )
        super().__init__(model=model, args=args, train_dataset=train_dataset, **more)
        self.loss: Loss = DistillationLoss() if loss is None else loss
        self._pairs, self._input_name = train_dataset, input_name
        self.add_callback(_SamplerStateCallback())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches in the store's order, already sharded by rank: accelerate must not shard them again."""
        dataset, args = self._pairs, self.args
        order = EpochSampler(
            len(dataset),
            digest=dataset.store.digest,
            batch_size=self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            remainder="drop" if args.dataloader_drop_last else "split",
            data=data_identity(dataset.samples),
        )
        return _EpochLoader(
            dataset,
            batch_sampler=order,
            generator=torch.Generator().manual_seed(order.state.config.seed),
            num_workers=args.dataloader_num_workers,
            collate_fn=as_dictionary,
            persistent_workers=args.dataloader_num_workers > 0,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the distillation loss of a training batch, and the Trainer's own loss of an evaluation batch."""
        if BATCH not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs: list[Any] = []

        def student(given: Tensor) -> Tensor:
            outputs.append(model(given) if self._input_name is None else model(**{self._input_name: given}))
            return logits_in(outputs[0])

        loss = step_loss(student, inputs[BATCH].to(self.args.device), self.loss)
        return (loss, outputs[0]) if return_outputs else loss


def as_dictionary(fetched: Any) -> dict[str, Any]:
    """Return a batch as the Trainer's dictionary: the batch itself, and `inputs` and `ids` for callbacks."""
    batch = collate_batches(fetched)
    return {BATCH: batch, "inputs": batch.inputs, "ids": batch.ids}


def logits_in(output: Any) -> Tensor:
    """Return logits_BC from a model's output: a tensor, a tuple that starts with it, or an output with `logits`."""
    found = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(found, Tensor):
        raise RequestError(
            f"the student returned {type(output).__name__}, which has no logits: return a tensor, a tuple that starts "
            "with it, or an output with `logits`"
        )
    return found


class _EpochLoader(DataLoader[DistillationBatch]):
    """A DataLoader that passes the Trainer's epoch on to its sampler."""

    batch_sampler: EpochSampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.batch_sampler.set_epoch(epoch)


class _SamplerStateCallback(TrainerCallback, ExportableState):
    """Saves the sampler state with the Trainer's state, and compares it on resume."""

    EARLIER_NAME = "_KeepsPlace"
    """Class name, and so the key, in checkpoints of earlier versions."""

    def __init__(self) -> None:
        self._sampler: EpochSampler | None = None
        self._accumulate = 1
        self._steps = 0

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into its state file."""
        return {"args": {}, "attributes": {"place": self._sampler_state()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Raise unless data, ranks, batch size and accumulation are the checkpoint's."""
        sampler: EpochSampler = more["train_dataloader"].batch_sampler
        self._sampler, self._accumulate = sampler, args.gradient_accumulation_steps
        self._steps = state.global_step
        known: Any = state.stateful_callbacks
        saved = known.get(type(self).__name__, known.get(self.EARLIER_NAME))
        if not state.global_step or not isinstance(saved, dict):
            return
        before, here = saved["attributes"]["place"], self._sampler_state()
        if sampler.state.progress_in(before) != sampler.state.progress_in(here):
            raise ConflictError(
                f"after {state.global_step} steps the checkpoint had trained on {before['cursor']} samples of epoch "
                f"{before['epoch']}; with these ranks, batch size and accumulation it would be {here['cursor']} of "
                f"epoch {here['epoch']}: resume with the former ones, or start again",
                kept=before,
                yours=here,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Count the step."""
        self._steps = state.global_step

    def _sampler_state(self) -> dict[str, Any]:
        """Return the sampler state after the Trainer's steps; its loader may have read further ahead."""
        sampler = self._sampler
        if sampler is None:
            return {}
        whole = sampler.state.batches_from(EpochProgress())
        batches = len(whole)
        epoch, steps = divmod(self._steps, max(1, -(-batches // self._accumulate)))
        taken = min(steps * self._accumulate, batches)
        cursor = whole.cursor_after(taken - 1) if taken else 0
        return sampler.state.state_at(EpochProgress(epoch=epoch, cursor=cursor, batches=taken))

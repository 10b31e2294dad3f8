"""How does a student learn in Hugging Face's Trainer? A Trainer that takes its order, batches and loss from a store."""

from __future__ import annotations

from typing import Any

from softlabels.errors import ConflictError, MissingExtraError, RequestError

try:
    import accelerate  # noqa: F401 - the Trainer does not work without it
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise MissingExtraError(
        "this needs transformers and accelerate, one of which is not installed: "
        "`pip install 'softlabels[transformers,accelerate]'`",
        extra="transformers",
    ) from error

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from softlabels.losses import DistillationLoss
from softlabels_client.data.dataset import SoftTargetDataset
from softlabels_client.data.distillation_batch import DistillationBatch, collate_batches
from softlabels_client.data.sampler import EpochSampler, data_identity
from softlabels_client.data.sampler_state import EpochProgress
from softlabels_client.training.step import Loss, step_loss

BATCH = "distillation_batch"
"""The key of a batch in the dictionary that the Trainer wants; the other keys are its inputs and ids."""


class DistillationTrainer(Trainer):
    """Hugging Face's Trainer for a student of a store: our order and loss, everything else its own.

    Args:
        model: maps inputs to logits_BC; a tensor, a tuple that begins with it, or an output with `logits`.
        args: batch size, seed (`data_seed`, else `seed`), workers and `dataloader_drop_last` are taken from here.
        train_dataset: inputs with their targets.
        loss: of logits and targets; the paper's objective when left out.
        input_name: under which name `model` takes its inputs; the first argument when left out.
        more: whatever else the Trainer takes.

    A checkpoint carries the place in the data. Resumed in the middle of an epoch, the Trainer skips what was taken
    without fetching it; that needs as many ranks, the batch size and the accumulation of before, and anything else is
    a ConflictError. Evaluation is the Trainer's own.
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
                "ignore_data_skip begins a resumed epoch anew, so samples would come twice; leave it out: what was "
                "taken is skipped without being fetched"
            )
        super().__init__(model=model, args=args, train_dataset=train_dataset, **more)
        self.loss: Loss = DistillationLoss() if loss is None else loss
        self._pairs, self._input_name = train_dataset, input_name
        self.add_callback(_KeepsPlace())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the store's order, shared by the ranks already: accelerate must not share them out again."""
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
        """The distillation loss of a batch of ours; the Trainer's own of any other, an evaluation's for one."""
        if BATCH not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs: list[Any] = []

        def student(given: Tensor) -> Tensor:
            outputs.append(model(given) if self._input_name is None else model(**{self._input_name: given}))
            return logits_in(outputs[0])

        loss = step_loss(student, inputs[BATCH].to(self.args.device), self.loss)
        return (loss, outputs[0]) if return_outputs else loss


def as_dictionary(fetched: Any) -> dict[str, Any]:
    """A batch as the dictionary that the Trainer wants: itself, and `inputs` and `ids` for callbacks and counters."""
    batch = collate_batches(fetched)
    return {BATCH: batch, "inputs": batch.inputs, "ids": batch.ids}


def logits_in(output: Any) -> Tensor:
    """logits_BC in what a model returned: a tensor, a tuple that begins with it, or an output with `logits`."""
    found = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(found, Tensor):
        raise RequestError(
            f"the student returned {type(output).__name__}, in which no logits are: return a tensor, a tuple that "
            "begins with it, or an output with `logits`"
        )
    return found


class _EpochLoader(DataLoader[DistillationBatch]):
    """A DataLoader whose order the Trainer can tell the epoch."""

    batch_sampler: EpochSampler

    def set_epoch(self, epoch: int) -> None:
        """The next pass goes through this epoch."""
        self.batch_sampler.set_epoch(epoch)


class _KeepsPlace(TrainerCallback, ExportableState):
    """Keeps the place in the data with the Trainer's state, and compares it with where the Trainer goes on."""

    def __init__(self) -> None:
        self._sampler: EpochSampler | None = None
        self._accumulate = 1
        self._steps = 0

    def state(self) -> dict[str, Any]:
        """What the Trainer's state file gets."""
        return {"args": {}, "attributes": {"place": self._place()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Refuse to go on with other data, or with a division of it into steps that is not the checkpoint's."""
        sampler: EpochSampler = more["train_dataloader"].batch_sampler
        self._sampler, self._accumulate = sampler, args.gradient_accumulation_steps
        self._steps = state.global_step
        known: Any = state.stateful_callbacks
        kept = known.get(type(self).__name__)
        if not state.global_step or not isinstance(kept, dict):
            return
        before, here = kept["attributes"]["place"], self._place()
        sampler.state.progress_in(before)
        if before != here:
            raise ConflictError(
                f"after {state.global_step} steps the checkpoint had taken {before['cursor']} samples of epoch "
                f"{before['epoch']}; with these ranks, batch size and accumulation that would be {here['cursor']} of "
                f"epoch {here['epoch']}: resume with those of before, or begin anew",
                kept=before,
                yours=here,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Count the step."""
        self._steps = state.global_step

    def _place(self) -> dict[str, Any]:
        """The place after the steps taken; the Trainer counts those alone, however far its loader has read."""
        sampler = self._sampler
        if sampler is None:
            return {}
        whole = sampler.state.batches_from(EpochProgress())
        batches = len(whole)
        epoch, steps = divmod(self._steps, max(1, -(-batches // self._accumulate)))
        taken = min(steps * self._accumulate, batches)
        cursor = whole.cursor_after(taken - 1) if taken else 0
        return sampler.state.state_at(EpochProgress(epoch=epoch, cursor=cursor, batches=taken))

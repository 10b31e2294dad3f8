"""How does a `transformers` model become a teacher? By the hub's name, from its cache, a folder, or a GGUF file.

Shapes: B samples, L positions, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from softlabels.documents import Document
from softlabels.errors import JobError, MissingExtraError
from softlabels.precompute.teachers.teacher import Gives
from softlabels.transfer_sets.ragged import PADDING

Task = Literal["image-classification", "sequence-classification", "causal-lm"]

_CLASSES: Mapping[str, str] = {
    "image-classification": "AutoModelForImageClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_ENDINGS: Mapping[str, Task] = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "sequence-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}
"""What an architecture's name says of its task."""

_MOST_LISTED = 5


class HubSettings(Document):
    """The `arguments` of a `transformers:` teacher.

    Attributes:
        task: what the model does; read from its configuration when None.
        gguf_file: name of a GGUF file in the folder or repository.
        revision: branch, tag or commit of a repository on the hub.
        dtype: of the weights: `auto` keeps the checkpoint's own.
        trust_remote_code: run Python code that comes with the model; never unless the job says so.
    """

    task: Task | None = None
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model of `transformers`, ready to be frozen.

    Attributes:
        model: logits alone, from pixels or token ids.
        gives: rows or positions.
        last_layer: what gives the logits, where the model says.
        class_names: as its configuration names them; None where it does not.
        revision: the commit that a name on the hub was resolved to.
    """

    model: nn.Module
    gives: Gives
    last_layer: nn.Module | None
    class_names: tuple[str, ...] | None
    revision: str | None


class PixelModel(nn.Module):
    """An image classifier: pixels [B, channels, H, W] in, logits [B, C] out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of a batch of images, in the model's own type."""
        if not pixels.is_floating_point():
            raise TypeError(f"the model takes prepared pixels, not {pixels.dtype}: name a `preprocess`")
        return cast(Tensor, self.model(pixel_values=pixels.to(_dtype_of(self.model))).logits)


class TokenModel(nn.Module):
    """A model of tokens: ids [B, L] in, `PADDING` at the end of shorter ones; logits [B, C] or [B, L, C] out."""

    def __init__(self, model: nn.Module, *, gives: Gives, padding_id: int) -> None:
        super().__init__()
        self.model = model
        self._padding_id = padding_id
        self._options: dict[str, Any] = {"use_cache": False} if gives == "positions" else {}

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits of a batch of sequences."""
        if tokens_BL.is_floating_point() or tokens_BL.ndim != 2:
            raise TypeError(f"the model takes token ids [B, L], not {tokens_BL.dtype} {list(tokens_BL.shape)}")
        there_BL = tokens_BL != PADDING
        if bool((there_BL[:, 1:] & ~there_BL[:, :-1]).any()):
            raise ValueError(f"padding ({PADDING}) stands before tokens: it belongs at the end of a sequence")
        ids_BL = tokens_BL.long().masked_fill(~there_BL, self._padding_id)
        answer = self.model(input_ids=ids_BL, attention_mask=there_BL.long(), **self._options)
        return cast(Tensor, answer.logits)


def load_hub_model(name: str, settings: HubSettings, *, base: Path, who: str) -> HubModel:
    """A model of `transformers`, from a folder, the hub's cache on this machine, or the hub, in this order.

    Nothing is asked of the network for a folder, for what the cache holds, or under `HF_HUB_OFFLINE=1`.

    Args:
        name: a folder, relative to `base`, or a repository on the hub.
        who: whose model, for messages.
    Raises:
        MissingExtraError: transformers is not installed.
        JobError: no such model, no task that gives one distribution a row, or weights that it lacks.
    """
    transformers = _transformers(who)
    folder = base / name
    place = str(folder) if folder.is_dir() else name
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.gguf_file is not None:
        options["gguf_file"] = settings.gguf_file
    if settings.revision is not None:
        options["revision"] = settings.revision
    local = folder.is_dir() or _offline()
    config = _cached_first(transformers.AutoConfig.from_pretrained, place, options, local=local, who=who)
    task = settings.task or _task_of(config, gguf=settings.gguf_file is not None, who=who)
    load = getattr(transformers, _CLASSES[task]).from_pretrained
    more = {**options, "dtype": settings.dtype, "output_loading_info": True}
    model, report = _cached_first(load, place, more, local=local, who=who)
    _refuse_untrained(report, place, who)
    gives: Gives = "positions" if task == "causal-lm" else "rows"
    if task == "image-classification":
        wrapped: nn.Module = PixelModel(model)
    else:
        padding_id = getattr(model.config, "pad_token_id", None)
        wrapped = TokenModel(model, gives=gives, padding_id=0 if padding_id is None else int(padding_id))
    return HubModel(
        model=wrapped,
        gives=gives,
        last_layer=_last_layer(model, task),
        class_names=None if task == "causal-lm" else _class_names(model.config),
        revision=None if folder.is_dir() else _commit_of(name, settings),
    )


def _transformers(who: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            f"{who} is a `transformers` model, and that library is not installed: pip install "
            "'softlabels[transformers]'",
            extra="transformers",
        ) from error


def _offline() -> bool:
    constants = importlib.import_module("huggingface_hub.constants")
    return bool(constants.HF_HUB_OFFLINE)


def _cached_first(load: Callable[..., Any], place: str, options: dict[str, Any], *, local: bool, who: str) -> Any:
    try:
        try:
            return load(place, local_files_only=True, **options)
        except OSError:
            if local:
                raise
            return load(place, **options)
    except ImportError as error:
        raise MissingExtraError(f"{who}: {place} needs a library that is not installed: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        where = "offline, so the hub was not asked" if local and not Path(place).is_dir() else "not to be had"
        raise JobError(f"{who}: the model {place} is {where}: {error}") from error


def _commit_of(name: str, settings: HubSettings) -> str | None:
    """The commit that a name on the hub stands for in the cache, where the files have been read from by now."""
    hub = importlib.import_module("huggingface_hub")
    file = hub.try_to_load_from_cache(name, settings.gguf_file or "config.json", revision=settings.revision)
    parts = Path(file).parts if isinstance(file, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _task_of(config: Any, *, gguf: bool, who: str) -> Task:
    named = getattr(config, "architectures", None) or []
    for architecture in named:
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending):
                return task
    if gguf:  # such a file says how the model is built, and is always a language model
        return "causal-lm"
    raise JobError(
        f"{who}: its architecture ({', '.join(named) or 'not named'}) says of none of the tasks that it is for: give "
        f"`task` in its arguments, one of {', '.join(map(repr, get_args(Task)))}"
    )


def _refuse_untrained(report: Mapping[str, Any], place: str, who: str) -> None:
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - _MOST_LISTED} more" if len(lacking) > _MOST_LISTED else ""
        raise JobError(
            f"{who}: {place} lacks weights that its task needs ({', '.join(lacking[:_MOST_LISTED])}{more}), which "
            "would be drawn at random: fine-tune it first, or name the checkpoint that was"
        )


def _last_layer(model: Any, task: Task) -> nn.Module | None:
    if task == "causal-lm":
        return cast("nn.Module | None", model.get_output_embeddings())
    found = getattr(model, "classifier", getattr(model, "score", None))
    return found if isinstance(found, nn.Linear) else None


def _class_names(config: Any) -> tuple[str, ...] | None:
    """The configuration's names, in order; None where they are the numbered ones that it makes up itself."""
    names = getattr(config, "id2label", None) or {}
    listed = tuple(str(names[number]) for number in range(len(names)) if number in names)
    made_up = all(name == f"LABEL_{number}" for number, name in enumerate(listed))
    return None if made_up or len(listed) != len(names) else listed


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


# MERGED from softlabels.precompute.teachers.model_hubs: How does a teacher come by its name from timm or torchvision, where these are installed?


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A named network, with what its library says of its weights.

    Attributes:
        class_names: in the order of its outputs; None where the library does not say.
    """

    model: nn.Module
    class_names: tuple[str, ...] | None = None


def load_timm(name: str, arguments: Mapping[str, Any], *, has_weights: bool, who: str) -> ZooModel:
    """`timm.create_model(name)`, with timm's pretrained weights unless the job brings others.

    Raises:
        MissingExtraError: timm cannot be imported. JobError: no such model, or weights that cannot be had.
    """
    timm = _library("timm", who)
    try:
        return ZooModel(model=timm.create_model(name, **{"pretrained": not has_weights, **arguments}))
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise JobError(f"{who}: timm gives no model {name!r}: {error}") from error


def load_torchvision(name: str, arguments: Mapping[str, Any], *, has_weights: bool, who: str) -> ZooModel:
    """`torchvision.models.get_model(name)`, with its default weights unless the job names or brings others.

    Raises:
        MissingExtraError: torchvision cannot be imported. JobError: no such model, or weights that cannot be had.
    """
    models = _library("torchvision.models", who)
    wanted: dict[str, Any] = {"weights": None if has_weights else "DEFAULT", **arguments}
    try:
        weights = None
        if isinstance(wanted["weights"], str):
            weights = wanted["weights"] = models.get_model_weights(name)[wanted["weights"]]
        model = models.get_model(name, **wanted)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise JobError(f"{who}: torchvision gives no model {name!r}: {error}") from error
    categories = None if weights is None else weights.meta.get("categories")
    return ZooModel(model=model, class_names=None if categories is None else tuple(categories))


def _library(name: str, who: str) -> Any:
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # a build for another torch cannot register its operators
        raise MissingExtraError(
            f"{who} comes from {library}, which cannot be imported here ({error}): pip install {library}, in the build "
            "that fits this torch",
            library=library,
        ) from error

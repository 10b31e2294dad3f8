"""Models from hubs and model zoos: Hugging Face `transformers` (GGUF files included), timm and torchvision.

Shapes: B samples, L positions, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from softlabels.atomic_files import sha256_of
from softlabels.documents import Document
from softlabels.errors import JobError, MissingExtraError
from softlabels.extras import needs_extra
from softlabels.precompute.teachers.teacher import Gives, LoadedModel, ModelRequest
from softlabels.transfer_sets.ragged import PADDING

Task = Literal["image-classification", "sequence-classification", "causal-lm"]

_ENDINGS: Mapping[Task, tuple[str, ...]] = {
    "image-classification": ("ForImageClassification",),
    "sequence-classification": ("ForSequenceClassification",),
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
}
"""Ends of the class names of architectures; the first one also names the class that loads them, AutoModelFor…."""

_MAX_LISTED = 5
_LOAD_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, OSError)


class HubSettings(Document, frozen=True, kw_only=True):
    """The `arguments` of a `transformers:` teacher.

    Attributes:
        task: what the model does; read from its configuration when None.
        gguf_file: name of a GGUF file in the folder or repository.
        revision: branch, tag or commit of a repository on the hub.
        dtype: type of the weights: `auto` keeps the checkpoint's own.
        trust_remote_code: run Python code that comes with the model; never unless the job says so.
    """

    task: Task | None = None
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: bool = False


class ImageModel(nn.Module):
    """An image classifier: pixels [B, channels, H, W] in, logits [B, C] out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits of a batch of images; pixels are cast to the model's own type."""
        if not pixels.is_floating_point():
            raise TypeError(f"the model takes preprocessed pixels, not {pixels.dtype}: name a `preprocess`")
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return cast(Tensor, self.model(pixel_values=pixels.to(dtype)).logits)


class TokenModel(nn.Module):
    """A model of tokens: ids [B, L] in, `PADDING` at the end of shorter ones; logits [B, C] or [B, L, C] out."""

    def __init__(self, model: nn.Module, *, gives: Gives) -> None:
        super().__init__()
        self.model = model
        padding_id = getattr(model.config, "pad_token_id", None)
        self._padding_id = 0 if padding_id is None else int(padding_id)
        self._options: dict[str, Any] = {"use_cache": False} if gives == "positions" else {}

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits of a batch of sequences; padding is masked."""
        if tokens_BL.is_floating_point() or tokens_BL.ndim != 2:
            raise TypeError(f"the model takes token ids [B, L], not {tokens_BL.dtype} {list(tokens_BL.shape)}")
        mask_BL = tokens_BL != PADDING
        if bool((mask_BL[:, 1:] & ~mask_BL[:, :-1]).any()):
            raise ValueError(f"padding ({PADDING}) comes before tokens: it belongs at the end of a sequence")
        ids_BL = tokens_BL.long().masked_fill(~mask_BL, self._padding_id)
        output = self.model(input_ids=ids_BL, attention_mask=mask_BL.long(), **self._options)
        return cast(Tensor, output.logits)


def load_transformers(request: ModelRequest) -> LoadedModel:
    """Return a `transformers` model from a folder, the hub's cache on this machine, or the hub, in this order.

    There is no network access for a folder, for what the cache holds, or under `HF_HUB_OFFLINE=1`.

    Raises:
        MissingExtraError: transformers is not installed.
        JobError: no such model, no task that gives one distribution a row, or weights that are missing.
    """
    name, label, settings = request.location, request.label, request.settings(HubSettings)
    with needs_extra("transformers", f"{label}: running a `transformers` model"):
        transformers: Any = importlib.import_module("transformers")
        hub: Any = importlib.import_module("huggingface_hub")
    folder, gguf_file = request.path, settings.gguf_file
    location = str(folder) if folder.is_dir() else name
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    options |= {key: value for key in ("gguf_file", "revision") if (value := getattr(settings, key)) is not None}
    local = folder.is_dir() or bool(hub.constants.HF_HUB_OFFLINE)
    config = _cached_first(transformers.AutoConfig.from_pretrained, location, options, local=local, label=label)
    task = settings.task or _task_of(config, gguf=gguf_file is not None, label=label)
    load = getattr(transformers, f"AutoModel{_ENDINGS[task][0]}").from_pretrained
    options |= {"dtype": settings.dtype, "output_loading_info": True}
    model, report = _cached_first(load, location, options, local=local, label=label)
    _refuse_untrained(report, location, label)
    gives: Gives = "positions" if task == "causal-lm" else "rows"
    file = None if gguf_file is None else folder / gguf_file
    return LoadedModel(
        model=ImageModel(model) if task == "image-classification" else TokenModel(model, gives=gives),
        sha256=sha256_of(file) if file is not None and file.is_file() else None,
        weights=gguf_file,
        gives=gives,
        last_layer=_last_layer(model, task),
        class_names=None if task == "causal-lm" else _class_names(model.config),
        revision=None if folder.is_dir() else _commit_of(hub, name, settings),
        libraries=("transformers",) if gguf_file is None else ("transformers", "gguf"),
    )


def load_timm(request: ModelRequest) -> LoadedModel:
    """Return `timm.create_model(name)`, with timm's own weights unless the job brings others.

    Raises:
        MissingExtraError: timm cannot be imported. JobError: no such model, or weights that cannot be loaded.
    """
    timm, table = _import_zoo("timm", request.label), request.table
    try:
        model = timm.create_model(request.location, **{"pretrained": table.weights is None, **table.arguments})
    except _LOAD_ERRORS as error:
        raise JobError(f"{request.label}: timm gives no model {request.location!r}: {error}") from error
    return request.with_weights(LoadedModel(model=model, libraries=("timm",)))


def load_torchvision(request: ModelRequest) -> LoadedModel:
    """Return `torchvision.models.get_model(name)`, with its default weights unless the job names or brings others.

    Raises:
        MissingExtraError: torchvision cannot be imported. JobError: no such model, or weights that cannot be loaded.
    """
    models, name, table = _import_zoo("torchvision.models", request.label), request.location, request.table
    options: dict[str, Any] = {"weights": "DEFAULT" if table.weights is None else None, **table.arguments}
    try:
        weights = None
        if isinstance(options["weights"], str):
            weights = options["weights"] = models.get_model_weights(name)[options["weights"]]
        model = models.get_model(name, **options)
    except _LOAD_ERRORS as error:
        raise JobError(f"{request.label}: torchvision gives no model {name!r}: {error}") from error
    categories = None if weights is None else weights.meta.get("categories")
    class_names = None if categories is None else tuple(categories)
    return request.with_weights(LoadedModel(model=model, class_names=class_names, libraries=("torchvision",)))


def _import_zoo(module: str, label: str) -> Any:
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch cannot register its operators
        # No extra of ours: the wheels of both libraries are tied to one build of torch.
        raise MissingExtraError(
            f"{label} comes from {library}, which cannot be imported here ({error}): pip install {library}, in the "
            "build that fits this torch",
            library=library,
        ) from error


def _cached_first(load: Callable[..., Any], location: str, options: dict[str, Any], *, local: bool, label: str) -> Any:
    try:
        try:
            return load(location, local_files_only=True, **options)
        except OSError:
            if local:
                raise
            return load(location, **options)
    except ImportError as error:
        raise MissingExtraError(f"{label}: {location} needs a library that is not installed: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        where = "offline, so the hub was not asked" if local and not Path(location).is_dir() else "not available"
        raise JobError(f"{label}: the model {location} is {where}: {error}") from error


def _commit_of(hub: Any, name: str, settings: HubSettings) -> str | None:
    """Return the commit that the cache resolved a name to; its files have been read from there by now."""
    file = hub.try_to_load_from_cache(name, settings.gguf_file or "config.json", revision=settings.revision)
    parts = Path(file).parts if isinstance(file, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _task_of(config: Any, *, gguf: bool, label: str) -> Task:
    named = getattr(config, "architectures", None) or []
    for architecture in named:
        for task, endings in _ENDINGS.items():
            if architecture.endswith(endings):
                return task
    if gguf:  # GGUF files describe their architecture themselves, and are always language models
        return "causal-lm"
    raise JobError(
        f"{label}: its architecture ({', '.join(named) or 'not named'}) has none of the known tasks: give `task` in "
        f"its arguments, one of {', '.join(map(repr, get_args(Task)))}"
    )


def _refuse_untrained(report: Mapping[str, Any], location: str, label: str) -> None:
    missing = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if missing:
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise JobError(
            f"{label}: {location} lacks weights that its task needs ({', '.join(missing[:_MAX_LISTED])}{more}), which "
            "would be initialised at random: fine-tune it first, or name the checkpoint that was"
        )


def _last_layer(model: Any, task: Task) -> nn.Module | None:
    if task == "causal-lm":
        return cast("nn.Module | None", model.get_output_embeddings())
    found = getattr(model, "classifier", getattr(model, "score", None))
    return found if isinstance(found, nn.Linear) else None


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the configuration's class names in order; None for the LABEL_0, LABEL_1, … that it makes up itself."""
    names = getattr(config, "id2label", None) or {}
    listed = tuple(str(names[number]) for number in range(len(names)) if number in names)
    made_up = all(name == f"LABEL_{number}" for number, name in enumerate(listed))
    return None if made_up or len(listed) != len(names) else listed

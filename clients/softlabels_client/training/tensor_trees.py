"""How does the state of a training become a safetensors file, and again itself? Tensors by path, the rest as JSON.

A tree is made of tensors, numbers, words, None, lists, tuples and dictionaries with words or whole numbers as keys, as
every `state_dict` of torch is. Each comes back as exactly what it was: floats to the bit, tuples as tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softlabels.errors import ManifestError, MissingExtraError, RequestError

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError(
        "keeping a training's state needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

TENSOR, TUPLE, DICT = "tensor", "tuple", "dict"


def pack(tree: Any, *, path: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A tree as JSON and tensors.

    Returns:
        What `json.dumps` takes, and the tensors by the names that stand in it: copies in the host's memory, so that
        they stay what they are while the training goes on.
    Raises:
        RequestError: something that is none of these things, named by its path.
    """
    tensors: dict[str, Tensor] = {}
    return _packed(tree, path, tensors), tensors


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` was given.

    Raises:
        ManifestError: what was kept is no such tree.
    """
    if isinstance(document, list):
        return [unpack(entry, tensors) for entry in document]
    if not isinstance(document, dict):
        return document
    ((kind, value),) = document.items()
    if kind == TENSOR and value in tensors:
        return tensors[value]
    if kind == TUPLE:
        return tuple(unpack(entry, tensors) for entry in value)
    if kind == DICT:
        return {key: unpack(entry, tensors) for key, entry in value}
    raise ManifestError(f"a kept state names the {kind} {value!r}, which is not there")


def _packed(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        _refuse_unkeepable(tree, path)
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: path}
    if isinstance(tree, list | tuple):
        entries = [_packed(entry, f"{path}/{number}", tensors) for number, entry in enumerate(tree)]
        return entries if isinstance(tree, list) else {TUPLE: entries}
    if isinstance(tree, Mapping) and all(isinstance(key, int | str) for key in tree):
        return {DICT: [[key, _packed(entry, f"{path}/{key}", tensors)] for key, entry in tree.items()]}
    raise RequestError(
        f"{path} is a {type(tree).__name__}: a checkpoint keeps tensors, numbers, words, lists, tuples and "
        "dictionaries, so a training with this state cannot be resumed exactly"
    )


def _refuse_unkeepable(tensor: Tensor, path: str) -> None:
    if tensor.layout != torch.strided or tensor.is_complex():
        raise RequestError(f"{path} is a {tensor.layout} tensor of {tensor.dtype}: a checkpoint keeps dense real ones")

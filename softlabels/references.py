"""References to users' own code: `package.module:name` and `path/to/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from softlabels.errors import ReferenceLoadError


def load_reference(reference: str, *, base: Path | None = None) -> Any:
    """Return the object that a reference names; dots in its name reach attributes.

    Args:
        reference: `package.module:name` or `folder/file.py:name`.
        base: folder that file references are relative to, usually the job file's; None for the working folder.
    Raises:
        ReferenceLoadError: malformed, not found, or the module fails to import.
    """
    where, separator, name = reference.rpartition(":")
    if not separator or not where or not name:
        raise ReferenceLoadError(
            f"{reference!r} is no reference: write 'package.module:name' or 'path/to/file.py:name'", reference=reference
        )
    found: Any = _load_module(where, base=base, reference=reference)
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            known = sorted(n for n in vars(found) if not n.startswith("_")) if hasattr(found, "__dict__") else []
            raise ReferenceLoadError(
                f"{where!r} has no {attribute!r}; it has {', '.join(known[:20]) or 'no public names'}",
                reference=reference,
            )
        found = getattr(found, attribute)
    return found


def code_sha256(obj: Any) -> str | None:
    """Return the SHA-256 of the source file that defines `obj`; None if it has none (built-in, interactive)."""
    module = sys.modules.get(getattr(obj, "__module__", "") or "")
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _load_module(where: str, *, base: Path | None, reference: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _load_file((base or Path.cwd()) / where, reference=reference)
        return importlib.import_module(where)
    except ReferenceLoadError:
        raise
    except Exception as error:  # whatever a user's module raises when it is imported
        raise ReferenceLoadError(
            f"{reference!r}: importing {where!r} failed with {type(error).__name__}: {error}", reference=reference
        ) from error


def _load_file(path: Path, *, reference: str) -> ModuleType:
    resolved = path.resolve()
    if not resolved.is_file():
        raise ReferenceLoadError(f"{reference!r}: there is no file {resolved}", reference=reference)
    # The whole path is in the name: two jobs may each have a models.py.
    name = f"softlabels_user_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ReferenceLoadError(f"{reference!r}: {resolved} cannot be imported as Python", reference=reference)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

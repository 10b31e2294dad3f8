"""Optional dependencies: turn a failed import into a sentence that names the extra to install."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from softlabels.errors import MissingExtraError


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Import optional packages inside this context.

    Args:
        extra: name of the extra that installs them, as in `pip install softlabels[extra]`.
        purpose: what cannot be done without them, for example "training a student".
    Raises:
        MissingExtraError: an import inside failed.
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or extra
        if isinstance(error, MissingExtraError) or missing.startswith("softlabels"):
            raise  # a broken installation: the extra would not bring our own modules back
        raise MissingExtraError(
            f"{purpose} needs {missing}, which is not installed: `pip install softlabels[{extra}]`", extra=extra
        ) from error

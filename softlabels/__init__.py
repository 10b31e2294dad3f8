"""softlabels: soft targets computed once, stored safely, served fast."""

from __future__ import annotations

from softlabels.errors import SoftLabelsError
from softlabels.manifest import Manifest
from softlabels.target_store import TargetStore
from softlabels.target_store import open_store as open
from softlabels.targets import SoftTargets

__all__ = ["Manifest", "SoftLabelsError", "SoftTargets", "TargetStore", "open"]

__version__ = "0.1.0"

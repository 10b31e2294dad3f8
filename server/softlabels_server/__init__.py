"""softlabels_server: soft targets over HTTP."""

from __future__ import annotations

from softlabels_server.app import create_app
from softlabels_server.catalog import StoreFolder
from softlabels_server.settings import Settings

__all__ = ["Settings", "StoreFolder", "create_app"]

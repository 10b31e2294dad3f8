"""HTTP server that hands out soft targets: `create_app(StoreFolder(folder), Settings())`."""

from __future__ import annotations

from softlabels_server.api.app import create_app
from softlabels_server.catalog import StoreFolder
from softlabels_server.settings import Settings

__all__ = ["Settings", "StoreFolder", "create_app"]

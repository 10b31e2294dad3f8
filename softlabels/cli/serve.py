"""`softlabels serve`: serve the targets of every store in a folder over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from softlabels.cli.options import given_flags, optional_flags_of
from softlabels.errors import UnknownStoreError
from softlabels.extras import needs_extra

with needs_extra("server", "softlabels serve"):
    from softlabels_server import Settings, StoreFolder
    from softlabels_server.settings import flag_of

if TYPE_CHECKING:
    from socket import socket

    from softlabels_server.catalog import BrokenStore, ServedStore

    ServerFlags = Settings
else:
    # The token itself is no flag: every user of a machine can see the arguments of its processes.
    ServerFlags = optional_flags_of(Settings, flag_of=flag_of, without={"token"})


def serve(
    folder: Annotated[Path, Parameter(name="DIR")],
    /,
    *,
    flags: Annotated[ServerFlags, Parameter(name="*")] = ServerFlags(),  # noqa: B008
) -> None:
    """Serve every store directly in DIR, or DIR itself when it is a store.

    Students then open http://HOST:PORT/NAME with `softlabels.open`. Stores that appear or are replaced later are
    noticed. Listens on this machine alone unless told otherwise; ends on Ctrl-C or SIGTERM. Each option is also read
    from a SOFTLABELS_… variable and from the TOML file of --config. docs/http.md describes the interface.

    Args:
        folder: folder of stores, or one store
    """
    with needs_extra("server", "softlabels serve"):
        from softlabels_server.process.server import listen, set_up_logging, url_of

    # Flags that were not given are left out, so that variables and the settings file count.
    settings = Settings(**given_flags(flags))
    stores = StoreFolder(folder)
    lines = [_describe(store) for store in stores]
    if not lines:
        message = f"there is no store in {folder}: make one with `softlabels precompute JOB`, or give another folder"
        raise UnknownStoreError(message, where=str(folder))
    set_up_logging(settings)
    if not settings.on_loopback and settings.token is None:
        print(
            f"softlabels: warning: anyone who reaches {settings.host} can read these stores; require a token with "
            "--token-file, or listen on 127.0.0.1",
            flush=True,
        )
    with listen(settings) as listener:
        announcement = "\n".join([f"softlabels: serving {len(lines)} store(s) at {url_of(listener)}", *lines])
        _serve(stores, settings, listener, announcement)
    print("softlabels: stopped", flush=True)


def _serve(stores: StoreFolder, settings: Settings, listener: socket, announcement: str) -> None:
    from softlabels_server import create_app
    from softlabels_server.process.scrub import scrubbing
    from softlabels_server.process.server import make_server
    from softlabels_server.process.workers import WorkerSupervisor

    def announce() -> None:
        print(announcement, flush=True)

    if settings.workers == 1:
        with scrubbing(stores.root, settings, stores.note_scrub):
            make_server(create_app(stores, settings), settings, announce=announce).run(sockets=[listener])
        return
    # Every worker maps the stores again; what this process opened was for the announcement.
    stores.close()
    WorkerSupervisor(
        stores.root,
        settings,
        listener,
        announce=announce,
        say=lambda line: print(f"softlabels: {line}", flush=True),
    ).run()


def _describe(store: ServedStore | BrokenStore) -> str:
    from softlabels_server.catalog import BrokenStore

    if isinstance(store, BrokenStore):
        return f"  {store.name}: cannot be opened: {store.error}"
    manifest = store.manifest
    state = "" if manifest.finished else ", unfinished"
    return f"  {store.name}: {manifest.rows} rows × {manifest.classes} classes, {manifest.encoding.name}{state}"

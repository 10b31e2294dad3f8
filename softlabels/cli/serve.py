"""`softlabels serve`: hand out the targets of every store in a folder over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.errors import MissingExtraError, UnknownStoreError

if TYPE_CHECKING:
    from socket import socket

    from softlabels_server import Settings, StoreFolder

_OPTIONAL = frozenset(
    {
        *("anyio", "fastapi", "httptools", "pydantic", "pydantic_settings", "starlette", "typing_extensions"),
        *("uvicorn", "uvloop"),
        *("google_crc32c", "h5py", "numcodecs", "zarr"),
    }
)
"""What the extra `server` brings, and what that imports before anything else."""

_DESCRIPTION = """\
Serve every store that lies directly in DIR, or DIR itself when it is a store. Students then open
http://HOST:PORT/NAME with `softlabels.open`. Stores that appear or are replaced later are noticed. Listens on this
machine alone unless told otherwise; ends on Ctrl-C or SIGTERM. The interface is described in docs/http.md.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `softlabels serve` to the command line."""
    parser = commands.add_parser("serve", help="serve the stores of a folder over HTTP", description=_DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of stores, or one store")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="port to listen on (default 8000); 0 takes a free one")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="ask for the bearer token in this file's first line"
    )
    parser.add_argument("--max-batch-ids", type=int, metavar="N", help="most ids in one batch (default 65536)")
    parser.add_argument("--max-reply-bytes", type=int, metavar="N", help="most bytes in one reply (default 268435456)")
    parser.add_argument("--max-body-bytes", type=int, metavar="N", help="most bytes in a request (default 16777216)")
    parser.add_argument(
        "--stall-timeout",
        type=float,
        dest="stall_timeout_s",
        metavar="SECONDS",
        help="how long the reader of an epoch stream may take for its next piece (default 600.0)",
    )
    for flag, meaning, default in (
        ("header", "time for a client to send a request's header", "10.0"),
        ("body", "time for a client to send a request's body", "30.0"),
        ("keep-alive", "how long a connection may be idle between requests", "75"),
        ("shutdown", "time for replies under way once told to stop", "5"),
    ):
        parser.add_argument(
            f"--{flag}-timeout",
            type=float if "." in default else int,
            dest=f"{flag.replace('-', '_')}_timeout_s",
            metavar="SECONDS",
            help=f"{meaning} (default {default})",
        )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that answer (default 1)")
    parser.add_argument("--access-log", action="store_true", default=None, help="log a line a request")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings; flags win over it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop; 0 then."""
    try:
        from softlabels_server import StoreFolder
        from softlabels_server.process.server import listen, set_up_logging, url_of
    except MissingExtraError:
        raise
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise  # one of our own modules, say: installing the extra would change nothing
        raise MissingExtraError(
            f"softlabels serve needs {error.name}, which is not installed: pip install 'softlabels[server]'"
        ) from error
    settings = _settings(options)
    stores = StoreFolder(options.folder)
    lines = _describe(stores)
    if not lines:
        raise UnknownStoreError(
            f"there is no store in {options.folder}: make one with `softlabels precompute JOB`, or give the folder "
            "that holds the stores",
            where=str(options.folder),
        )
    set_up_logging(settings)
    if not settings.on_loopback and settings.token is None:
        print(
            f"softlabels: warning: anyone who reaches {settings.host} can read these stores; ask for a token with "
            "--token-file, or listen on 127.0.0.1",
            flush=True,
        )
    with listen(settings) as listener:
        announcement = "\n".join([f"softlabels: serving {len(lines)} store(s) at {url_of(listener)}", *lines])
        _serve(stores, settings, listener, announcement)
    print("softlabels: stopped", flush=True)
    return 0


def _serve(stores: StoreFolder, settings: Settings, listener: socket, announcement: str) -> None:
    """Answer on the listener, in this process or in workers, until told to stop."""
    from softlabels_server import create_app
    from softlabels_server.process.server import make_server
    from softlabels_server.process.workers import WorkerSupervisor

    def announce() -> None:
        print(announcement, flush=True)

    if settings.workers == 1:
        make_server(create_app(stores, settings), settings, announce=announce).run(sockets=[listener])
        return
    # Every worker maps the stores itself; what this process opened was for the announcement.
    stores.close()
    WorkerSupervisor(
        stores.root,
        settings,
        listener,
        announce=announce,
        say=lambda line: print(f"softlabels: {line}", flush=True),
    ).run()


def _settings(options: argparse.Namespace) -> Settings:
    from softlabels_server import Settings

    # Flags that were not given are left out, so that variables and the settings file count.
    given = {name: getattr(options, name, None) for name in Settings.model_fields}
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _describe(stores: StoreFolder) -> list[str]:
    """A line a store: its name and size, or why it cannot be opened."""
    from softlabels_server.catalog import BrokenStore

    lines = []
    for store in stores:
        if isinstance(store, BrokenStore):
            lines.append(f"  {store.name}: cannot be opened: {store.error}")
            continue
        manifest = store.manifest
        state = "" if manifest.finished else ", unfinished"
        lines.append(
            f"  {store.name}: {manifest.rows} rows × {manifest.classes} classes, {manifest.encoding.name}{state}"
        )
    return lines

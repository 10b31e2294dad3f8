"""Addresses of served stores, `http(s)://host[:port][/prefix]/NAME`, and the proxies that lead to them."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from softlabels.errors import RequestError, UnknownStoreError
from softlabels.manifest import STORE_NAME

API_PATH = "/v1/stores"
"""Path between a server's base address and a store's name, in every route."""

_EXAMPLE = "http://127.0.0.1:8000/mnist"


@dataclass(frozen=True, kw_only=True)
class StoreAddress:
    """Address of a store behind a server.

    Attributes:
        scheme: http or https.
        host: host name or IP address, without brackets.
        port: the scheme's default where the URL has none.
        prefix: path before the server's routes, as reverse proxies add it; empty or beginning with "/".
        name: name of the store.
    """

    scheme: str
    host: str
    port: int
    prefix: str
    name: str

    @property
    def base_url(self) -> str:
        """Address of the server, without a trailing "/"."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    @property
    def path(self) -> str:
        """Path of the store's manifest, below `base_url`."""
        return f"{API_PATH}/{self.name}"


def parse_address(url: str) -> StoreAddress:
    """Return the parts of a store's URL. The URL of its manifest, which contains `/v1/stores`, is accepted too.

    Raises:
        RequestError: not an http(s) URL, or one with a user name, query or fragment.
        UnknownStoreError: the URL has no store's name, or one that no store can have.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RequestError(f"{url!r} is not a URL ({error}): write it like {_EXAMPLE}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise RequestError(f"{url!r} is not the URL of a store: write it like {_EXAMPLE}")
    if any(character <= " " or character > "~" for character in host + parts.path):
        raise RequestError(f"{url!r} holds spaces or characters outside ASCII: write it like {_EXAMPLE}")
    if parts.username is not None or parts.password is not None:
        raise RequestError("a URL with a user name or password in it ends up in logs: pass `token=...` instead")
    if parts.query or parts.fragment:
        raise RequestError(f"{url!r} has a query or fragment, which no store's URL has: write it like {_EXAMPLE}")
    path = parts.path.rstrip("/")
    # A URL that ends in `/v1/stores` names no store: with the added slash its name is empty, not `stores`.
    prefix, _, name = (path + "/" if path.endswith(API_PATH) else path).rpartition("/")
    prefix = prefix.rstrip("/").removesuffix(API_PATH)
    base = f"{parts.scheme}://{parts.netloc}{prefix}"
    if not name:
        raise UnknownStoreError(
            f"{url!r} is a server's URL: end it with a store's name, {base}/NAME; {base}{API_PATH} lists the names"
        )
    if not STORE_NAME.fullmatch(name):
        raise UnknownStoreError(f"no store can be called {name!r}; {base}{API_PATH} lists the server's stores")
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    return StoreAddress(scheme=parts.scheme, host=host, port=port, prefix=prefix, name=name)


def proxy_for(address: StoreAddress) -> str | None:
    """Return the proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for this address; None for none.

    An address of this machine is never behind a proxy.
    """
    if not any(value and name.lower().endswith("_proxy") for name, value in os.environ.items()):
        return None
    # Imported only here: it takes longer than all of this module, and most trainers have no proxy.
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy or _is_loopback(address.host) or proxy_bypass(f"{address.host}:{address.port}"):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")

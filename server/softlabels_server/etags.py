"""How a store's version stands in HTTP headers: quoted, in ETag, If-None-Match and If-Match.

Source: RFC 9110, sections 8.8.3 and 13.1.
"""

from __future__ import annotations


def etag_of(digest: str) -> str:
    """The strong entity tag of a version."""
    return f'"{digest}"'


def names_digest(header: str | None, digest: str) -> bool:
    """Whether an If-Match or If-None-Match header names this version; an absent one names none.

    A weak tag, which a cache on the way may have made of ours, names the version too: a digest has no near misses.
    """
    if header is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return "*" in tags or etag_of(digest) in tags

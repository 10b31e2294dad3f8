"""JSON that would exhaust memory, or is ambiguous, is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import softlabels
from softlabels.documents import MAX_DOCUMENT_BYTES, open_sealed, seal
from softlabels.errors import ManifestError


def sealed(text: str) -> bytes:
    """A document as text, without a digest: it is refused before the digest is checked."""
    return ('{"sha256": "' + "0" * 64 + '", "body": ' + text + "}").encode()


BOMBS = {
    "nested arrays": sealed("[" * 200_000 + "]" * 200_000),
    "nested objects": sealed('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a number of a million digits": sealed('{"rows": ' + "9" * 1_000_000 + "}"),
    "not a number": sealed('{"rows": NaN}'),
    "infinity": sealed('{"rows": Infinity}'),
    "a key twice": sealed('{"name": "a", "name": "b"}'),
    "a key twice outside": b'{"sha256": "0", "body": {}, "body": {}}',
    "half a document": sealed("{}")[:-5],
    "no document": b"",
    "an array": b"[1, 2, 3]",
    "a string": b'"manifest"',
    "null": b"null",
    "a body that is no object": seal([1, 2, 3]),  # type: ignore[arg-type]
    "another encoding": '{"sha256": "", "body": {}}'.encode("utf-16"),
    "bytes that are no text": b"\xff\xfe\x00\x80" * 100,
    "a lone surrogate": sealed('{"name": "\\ud800"}'),
}


class TestUnseal:
    @pytest.mark.parametrize("raw", BOMBS.values(), ids=list(BOMBS))
    def test_a_bomb(self, raw: bytes, little_memory: Any) -> None:
        """Each is a plain error, in little memory."""
        with little_memory(), pytest.raises(ManifestError):
            open_sealed(raw, what="it")

    def test_a_digest_that_lies(self) -> None:
        """A changed value, a changed digest, a digest of another type and further keys are all refused."""
        document = json.loads(seal({"name": "a", "rows": 5}))
        for lie in (
            {**document, "body": {"name": "a", "rows": 6}},
            {**document, "sha256": document["sha256"][::-1]},
            {**document, "sha256": None},
            {**document, "more": 1},
            {"body": document["body"]},
        ):
            with pytest.raises(ManifestError):
                open_sealed(json.dumps(lie).encode(), what="it")

    def test_a_key_twice_under_a_true_digest(self) -> None:
        """A reader that takes the first value would see another document than one that takes the last."""
        raw = seal({"rows": 5}).replace(b'"rows": 5', b'"rows": 6, "rows": 5')
        with pytest.raises(ManifestError, match="repeated"):
            open_sealed(raw, what="it")

    def test_what_was_sealed_is_read(self) -> None:
        """Ordinary documents pass."""
        body = {"name": "a", "nested": [{"x": 1.5}, None, True], "text": "ü"}
        assert open_sealed(seal(body), what="it") == body


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "ledger/00000000.json"])
class TestFile:
    def open(self, root: Path, name: str) -> None:
        """Read the store so that this document is needed."""
        if name == "plan.json":
            (root / "manifest.json").unlink(missing_ok=True)
        softlabels.open(root).batch([0])

    def test_far_too_large(self, store: Path, name: str, little_memory: Any) -> None:
        """A (sparse) file of terabytes is refused by its size."""
        with (store / name).open("r+b") as file:
            file.truncate(1 << 40)
        with little_memory(), pytest.raises(ManifestError, match="bytes, more than"):
            self.open(store, name)
        with (store / name).open("r+b") as file:
            file.truncate(MAX_DOCUMENT_BYTES)
        with little_memory(200), pytest.raises(ManifestError):
            self.open(store, name)

    def test_a_link(self, store: Path, name: str) -> None:
        """A link to a device without end, to a file outside, or to the very file itself is not followed."""
        path = store / name
        moved = store.parent / "moved.json"
        path.rename(moved)
        for target in (Path("/dev/zero"), moved, Path("/etc/passwd")):
            path.symlink_to(target)
            with pytest.raises(ManifestError, match="not a plain file"):
                self.open(store, name)
            path.unlink()

    def test_a_pipe(self, store: Path, name: str) -> None:
        """A named pipe would block its reader for ever."""
        (store / name).unlink()
        os.mkfifo(store / name)
        with pytest.raises(ManifestError, match="not a plain file"):
            self.open(store, name)

    def test_a_folder(self, store: Path, name: str) -> None:
        """A folder where a document must be is an error of its own, not "missing"."""
        (store / name).unlink()
        (store / name).mkdir()
        with pytest.raises(ManifestError, match="not a plain file"):
            self.open(store, name)

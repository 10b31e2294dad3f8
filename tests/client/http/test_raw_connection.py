"""Memory of replies is used again, and never while anybody still looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels import wire
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client.http.raw_connection import Buffers

LARGE = 1 << 17
"""Above the size below which memory is left to the allocator."""


def of_reply(blob: memoryview) -> Any:
    """An array as it is made of a reply."""
    layout = wire.parse_header(wire.to_bytes({"a": np.zeros(1000, dtype="<i8")}, {}))
    return np.ndarray((1000,), dtype=layout.entries[0][1], buffer=blob, offset=layout.data_begin)


LOOKS: dict[str, Callable[[memoryview], Any]] = {
    "the memory": lambda blob: blob,
    "read-only": lambda blob: blob.toreadonly(),
    "an array": of_reply,
    "an array of what is read-only": lambda blob: of_reply(blob.toreadonly()),
    "a part of an array": lambda blob: of_reply(blob)[5:],
    "another type": lambda blob: of_reply(blob).view("<u2"),
    "another shape": lambda blob: of_reply(blob).reshape(10, 100)[:, 3],
    "from the buffer": lambda blob: np.frombuffer(blob.toreadonly(), dtype="<i8", offset=8),
    "as an array": lambda blob: np.asarray(blob),
}


class TestBuffers:
    @pytest.mark.parametrize("look", LOOKS)
    def test_what_is_looked_at_is_not_lent_again(self, look: str) -> None:
        """However it is looked at; once nobody does, it is."""
        buffers = Buffers()
        kept: Any = LOOKS[look](buffers.take(LARGE))
        expected = bytes(kept)
        for value in (1, 2, 3):
            other: Any = buffers.take(LARGE)
            np.asarray(other)[:] = value
        assert bytes(kept) == expected
        address = np.asarray(other).ctypes.data
        other = None
        assert np.asarray(buffers.take(LARGE)).ctypes.data == address

    def test_a_batch_outlives_the_next_ones(self, tmp_path: Path, serve: Any, make_store: Any) -> None:
        """Where of a batch its ids or its targets alone are kept: in batches, and in an epoch."""
        inputs = ArrayTransferSet("noise", np.zeros((2000, 1), dtype=np.float32))
        logits_BC = np.random.default_rng(0).normal(size=(2000, 100)).astype(np.float32)
        make_store(tmp_path / "stores" / "large", inputs, logits_BC)
        with softlabels.open(serve(tmp_path / "stores") + "/large") as store:
            ids = np.arange(2000)
            kept = [store.batch(ids[first : first + 250]) for first in range(0, 2000, 250)]
            np.testing.assert_array_equal(np.concatenate([batch.ids for batch in kept]), ids)
            targets = [batch.encoded["targets"] for batch in kept]
            del kept
            seen = []
            for batch in store.epoch(seed=0, epoch=0, batch_size=250):
                seen.append(batch.ids)
            np.testing.assert_array_equal(np.sort(np.concatenate(seen)), ids)
            again = store.batch(ids).encoded["targets"]
            np.testing.assert_array_equal(np.concatenate(targets), again)

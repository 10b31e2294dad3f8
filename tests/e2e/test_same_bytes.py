"""One row, four readers: zarr-python, a store on disk, a store behind HTTP, and plain HTTP with safetensors."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import zarr
from safetensors.numpy import load

import softlabels

IDS = [199, 0, 64, 63, 0, 128]


def test_every_reader_sees_the_same_bytes(tiny_store: Path, served_store: str) -> None:
    """What lies on disk is what the server sends and what a trainer decodes, bit for bit."""
    with softlabels.open(tiny_store) as near, softlabels.open(served_store) as far:
        (array_name,) = near.manifest.make_encoding().fields
        on_disk = zarr.open_group(str(tiny_store), mode="r")[array_name][:][IDS]
        near_batch, far_batch = near.batch(IDS), far.batch(IDS)
        assert type(near) is type(far)
        assert near.digest == far.digest
    base, _, name = served_store.rpartition("/")
    request = urllib.request.Request(
        f"{base}/v1/stores/{name}/batch",
        data=json.dumps({"ids": IDS}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        by_hand = load(reply.read())
    for found in (near_batch.encoded["targets"], far_batch.encoded["targets"], by_hand["targets"]):
        np.testing.assert_array_equal(found.view(np.uint16), on_disk.view(np.uint16))
    np.testing.assert_array_equal(by_hand["ids"], IDS)
    np.testing.assert_array_equal(near_batch.p(7.0), far_batch.p(7.0))

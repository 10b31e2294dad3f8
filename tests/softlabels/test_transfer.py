"""The import path that 0.1.0 had for transfer sets."""

from __future__ import annotations

from softlabels import transfer, transfer_set


def test_the_names_of_version_0_1_0_are_those_of_transfer_set() -> None:
    """Job modules written for 0.1.0, which name `softlabels.transfer`, get the same classes and functions."""
    renamed = {"MapStyle": "MapStyleDataset"}
    for name in transfer.__all__:
        assert getattr(transfer, name) is getattr(transfer_set, renamed.get(name, name))

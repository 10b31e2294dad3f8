"""What can be set, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from softlabels.errors import RequestError
from softlabels_server import Settings


class TestSettings:
    def test_nobody_else_can_reach_it_unless_told_otherwise(self) -> None:
        """The default address is this machine's own."""
        assert Settings().host == "127.0.0.1"
        assert Settings().on_loopback

    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            ("localhost", True),
            ("127.3.2.1", True),
            ("::1", True),
            ("0.0.0.0", False),
            ("::", False),
            ("gpu-box", False),
        ],
    )
    def test_which_addresses_are_this_machine_alone(self, host: str, expected: bool) -> None:
        """A name that is not `localhost` may lead anywhere."""
        assert Settings(host=host).on_loopback is expected

    @pytest.mark.parametrize(
        "bad",
        [
            {"host": ""},
            {"port": -1},
            {"port": 65_536},
            {"max_batch_ids": 0},
            {"max_reply_bytes": 0},
            {"max_body_bytes": -1},
            {"header_timeout_s": 0},
            {"body_timeout_s": float("nan")},
            {"keep_alive_timeout_s": 0},
            {"shutdown_timeout_s": 0},
            {"stall_timeout_s": 0.0},
            {"workers": 0},
            {"workers": 257},
            {"workers": 1.5},
            {"token": ""},
            {"token": " "},
            {"token": "schlüssel"},
            {"token": "two\nlines"},
        ],
        ids=str,
    )
    def test_nonsense_is_refused(self, bad: dict[str, Any]) -> None:
        """When the settings are made, not when a request meets them."""
        with pytest.raises(RequestError):
            Settings(**bad)

    def test_they_do_not_change(self) -> None:
        """Frozen, and the token is not shown where the settings are printed."""
        settings = Settings(token="s3cret")
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.port = 1  # type: ignore[misc]
        assert "s3cret" not in repr(settings)

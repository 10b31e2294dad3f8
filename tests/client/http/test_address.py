"""Where a served store is: what its URL says, and which URLs are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.errors import RequestError, UnknownStoreError
from softlabels_client import parse_address


class TestParseAddress:
    @pytest.mark.parametrize(
        ("url", "base", "name"),
        [
            ("http://127.0.0.1:8000/mnist", "http://127.0.0.1:8000", "mnist"),
            ("http://host/mnist/", "http://host:80", "mnist"),
            ("https://host/mnist", "https://host:443", "mnist"),
            ("https://host:8443/a/b/mnist.v2", "https://host:8443/a/b", "mnist.v2"),
            ("http://[::1]:8000/mnist", "http://[::1]:8000", "mnist"),
            ("HTTP://Host/mnist", "http://host:80", "mnist"),
            ("http://host/v1/stores/mnist", "http://host:80", "mnist"),
            ("http://host/lab/v1/stores/mnist", "http://host:80/lab", "mnist"),
        ],
    )
    def test_the_last_segment_is_the_store(self, url: str, base: str, name: str) -> None:
        """What stands before it is the server, with a proxy's path; the manifest's own URL means the same."""
        address = parse_address(url)
        assert (address.base_url, address.name, address.path) == (base, name, f"/v1/stores/{name}")

    @pytest.mark.parametrize("url", ["http://host", "http://host/", "http://host:8000//", "http://host/v1/stores/"])
    def test_a_url_without_a_store_says_where_names_are(self, url: str) -> None:
        """The message names the list of stores."""
        with pytest.raises(UnknownStoreError, match="/v1/stores"):
            parse_address(url)

    @pytest.mark.parametrize("name", ["..", ".hidden", "a%2Fb", "a" * 129, "a~b"])
    def test_a_name_that_no_store_can_have_is_unknown(self, name: str) -> None:
        """No request is made for it."""
        with pytest.raises(UnknownStoreError, match="no store can be called"):
            parse_address(f"http://host/{name}")

    @pytest.mark.parametrize(
        "url",
        [
            "mnist",
            "ftp://host/mnist",
            "http:///mnist",
            "http://host:99999/mnist",
            "http://host:http/mnist",
            "http://[::1/mnist",
            "http://host/mnist?x=1",
            "http://host/mnist#top",
            "http://ho st/mnist",
            "http://host/a b/mnist",
            "http://höst/mnist",
            "",
        ],
    )
    def test_what_is_no_store_url_is_refused(self, url: str) -> None:
        """The message shows how one is written."""
        with pytest.raises(RequestError, match=r"like http://|says nothing here"):
            parse_address(url)

    def test_secrets_in_urls_are_refused_and_not_repeated(self) -> None:
        """A password would stand in logs and manifests."""
        with pytest.raises(RequestError, match="token=") as caught:
            parse_address("http://me:hunter2@host/mnist")
        assert "hunter2" not in str(caught.value)

    @given(st.text(max_size=60))
    def test_junk_never_fails_otherwise(self, text: str) -> None:
        """Whatever the text, it is an address or one of two errors."""
        for url in (text, f"http://{text}", f"http://host/{text}", f"http://host:{text}/x"):
            try:
                address = parse_address(url)
            except (RequestError, UnknownStoreError):
                continue
            assert address.host
            assert "\n" not in address.prefix

"""docs/http.md keeps up with the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softlabels.cli import app
from softlabels_server import Settings, StoreFolder, create_app
from softlabels_server.api.openapi import BATCH_PATH
from softlabels_server.api.requests import BatchQuery, BatchRequest
from softlabels_server.settings import flag_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    """docs/http.md."""
    return (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


class TestPage:
    def test_every_route_has_a_heading(self, page: str, tmp_path: Path) -> None:
        """`## METHOD path` for each that the app answers, and for no other."""
        paths = create_app(StoreFolder(tmp_path), Settings()).openapi()["paths"]
        expected = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
        expected.add("GET /openapi.json")
        assert set(re.findall(r"^## `((?:GET|POST) \S+)`", page, re.MULTILINE)) == expected

    def test_every_key_of_a_request_is_described(self, page: str) -> None:
        """A row of the table each."""
        keys = {*BatchRequest.__struct_fields__, *BatchQuery.__struct_fields__}
        assert [key for key in sorted(keys) if f"\n| `{key}` |" not in page] == []

    def test_every_status_and_code_of_the_batch_route_is_described(self, page: str, tmp_path: Path) -> None:
        """Those that OpenAPI promises."""
        replies = create_app(StoreFolder(tmp_path), Settings()).openapi()["paths"][BATCH_PATH]["post"]["responses"]
        for status, reply in replies.items():
            if status.isdecimal():
                assert status in page
                for code in re.findall(r"`([a-z-]+)`", reply["description"]):
                    assert f"`{code}`" in page, code

    def test_every_setting_is_described(self, page: str) -> None:
        """A row each: flag, variable, TOML key, default."""
        for name, field in Settings.model_fields.items():
            default = "none" if field.default is None else str(field.default).lower()
            flag = "" if name == "token" else f"`{flag_of(name)}`"
            row = f"| {flag} | `SOFTLABELS_{name.upper()}` | `{name}` | {default} |".replace("|  |", "| |")
            assert f"\n{row}" in page, row

    def test_every_option_is_described(self, page: str) -> None:
        """Each option of `softlabels serve`; those that set a setting name its default in --help too."""
        arguments = app["serve"].assemble_argument_collection()
        told = {name: argument.parameter.help or "" for argument in arguments for name in argument.names}
        options = {name for name in told if name.startswith("--")}
        assert [name for name in sorted(options) if f"`{name}`" not in page] == []
        assert {flag_of(name) for name in Settings.model_fields} - options == {"--token"}
        for name, field in Settings.model_fields.items():
            if field.default:
                assert f"default {field.default}" in told[flag_of(name)], name

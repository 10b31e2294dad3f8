"""Settings: defaults, refused values, and where values come from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from softlabels.errors import RequestError
from softlabels_server import Settings


class TestSettings:
    def test_only_this_machine_can_reach_it_by_default(self) -> None:
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
        with pytest.raises(ValidationError, match="frozen"):
            settings.port = 1  # type: ignore[misc]
        assert "s3cret" not in repr(settings)


class TestSources:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """A settings file."""
        path = tmp_path / "server.toml"
        path.write_text("port = 7001\nworkers = 2\nmax_batch_ids = 10\n")
        return path

    def test_flags_win_over_variables_and_those_over_the_file(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And the file wins over defaults; a value that is not given leaves the next source's."""
        monkeypatch.setenv("SOFTLABELS_PORT", "7002")
        monkeypatch.setenv("SOFTLABELS_WORKERS", "3")
        settings = Settings(config=file, port=7003)
        found = (settings.port, settings.workers, settings.max_batch_ids, settings.stall_timeout_s)
        assert found == (7003, 3, 10, 600.0)

    def test_a_variable_may_name_the_file(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """SOFTLABELS_CONFIG, for containers; a file that is given wins."""
        monkeypatch.setenv("SOFTLABELS_CONFIG", str(file))
        assert Settings().port == 7001
        (file.parent / "other.toml").write_text("port = 7009\n")
        assert Settings(config=file.parent / "other.toml").port == 7009

    @pytest.mark.parametrize(
        ("variable", "value", "named"),
        [("PORT", "http", "SOFTLABELS_PORT is 'http'"), ("ACCESS_LOG", "perhaps", "SOFTLABELS_ACCESS_LOG")],
    )
    def test_a_bad_variable_is_refused_by_name(
        self, variable: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message has the name of the variable."""
        monkeypatch.setenv(f"SOFTLABELS_{variable}", value)
        with pytest.raises(RequestError, match=named):
            Settings()

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("prot = 7001", "prot in the settings file is not a setting"),
            ('workers = "many"', "workers in the settings file is 'many'"),
            ("port = ", "cannot be read"),
        ],
    )
    def test_a_bad_file_is_refused(self, tmp_path: Path, text: str, named: str) -> None:
        """Unknown keys, wrong types and what is not TOML."""
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(RequestError, match=named):
            Settings(config=tmp_path / "bad.toml")

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        """It is not taken for an empty one."""
        with pytest.raises(RequestError, match="cannot be read"):
            Settings(config=tmp_path / "missing.toml")

    def test_the_token_may_come_from_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its first line, also where a variable names the file; not beside a token."""
        (tmp_path / "token").write_text(" s3cret \nnot this\n")
        monkeypatch.setenv("SOFTLABELS_TOKEN_FILE", str(tmp_path / "token"))
        assert Settings().token == "s3cret"
        with pytest.raises(RequestError, match="both set"):
            Settings(token="another")

    def test_workers_get_the_same_settings(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are sent to each worker as they were read, whatever the file says by then."""
        sent = pickle.dumps(Settings(config=file))
        file.unlink()
        monkeypatch.setenv("SOFTLABELS_PORT", "1")
        assert pickle.loads(sent).port == 7001

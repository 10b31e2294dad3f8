"""Options derived from types, and what the command line does with bad ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from softlabels.cli import COMMANDS, _with_empty_values, app, main
from softlabels.cli.options import flags_of, json_object, settings_from
from softlabels.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Oven:
    """Settings of an oven.

    Attributes:
        heat: degrees.
        extras: further settings.
        minutes: when to turn.
    """

    heat: float = 180.0
    extras: Mapping[str, Any] = field(default_factory=dict)
    minutes: tuple[int, ...] = ()


class TestFlags:
    def test_names_and_defaults_are_the_types(self) -> None:
        """Nothing is written twice; a mapping is a JSON text until it is parsed."""
        flags = flags_of(Oven)()
        assert (flags.heat, flags.extras, flags.minutes) == (180.0, "{}", ())
        assert settings_from(flags, Oven) == Oven()

    def test_json_becomes_a_mapping(self) -> None:
        """As the settings have it."""
        assert settings_from(flags_of(Oven)(extras='{"fan": 2}'), Oven) == Oven(extras={"fan": 2})

    @pytest.mark.parametrize("text", ["{", "[1]", "fan"])
    def test_what_is_no_json_object_is_refused(self, text: str) -> None:
        """With the option's name and an example."""
        with pytest.raises(RequestError, match=r"--extras .*write it like"):
            json_object("--extras", text)


class TestMain:
    @pytest.mark.parametrize(
        "arguments",
        [[], ["nope"], ["status"], ["plan", "job.toml", "--rows", "many"], ["verify", "s", "--sample", "0"]],
    )
    def test_bad_arguments_are_one_message_and_exit_code_2(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On stderr, with where to read more."""
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "--help`" in said.err

    def test_an_error_of_ours_is_exit_code_1(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With its code."""
        assert main(["status", str(tmp_path)]) == 1
        assert "[unknown-store]" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [name for name in COMMANDS if name != "serve"])
    def test_every_command_has_help(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        """More than its line in the list."""
        assert main([command, "--help"]) == 0
        assert f"Usage: softlabels {command}" in capsys.readouterr().out

    def test_completion_can_be_installed(self) -> None:
        """Of bash, zsh and fish."""
        assert "--install-completion" in list(app)

    def test_cache_may_stand_without_a_folder(self) -> None:
        """At the end, before another option, and with a folder."""
        assert _with_empty_values(["--cache"]) == ["--cache="]
        assert _with_empty_values(["--cache", "--log", "x"]) == ["--cache=", "--log", "x"]
        assert _with_empty_values(["--cache", "here"]) == ["--cache", "here"]

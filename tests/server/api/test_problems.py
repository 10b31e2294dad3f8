"""Errors as problem details, and the token."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from softlabels.errors import StoreChangedError
from softlabels.wire import all_error_classes, from_problem
from softlabels_server.api.problems import reply_to


def add_failing_routes(app: FastAPI) -> None:
    """Routes that fail as no route should."""

    def fails() -> None:
        secret = "hunter2"
        raise ZeroDivisionError(f"in {__file__} with {secret}")

    def counts(n: int) -> int:
        return n

    app.add_api_route("/fails", fails)
    app.add_api_route("/counts", counts)


class TestProblems:
    def test_a_path_that_leads_nowhere(self, ask: Any) -> None:
        """404 as problem details, not as the framework's own JSON."""
        assert ask("GET", "/v2/stores").problem() == (404, "not-found")
        assert ask("GET", "/docs").problem() == (404, "not-found")

    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/v1/stores/dense/batch"), ("POST", "/v1/stores"), ("DELETE", "/v1/stores/dense")]
    )
    def test_a_method_that_is_not_allowed(self, ask: Any, method: str, path: str) -> None:
        """405, saying which are."""
        answer = ask(method, path)
        assert answer.problem() == (405, "bad-request")
        assert answer.headers["allow"] in answer.json()["detail"]

    def test_the_client_gets_the_same_class(self, ask: Any) -> None:
        """`from_problem` rebuilds the class that the server raised, with its context."""
        error = from_problem(ask.batch("dense", {"ids": [0], "digest": "abc"}).json())
        assert type(error) is StoreChangedError
        assert error.context["yours"] == "abc"

    def test_unexpected_errors(self, serve: Any, stores: Any, caplog: pytest.LogCaptureFixture) -> None:
        """500 without internals; the log has the traceback and the number that the reply names."""
        ask = serve(stores.root, change=add_failing_routes)
        with caplog.at_level(logging.ERROR):
            answer = ask("GET", "/fails")
        assert answer.problem() == (500, "error")
        assert b"hunter2" not in answer.body
        assert b"ZeroDivision" not in answer.body
        assert answer.json()["context"]["incident"] in caplog.text
        assert any(record.exc_info and "hunter2" in str(record.exc_info[1]) for record in caplog.records)
        assert ask("GET", "/health").status == 200

    def test_validation_by_the_framework(self, serve: Any, stores: Any) -> None:
        """Its errors take the one form too."""
        ask = serve(stores.root, change=add_failing_routes)
        answer = ask("GET", "/counts?n=many")
        assert answer.problem() == (422, "bad-request")
        assert "query.n" in answer.json()["detail"]

    @pytest.mark.parametrize("error", all_error_classes(), ids=lambda error: error.code)
    def test_all_error_classes_has_a_reply(self, error: Any) -> None:
        """Context that JSON cannot hold as it is comes out in a form that it can."""
        context = {"n": np.int64(3), "x": float("nan"), "a": np.arange(2), "p": Path("/x"), "s": {1}, "half": "\ud800"}
        reply = reply_to(error("why", **context))
        assert reply.status_code == error.status
        assert b'"n": 3' in reply.body
        assert b'"x": "nan"' in reply.body


class TestToken:
    TOKEN = "correct-horse"

    def test_requests_without_it_are_refused(self, serve: Any, stores: Any) -> None:
        """401 on every route but /health, also where nothing is; the token itself opens them."""
        ask = serve(stores.root, token=self.TOKEN)
        right = {"authorization": f"Bearer {self.TOKEN}"}
        for path in ("/v1/stores", "/v1/stores/dense", "/openapi.json", "/nowhere"):
            answer = ask("GET", path)
            assert answer.problem() == (401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert ask.batch("dense", {"ids": [0]}).problem() == (401, "unauthorized")
        assert ask("GET", "/health").status == 200
        assert ask("GET", "/v1/stores", **right).status == 200
        assert ask.batch("dense", {"ids": [0]}, **right).status == 200

    @pytest.mark.parametrize(
        "header", ["Bearer correct-hors", "Bearer correct-horse2", "Basic correct-horse", "Bearer", "", "Bearer ÿþ"]
    )
    def test_another_token_is_refused(self, serve: Any, stores: Any, header: str) -> None:
        """Near misses, other schemes and bytes that are no ASCII."""
        ask = serve(stores.root, token=self.TOKEN)
        assert ask("GET", "/v1/stores", authorization=header).status == 401

    def test_the_scheme_has_no_case(self, serve: Any, stores: Any) -> None:
        """`bearer` is `Bearer` (RFC 9110, section 11.1)."""
        ask = serve(stores.root, token=self.TOKEN)
        assert ask("GET", "/v1/stores", authorization=f"bearer {self.TOKEN}").status == 200

"""The OpenAPI document: valid, complete, and in agreement with the routes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI
from pydantic import TypeAdapter

from softlabels_server import Settings, StoreFolder, create_app
from softlabels_server.api.openapi import BATCH_PATH
from softlabels_server.api.replies import MEDIA_TYPES

BATCH = "/v1/stores/{name}/batch"
EPOCHS = "/v1/stores/{name}/epochs/{epoch}"
CONSTANTS = "/v1/stores/{name}/constants"


@pytest.fixture(scope="module")
def document(ask: Any) -> dict[str, Any]:
    """As the server sends it."""
    found: dict[str, Any] = ask("GET", "/openapi.json").json()
    return found


def every(key: str, node: Any) -> Iterator[Any]:
    """Every value that stands under a key, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from every(key, value)
    elif isinstance(node, list):
        for item in node:
            yield from every(key, item)


class TestDocument:
    def test_it_is_openapi(self, document: dict[str, Any]) -> None:
        """FastAPI's models of OpenAPI 3.1 accept it, and nothing that they do not know is in an operation."""
        assert document["openapi"].startswith("3.1")
        TypeAdapter(OpenAPI).validate_python(document)
        for path in document["paths"].values():
            for operation in path.values():
                assert set(operation) <= {
                    *("tags", "summary", "description", "operationId", "parameters", "requestBody"),
                    *("responses", "security"),
                }
                assert all("description" in reply for reply in operation["responses"].values())

    def test_every_reference_leads_somewhere(self, document: dict[str, Any]) -> None:
        """`$ref` names a component that is there."""
        references = set(every("$ref", document))
        assert references
        for reference in references:
            node: Any = document
            for part in reference.removeprefix("#/").split("/"):
                node = node[part]

    def test_operations_are_told_apart(self, document: dict[str, Any]) -> None:
        """Generated clients name their functions by the operation's id."""
        ids = list(every("operationId", document["paths"]))
        assert len(ids) == len(set(ids)) == 6

    def test_no_route_is_missing(self, document: dict[str, Any]) -> None:
        """Plain ASGI routes too."""
        paths = {"/health", "/v1/stores", "/v1/stores/{name}", BATCH, EPOCHS, CONSTANTS}
        assert set(document["paths"]) == paths
        assert BATCH_PATH == BATCH

    def test_errors_are_problems_everywhere(self, document: dict[str, Any]) -> None:
        """The framework's own form of validation errors is nowhere promised."""
        assert "HTTPValidationError" not in str(document)
        for operation in every("responses", document["paths"]):
            for status, reply in operation.items():
                if status[0] in "45":
                    assert set(reply["content"]) == {"application/problem+json"}


class TestBatchRoute:
    def test_its_examples_are_answered(self, document: dict[str, Any], ask: Any) -> None:
        """Each example body is taken; what it asks for may not be there."""
        examples = document["paths"][BATCH]["post"]["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            answer = ask.batch("named" if "string" in example["summary"] else "dense", example["value"])
            assert answer.status == 200 or answer.problem() == (404, "unknown-id")

    def test_both_bodies_and_the_file_are_described(self, document: dict[str, Any]) -> None:
        """JSON and binary in, every form out, with the version in a header."""
        operation = document["paths"][BATCH]["post"]
        assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
        assert set(operation["responses"]["200"]["content"]) == set(MEDIA_TYPES.values())
        assert "Softlabels-Digest" in operation["responses"]["200"]["headers"]

    def test_what_is_described_is_what_is_taken(self, document: dict[str, Any]) -> None:
        """Keys of the body and of the query are those that the parser knows."""
        from softlabels_server.api.requests import BatchQuery, BatchRequest

        described = document["components"]["schemas"]["BatchRequest"]["properties"]
        assert set(described) == set(BatchRequest.__struct_fields__)
        parameters = document["paths"][BATCH]["post"]["parameters"]
        in_query = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
        assert in_query == set(BatchQuery.__struct_fields__)


class TestToken:
    def test_it_is_described_where_it_is_asked_for(self, tmp_path: Path) -> None:
        """And /health goes without."""
        document = create_app(StoreFolder(tmp_path), Settings(token="t")).openapi()
        assert document["security"] == [{"token": []}]
        assert document["paths"]["/health"]["get"]["security"] == []
        assert "security" not in create_app(StoreFolder(tmp_path), Settings()).openapi()

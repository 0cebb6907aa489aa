"""The OpenAPI description is true: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from .conftest import TOKEN, Served

HEADERS = {"authorization": f"Bearer {TOKEN}"}
CHECKS = (
    schemathesis.checks.not_a_server_error, schemathesis.checks.response_schema_conformance,
    schemathesis.checks.status_code_conformance, schemathesis.checks.content_type_conformance,
)  # fmt: skip


@pytest.fixture
def described(scripted_server: Served) -> Any:
    return schemathesis.openapi.from_url(f"{scripted_server.url}/openapi.json", headers=HEADERS)


api = schemathesis.pytest.from_fixture("described")


@api.parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
def test_every_operation_does_what_its_description_says(case: Any) -> None:
    case.call_and_validate(headers=HEADERS, checks=CHECKS)


def test_the_description_names_every_operation_and_no_foreign_url(scripted_server: Served) -> None:
    answer = scripted_server.http.get("/openapi.json")
    found = answer.json()
    operations = sum(len(methods) for methods in found["paths"].values())
    assert operations >= 30
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "HTTPValidationError" not in answer.text
    for path, methods in found["paths"].items():
        for method in methods.values():
            assert method["security"] == ([] if path == "/health" else [{"token": []}])
            assert "422" not in method["responses"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_there_are_no_pages_that_load_from_elsewhere(scripted_server: Served, path: str) -> None:
    assert scripted_server.http.get(path).status_code == 404

"""The OpenAPI description is true: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from .conftest import PATIENCE_S, TOKEN, Served

HEADERS = {"authorization": f"Bearer {TOKEN}"}
EXAMPLES = 8
CHECKS = (
    schemathesis.checks.not_a_server_error, schemathesis.checks.response_schema_conformance,
    schemathesis.checks.status_code_conformance, schemathesis.checks.content_type_conformance,
)  # fmt: skip


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_operation_does_what_its_description_says(
    scripted_server: Served, mode: schemathesis.GenerationMode
) -> None:
    described = schemathesis.openapi.from_dict(scripted_server.http.get("/openapi.json").json())
    tried, free = set(), set()
    for found in described.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not (operation.body or operation.query or operation.path_parameters):
            free.add((operation.method.upper(), operation.path))
            continue  # nothing can be wrong about it

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            tried.add((case.method.upper(), case.path))
            case.call_and_validate(
                base_url=scripted_server.url, headers=HEADERS, timeout=PATIENCE_S, checks=CHECKS
            )

        check()
    every = {(method.upper(), path) for path, methods in described.raw_schema["paths"].items() for method in methods}
    assert tried | free == every
    assert len(every) >= 26


def test_the_description_names_every_operation_and_no_foreign_url(scripted_server: Served) -> None:
    answer = scripted_server.http.get("/openapi.json")
    found = answer.json()
    operations = sum(len(methods) for methods in found["paths"].values())
    assert operations >= 26
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

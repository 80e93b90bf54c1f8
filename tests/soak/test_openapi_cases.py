"""Requests that schemathesis makes from the OpenAPI document are answered as they should be."""

from __future__ import annotations

import pytest

from tests.soak.hostile import POSTS

pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")


@pytest.mark.slow
def test_requests_made_from_the_openapi_document() -> None:
    from tests.soak import openapi_cases

    counts = openapi_cases.run(examples=15, seed=0)
    assert {name.rpartition(" ")[0] for name in counts} >= {f"POST {path}" for path in POSTS}

"""docs/concepts/fp8-cache.md shows the committed result of benchmarks/fp8_error.py."""

from __future__ import annotations

import json

from benchmarks.fp8_error import RESULT

MEASURED = json.loads(RESULT.read_text())


def test_the_result_names_machine_and_commit() -> None:
    env = MEASURED["env"]
    assert env["cpu"] and len(env["commit"]) == 40 and not env["dirty"]


def test_claims_of_the_page() -> None:
    """The measured figures support the words of the page."""
    for row in MEASURED["layers"]:
        assert row["recall"] > 0.97
        # the codes of the latents are nearly all of the error
        assert row["output_error"] < 1.1 * row["output_error_same_selection"] < 0.05
    cost = MEASURED["bytes_per_token"]
    assert cost["fp8_ds_mla"] == 6 * 788
    assert 3.5 < cost["float32"] / cost["fp8_ds_mla"] < 3.6
    for row in MEASURED["retrieval"]:
        assert row["right"]["fp8_ds_mla"] >= row["right"]["float32"] - 1

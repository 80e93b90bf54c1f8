"""The worked examples of V4 steps, whole outputs, and refused inputs.

`tests/data/v4_prepare_golden.json` was computed by a loop that shares no code with the package,
and checked by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig

GOLDEN = json.loads(
    (Path(__file__).resolve().parent.parent / "data" / "v4_prepare_golden.json").read_text("utf-8")
)
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLDEN["cases"]}
ERRORS: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLDEN["errors"]}

FIELDS = {
    "W": "window_size",
    "k": "spec_tokens",
    "P": "block_size",
    "r1": "csa_ratio",
    "r2": "hca_ratio",
    "topk": "index_topk",
    "S": "num_slots",
    "NB": "num_blocks",
    "MB": "max_blocks_per_seq",
    "Bcap": "max_num_seqs",
    "Tcap": "max_num_tokens",
    "Qcap": "max_tokens_per_seq",
    "Lmax": "max_model_len",
    "swa": "swa",
    "comp_base": "comp_base",
}


def config_of(symbols: dict[str, Any], **changes: Any) -> V4PrepareConfig:
    """The configuration that the symbols of an example stand for."""
    return V4PrepareConfig(**{FIELDS[name]: value for name, value in symbols.items()} | changes)


def error_config() -> V4PrepareConfig:
    """The configuration of all refused inputs."""
    return config_of(GOLDEN["error_config"])


def inputs_of(case: dict[str, Any]) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """ctx, q, slot and block table of an example or of a refused step, as lists."""
    given = case.get("in", case)
    return given["ctx"], given["q"], given["slot"], given["block_table"]


def assert_outputs(case: dict[str, Any], get: Callable[[str], Any]) -> None:
    """Compare every output that the example has; `get(name)` is a NumPy array."""
    names = list(OUTPUT_SHAPES(config_of(case["config"])))
    assert set(names) <= set(case["out"]), set(names) - set(case["out"])
    for name in names:
        found = get(name)
        assert found.dtype == np.int32, name
        if name == "hca_idx":
            found = found[: int(get("counts")[2])]
        assert found.tolist() == case["out"][name], f"{case['name']}: {name}"

"""The worked examples of V4 steps: whole outputs, fingerprints of large ones, and refused inputs.

`tests/data/v4_prepare_golden.json` was computed by a loop that shares no code with the package,
and its small cases were checked by hand.
"""

from __future__ import annotations

import hashlib
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
    ctx, q, slot = given["ctx"], given["q"], given["slot"]
    if "block_table" in given:
        return ctx, q, slot, given["block_table"]
    return ctx, q, slot, _table_by_rule(case["config"], given)


def _table_by_rule(symbols: dict[str, Any], given: dict[str, Any]) -> list[list[int]]:
    """The block table of the long example: used cells are counted row by row."""
    table = np.full((len(given["ctx"]), symbols["MB"]), -1, np.int32)
    number = 0
    for row, ctx in enumerate(given["ctx"]):
        for column in range(-(-ctx // symbols["P"])):
            table[row, column] = (1237 * number + 77) % 4096
            number += 1
    assert sha256(table) == given["block_table_sha256"]
    return table.tolist()


def sha256(array: np.ndarray) -> str:
    """Fingerprint of an array as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(array, "<i4").tobytes()).hexdigest()


def assert_outputs(case: dict[str, Any], get: Callable[[str], Any]) -> None:
    """Compare every output that the example has; `get(name)` is a NumPy array, or None.

    None is allowed for `hca_idx` alone, of a builder in table mode.
    """
    expected = case.get("out") or case["out_compact"]
    names = list(OUTPUT_SHAPES(config_of(case["config"])))
    assert set(names) <= set(expected), set(names) - set(expected)
    num_hca = int(np.asarray(get("counts"))[2])
    for name in names:
        found = get(name)
        if name == "hca_idx":
            if found is None:
                continue
            found = np.asarray(found)[:num_hca]
        found = np.asarray(found)
        assert found.dtype == np.int32, name
        if "out" in case:
            assert found.tolist() == expected[name], f"{case['name']}: {name}"
        else:
            _assert_compact(found, expected[name], f"{case['name']}: {name}")


def _assert_compact(found: np.ndarray, expected: dict[str, Any], what: str) -> None:
    """Compare an array with its shape, runs, picked rows and fingerprint."""
    assert list(found.shape) == expected["shape"], what
    if "runs" in expected:
        assert found.reshape(-1).tolist() == _unpack(expected["runs"]), what
    for row, runs in expected.get("rows", {}).items():
        assert found[int(row)].tolist() == _unpack(runs), f"{what}[{row}]"
    assert sha256(found) == expected["sha256"], what


def assert_hca_tokens(case: dict[str, Any], hca_indptr: np.ndarray, hca_idx: np.ndarray) -> None:
    """Compare the HCA rows of the tokens that a compact example lists."""
    for token, runs in case["out_compact"]["hca_idx"]["per_token"].items():
        start, stop = hca_indptr[int(token) : int(token) + 2]
        assert hca_idx[start:stop].tolist() == _unpack(runs), f"{case['name']}: token {token}"


def _unpack(runs: list[list[int]]) -> list[int]:
    """The numbers of runs of (first, count, step)."""
    return [first + n * step for first, count, step in runs for n in range(count)]

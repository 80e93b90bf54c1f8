"""What the write path refuses on a CPU, before it writes: values, memory, widths, formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import ConfigError, DtypeError, ShapeError
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.query import indexer_query
from tests.ops.cache_write_case import BLOCK, DIM, RANK, ROPE, assert_same_bytes, make_case

TOKENS, HEADS = 3, 2
CASE = make_case(TOKENS)
NUM_POSITIONS, BLOCKS = len(CASE.cos_sin_cache), CASE.num_blocks
ARRAYS = ("kv_a", "index_k", "position_ids", "slot_mapping", "cos_sin_cache")
NORMS = ("kv_norm_weight", "k_norm_weight", "k_norm_bias")


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def write_arguments() -> dict[str, Any]:
    """Arguments of `write_caches`, fp8_ds_mla; the caches poisoned."""
    latent, index = CASE.poisoned_caches()
    arrays = {name: getattr(CASE, name) for name in ARRAYS}
    return arrays | {"latent_cache": latent, "index_cache": index, "params": CASE.params}


def assert_write_refused(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    """The message is that of `write_caches`, and no cache has changed."""
    given, params = write_arguments(), CASE.params
    caches = given["latent_cache"], given["index_cache"]
    norms = {name: value for name, value in changes.items() if name in NORMS}
    given |= {name: value for name, value in changes.items() if name not in NORMS}
    if norms:
        given["params"] = replace(params, **norms)
    with pytest.raises(error, match=f"^write_caches: {said}"):
        write_caches(**given)
    assert_same_bytes(caches, CASE.poisoned_caches())


def positions(value: int) -> np.ndarray:
    """Positions of which the second is `value`."""
    found = CASE.position_ids.copy()
    found[1] = value
    return found


@pytest.mark.parametrize("value", [-1, NUM_POSITIONS, 2**50])
def test_positions_without_a_row(value: int) -> None:
    said = rf"position_ids\[1\] is {value}, allowed is 0 to {NUM_POSITIONS - 1}"
    assert_write_refused({"position_ids": positions(value)}, ValueError, said)


def test_positions_of_padding_may_be_anything() -> None:
    slots = CASE.slot_mapping.copy()
    slots[1] = -1
    wanted, found = write_arguments(), write_arguments()
    write_caches(**(wanted | {"slot_mapping": slots}))
    write_caches(**(found | {"slot_mapping": slots, "position_ids": positions(-7)}))
    names = ("latent_cache", "index_cache")
    assert_same_bytes([found[name] for name in names], [wanted[name] for name in names])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"kv_norm_weight": zeros(RANK - 1)}, ShapeError, r"kv_norm_weight has shape \[511\]"),
        ({"kv_norm_weight": zeros(RANK, dtype="float64")}, DtypeError, "kv_norm_weight has dtype"),
        ({"k_norm_weight": zeros(DIM - 1)}, ShapeError, r"k_norm_weight has shape \[127\].*128"),
        ({"k_norm_weight": zeros(DIM, dtype="float64")}, DtypeError, "k_norm_weight has dtype"),
        ({"k_norm_bias": zeros(DIM + 1)}, ShapeError, r"k_norm_bias has shape \[129\].*128"),
        ({"k_norm_bias": zeros(1, DIM)}, ShapeError, r"k_norm_bias has shape \[1, 128\]"),
        ({"k_norm_bias": [0.0] * DIM}, ShapeError, "k_norm_bias is a list"),
    ],
)
def test_norms_of_other_widths(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    assert_write_refused(changes, error, said)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"kv_a": None, "index_k": None}, ShapeError, "kv_a and index_k are None, allowed is at"),
        ({"kv_a": [[1.0]] * TOKENS}, ShapeError, "kv_a is a list"),
        ({"index_k": "keys"}, ShapeError, "index_k is a str"),
        ({"slot_mapping": None}, ShapeError, "slot_mapping is None"),
        ({"slot_mapping": [0, 1, 2]}, ShapeError, "slot_mapping is a list"),
        ({"position_ids": [0, 1, 2]}, ShapeError, "position_ids is a list"),
        ({"cos_sin_cache": "cos"}, ShapeError, "cos_sin_cache is a str"),
        ({"latent_cache": None}, ShapeError, "latent_cache is None"),
        ({"index_cache": None}, ShapeError, "index_cache is None"),
        ({"cos_sin_cache": zeros(9, 63)}, ShapeError, "cos_sin_cache has rows of 63 values.*even"),
        ({"cos_sin_cache": zeros(9, 130)}, ShapeError, "cos_sin_cache has rows of 130 .* to 128"),
        ({"cos_sin_cache": zeros(9, 32)}, ShapeError, r"cos_sin_cache has shape \[9, 32\].*64"),
    ],
)
def test_arguments(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    assert_write_refused(changes, error, said)


@pytest.mark.parametrize(
    ("name", "shape", "allowed"),
    [
        ("latent_cache", (BLOCKS, 1, 32, 656), r"\[\*, 1, 64, 656\]"),
        ("index_cache", (BLOCKS, 32, 132), rf"\[{BLOCKS}, 64, 132\]"),
        ("index_cache", (BLOCKS + 1, BLOCK, 132), rf"\[{BLOCKS}, 64, 132\]"),
    ],
)
def test_blocks_of_other_sizes(name: str, shape: tuple[int, ...], allowed: str) -> None:
    cache = np.zeros(shape, np.uint8)
    assert_write_refused({name: cache}, ShapeError, rf"{name} has shape .*, allowed is {allowed}")


def test_an_index_cache_alone_has_fp8_blocks_of_64_tokens() -> None:
    changes = {"kv_a": None, "latent_cache": None, "index_cache": zeros(3, 32, 132, dtype="uint8")}
    assert_write_refused(changes, ShapeError, r"index_cache .*\[\*, 64, 132\]")


def test_float_caches_have_like_blocks() -> None:
    given = write_arguments() | {"params": replace(CASE.params, kv_cache_dtype="float32")}
    given["latent_cache"] = zeros(BLOCKS, 1, 16, RANK + ROPE)
    given["index_cache"] = zeros(BLOCKS, 8, DIM)
    with pytest.raises(ShapeError, match=rf"index_cache .*allowed is \[{BLOCKS}, 16, 128\]"):
        write_caches(**given)
    assert not given["latent_cache"].any()


@pytest.mark.parametrize("name", ["latent_cache", "index_cache"])
def test_memory_that_cannot_be_written(name: str) -> None:
    cache = write_arguments()[name]
    cache.setflags(write=False)
    assert_write_refused({name: cache}, ValueError, f"{name} is read-only")


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("index_cache", np.zeros((BLOCKS, BLOCK, 264), np.uint8)[..., ::2]),
        ("index_cache", np.zeros((BLOCKS, BLOCK, 140), np.uint8)[..., :132]),
        ("latent_cache", np.zeros((BLOCKS, 1, BLOCK, 1312), np.uint8)[..., ::2]),
    ],
)
def test_blocks_whose_bytes_lie_apart(name: str, apart: np.ndarray) -> None:
    assert_write_refused({name: apart}, ShapeError, f"bytes of a block of {name} lie apart")
    assert not apart.any()


def test_a_norm_wider_than_its_rows() -> None:
    given = write_arguments() | {"cos_sin_cache": None, "index_k": None, "index_cache": None}
    params = CacheWriteParams("float32", kv_norm_weight=zeros(RANK + ROPE + 1))
    given |= {"params": params, "latent_cache": zeros(BLOCKS, 1, BLOCK, RANK + ROPE)}
    with pytest.raises(ShapeError, match=r"kv_norm_weight has shape \[577\], allowed is \[576\]"):
        write_caches(**given)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: got 'int8', allowed are float32, bfloat16,"),
        ({"index_scale_fmt": "e8m0"}, "index_scale_fmt: got 'e8m0', allowed are 'ue8m0' and None"),
        ({"k_norm_weight": zeros(DIM)}, "k_norm_bias: got None, allowed are both"),
        ({"k_norm_bias": zeros(DIM)}, "k_norm_weight: got None, allowed are both"),
    ],
)
def test_params(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CacheWriteParams(**({"kv_cache_dtype": "float32"} | fields))


def test_hadamard_has_one_width() -> None:
    params = CacheWriteParams("float32", index_hadamard=True)
    with pytest.raises(ShapeError, match=r"index_k has shape \[1, 64\], allowed is \[\*, 128\]"):
        write_caches(
            *(None, zeros(1, 64), None, zeros(1, dtype="int64"), None, None, zeros(1, 8, 64)),
            params,
        )


def query_arguments() -> dict[str, Any]:
    """Arguments of `indexer_query`, quantised."""
    return {
        "q": np.ones((TOKENS, HEADS, DIM), np.float32),
        "weights": np.ones((TOKENS, HEADS), np.float32),
        "position_ids": CASE.position_ids,
        "cos_sin_cache": CASE.cos_sin_cache,
        "rope_interleave": False,
        "quantized": True,
        "out": (zeros(TOKENS, HEADS, DIM, dtype="uint8"), zeros(TOKENS, HEADS)),
    }


CODES, WEIGHTS = query_arguments()["out"]
READ_ONLY = zeros(TOKENS, HEADS)
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"out": (CODES[1:], WEIGHTS)}, ShapeError, r"out\[0\] has shape \[2, 2, 128\]"),
        ({"out": (CODES[..., :64], WEIGHTS)}, ShapeError, r"out\[0\] has shape \[3, 2, 64\]"),
        ({"out": (CODES, WEIGHTS[1:])}, ShapeError, r"out\[1\] has shape \[2, 2\]"),
        ({"out": (CODES.astype(np.int8), WEIGHTS)}, DtypeError, r"out\[0\] has dtype int8.*uint8"),
        ({"out": (CODES, CODES[..., 0])}, DtypeError, r"out\[1\] has dtype uint8"),
        ({"out": (CODES, WEIGHTS), "quantized": False}, DtypeError, r"out\[0\] has dtype uint8"),
        ({"out": (CODES,)}, ShapeError, "out is no pair"),
        ({"out": CODES}, ShapeError, "out is no pair"),
        ({"out": (CODES, None)}, ShapeError, r"out\[1\] is None"),
        ({"out": (CODES, READ_ONLY)}, ValueError, r"out\[1\] is read-only"),
        ({"weights_scale": "0.5"}, ValueError, "weights_scale is '0.5', allowed is a number"),
        ({"weights_scale": None}, ValueError, "weights_scale is None"),
        ({"weights_scale": True}, ValueError, "weights_scale is True"),
        ({"weights_scale": np.ones(1)}, ValueError, "weights_scale is array"),
        ({"position_ids": positions(-1)}, ValueError, r"position_ids\[1\] is -1"),
        ({"position_ids": positions(NUM_POSITIONS)}, ValueError, r"position_ids\[1\] is .*0 to 12"),
        ({"cos_sin_cache": zeros(13, 130)}, ShapeError, "cos_sin_cache has rows of 130 values"),
        ({"q": None}, ShapeError, "q is None"),
        ({"weights": [[1.0] * HEADS] * TOKENS}, ShapeError, "weights is a list"),
    ],
)
def test_queries(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    given = query_arguments() | changes
    with pytest.raises(error, match=f"^indexer_query: {said}"):
        indexer_query(**given)
    if given["q"] is not None:
        assert (given["q"] == 1).all()
    assert not CODES.any()
    assert not WEIGHTS.any()


def test_queries_refuse_another_form_of_scales() -> None:
    with pytest.raises(ConfigError, match="scale_fmt: got 'e8m0', allowed are 'ue8m0' and None"):
        indexer_query(**query_arguments(), scale_fmt="e8m0")


def test_the_scale_of_the_weights_may_be_a_numpy_number() -> None:
    plain = indexer_query(**(query_arguments() | {"weights_scale": 0.25}))
    found = indexer_query(**(query_arguments() | {"weights_scale": np.float32(0.25)}))
    np.testing.assert_array_equal(found[1], plain[1])

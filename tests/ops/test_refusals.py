"""Errors of the public operators on a CPU, before they write, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the operators are on Paddle tensors")

import paddle

import fd_dsa.ops as ops
from fd_dsa.errors import ConfigError, DtypeError, ShapeError
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.mla_query import prepare_mla_query
from tests.ops.cache_write_case import BLOCK, DIM, RANK, ROPE, assert_same_bytes, make_case

TOKENS, HEADS = 4, 2
CASE = make_case(TOKENS)
POSITIONS, BLOCKS = len(CASE.cos_sin_cache), CASE.num_blocks
NORMS = ("kv_norm_weight", "k_norm_weight", "k_norm_bias")
Row = tuple[type[Exception], str, dict[str, Any]]


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def tensor(*shape: int, dtype: str = "float32") -> Any:
    return paddle.zeros(list(shape), dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def positions(value: int) -> np.ndarray:
    """Positions of which the second is `value`."""
    return np.where(np.arange(TOKENS) == 1, value, CASE.position_ids)


def read_only(*shape: int, dtype: str = "float32") -> np.ndarray:
    array = zeros(*shape, dtype=dtype)
    array.setflags(write=False)
    return array


def write_arguments() -> dict[str, Any]:
    """Return arguments of `write_caches` for poisoned fp8_ds_mla caches."""
    latent, index = CASE.poisoned_caches()
    names = "kv_a", "index_k", "position_ids", "slot_mapping", "cos_sin_cache"
    arrays = {name: getattr(CASE, name) for name in names}
    return arrays | {"latent_cache": latent, "index_cache": index, "params": CASE.params}


# caches of float32, and what makes another write of them
FLOAT = {
    "params": CacheWriteParams("float32"),
    "latent_cache": zeros(BLOCKS, 1, BLOCK, RANK + ROPE),
    "index_cache": zeros(BLOCKS, BLOCK, DIM),
}
INT16_KEYS = zeros(BLOCKS, BLOCK, DIM, dtype="int16")
WIDE_NORM = {"params": CacheWriteParams("float32", kv_norm_weight=zeros(RANK + ROPE + 1))}
HADAMARD = {"params": CacheWriteParams("float32", index_hadamard=True)}
LENGTHS = {
    "seq_lens_encoder": ints(3, 0),
    "seq_lens_decoder": ints(2, 4),
    "seq_lens_this_time": ints(3, 1),
}
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "write_caches": write_arguments,
    "indexer_query": lambda: {
        "q": np.ones((TOKENS, HEADS, DIM), np.float32),
        "weights": np.ones((TOKENS, HEADS), np.float32),
        "position_ids": CASE.position_ids,
        "cos_sin_cache": CASE.cos_sin_cache,
        "out": (zeros(TOKENS, HEADS, DIM, dtype="uint8"), zeros(TOKENS, HEADS)),
    },
    "prepare_mla_query": lambda: {
        "q_latent": np.ones((TOKENS, HEADS, 6), np.float32),
        "q_pe": np.ones((TOKENS, HEADS, 4), np.float32),
        "position_ids": np.arange(TOKENS),
        "cos_sin_cache": np.ones((5, 4), np.float32),
        "out": np.full((TOKENS, HEADS, 10), 7, np.float32),
    },
    "step_metadata": lambda: {
        **LENGTHS,
        "block_tables": ints(0, 0, 0, 0).reshape(2, 2),
        "block_size": 64,
    },
    "position_ids": lambda: {**LENGTHS, "position_ids": ints(0, 0, 0, 0)},
    "indexer_logits": lambda: {
        "q": zeros(TOKENS, HEADS, DIM),
        "weights": zeros(TOKENS, HEADS),
        "cache": zeros(4, 64, DIM),
        "step": ops.step_metadata(
            ints(3, 0), ints(66, 70), ints(3, 1), ints(2, 0, 1, 3).reshape(2, 2), block_size=64
        ),
    },
    "topk_indices": lambda: {"logits": zeros(TOKENS, 9), "lengths": ints(9, 1, 0, 2), "k": 2},
    "sparse_mla": lambda: {
        "q": zeros(TOKENS, HEADS, 16),
        "cache": zeros(9, 16),
        "slots": zeros(TOKENS, 3, dtype="int32"),
        "softmax_scale": 1.0,
        "kv_lora_rank": 8,
    },
    "dequantize": lambda: {"cache": zeros(9, 16), "slots": np.arange(3)},
}
CODES, WEIGHTS = zeros(TOKENS, HEADS, DIM, dtype="uint8"), zeros(TOKENS, HEADS)
TABLES = {"batch_ids": ints(0, 0, 0, 0), "block_tables": zeros(1, 1, dtype="int32")}
SIZES = {"block_size": 16, "num_blocks": 1}
RECORDS = zeros(9, 656, dtype="uint8")

REFUSALS: dict[str, list[Row]] = {
    "write_caches": [
        (ValueError, rf"position_ids.*-1, .* to {POSITIONS - 1}", {"position_ids": positions(-1)}),
        (ValueError, rf"position_ids\[1\] is {POSITIONS}", {"position_ids": positions(POSITIONS)}),
        (ValueError, r"position_ids\[1\] is 1125", {"position_ids": positions(2**50)}),
        (ShapeError, r"kv_norm_weight has shape \[511\]", {"kv_norm_weight": zeros(RANK - 1)}),
        (DtypeError, "kv_norm_weight has dtype", {"kv_norm_weight": zeros(RANK, dtype="float64")}),
        (ShapeError, r"k_norm_weight has shape \[127\].*128", {"k_norm_weight": zeros(DIM - 1)}),
        (DtypeError, "k_norm_weight has dtype", {"k_norm_weight": zeros(DIM, dtype="float64")}),
        (ShapeError, r"k_norm_bias has shape \[129\].*128", {"k_norm_bias": zeros(DIM + 1)}),
        (ShapeError, r"k_norm_bias has shape \[1, 128\]", {"k_norm_bias": zeros(1, DIM)}),
        (ShapeError, "k_norm_bias is a list", {"k_norm_bias": [0.0] * DIM}),
        (ShapeError, "kv_a and index_k are None, allowed is at", {"kv_a": None, "index_k": None}),
        (ShapeError, "kv_a is a list", {"kv_a": [[1.0]] * TOKENS}),
        (ShapeError, r"kv_a has shape \[5, 576\].*\[4, \*", {"kv_a": zeros(5, 576)}),
        (ShapeError, r"kv_a has .*\[\*, 576\]", {"kv_a": zeros(TOKENS, 580)}),
        (DtypeError, "kv_a has dtype float64", {"kv_a": zeros(TOKENS, 576, dtype="float64")}),
        (ShapeError, "index_k is a str", {"index_k": "keys"}),
        (ShapeError, r"index_k has shape \[5, 128\]", {"index_k": zeros(5, DIM)}),
        (DtypeError, "index_k has dtype float64", {"index_k": zeros(TOKENS, DIM, dtype="float64")}),
        (ShapeError, "slot_mapping is None", {"slot_mapping": None}),
        (ShapeError, "slot_mapping is a list", {"slot_mapping": [0, 1, 2]}),
        (DtypeError, "slot_mapping has dtype int32", {"slot_mapping": ints(0, 1, 2, 3)}),
        (ShapeError, "position_ids is a list", {"position_ids": [0, 1, 2]}),
        (ShapeError, r"position_ids has shape \[5\]", {"position_ids": np.arange(5)}),
        (DtypeError, "position_ids has dtype int32", {"position_ids": ints(0, 0, 0, 0)}),
        (ShapeError, "cos_sin_cache is a str", {"cos_sin_cache": "cos"}),
        (ShapeError, "cos_sin_cache has rows of 63 values.*even", {"cos_sin_cache": zeros(9, 63)}),
        (ShapeError, "cos_sin_cache has rows of 130 .* to 128", {"cos_sin_cache": zeros(9, 130)}),
        (ShapeError, r"cos_sin_cache has shape \[9, 32\].*64", {"cos_sin_cache": zeros(9, 32)}),
        (ShapeError, "cos_sin_cache is empty", {"cos_sin_cache": zeros(0, 64)}),
        (ShapeError, "latent_cache is None", {"latent_cache": None}),
        (ShapeError, "index_cache is None", {"index_cache": None}),
        (ShapeError, r"latent_cache .* 1, 64, 656\]", {"latent_cache": zeros(BLOCKS, 1, 32, 656)}),
        (
            ShapeError,
            rf"index_cache .*\[{BLOCKS}, 64, 132",
            {"index_cache": zeros(BLOCKS, 32, 132)},
        ),
        (ShapeError, rf"index_cache .*\[{BLOCKS}, 64", {"index_cache": zeros(BLOCKS + 1, 64, 132)}),
        (
            ShapeError,
            r"index_cache .*\[\*, 64, 132\]",
            {"kv_a": None, "index_cache": zeros(3, 32, 132)},
        ),
        (
            ShapeError,
            r"index_cache .*, 16, 128\]",
            {**FLOAT, "latent_cache": zeros(BLOCKS, 1, 16, 576)},
        ),
        (ShapeError, r"latent_cache .*, 500\]", {**FLOAT, "kv_a": zeros(TOKENS, 500)}),
        (ShapeError, r"index_cache .*, 64, 80\]", {**FLOAT, "index_k": zeros(TOKENS, 80)}),
        (DtypeError, "index_cache has dtype int16", {**FLOAT, "index_cache": INT16_KEYS}),
        (
            ShapeError,
            r"kv_norm_weight .*577\], .*576\]",
            {**FLOAT, "cos_sin_cache": None, **WIDE_NORM},
        ),
        (
            ShapeError,
            r"index_k has .*64\], .* 128\]",
            {**FLOAT, **HADAMARD, "index_k": zeros(4, 64)},
        ),
        *(
            (ValueError, f"{name} is read-only", {name: read_only(*shape, dtype="uint8")})
            for name, shape in (
                ("latent_cache", (BLOCKS, 1, BLOCK, 656)),
                ("index_cache", (BLOCKS, BLOCK, 132)),
            )
        ),
        *(
            (ShapeError, f"bytes of a block of {name} have gaps", {name: cache})
            for name, cache in (
                ("index_cache", zeros(BLOCKS, BLOCK, 264, dtype="uint8")[..., ::2]),
                ("index_cache", zeros(BLOCKS, BLOCK, 140, dtype="uint8")[..., :132]),
                ("latent_cache", zeros(BLOCKS, 1, BLOCK, 1312, dtype="uint8")[..., ::2]),
            )
        ),
    ],
    "indexer_query": [
        (ShapeError, r"out\[0\] has shape \[3, 2, 128\]", {"out": (CODES[1:], WEIGHTS)}),
        (ShapeError, r"out\[0\] has shape \[4, 2, 64\]", {"out": (CODES[..., :64], WEIGHTS)}),
        (ShapeError, r"out\[1\] has shape \[3, 2\]", {"out": (CODES, WEIGHTS[1:])}),
        (DtypeError, r"out\[0\] has dtype int8.*uint8", {"out": (CODES.astype(np.int8), WEIGHTS)}),
        (DtypeError, r"out\[1\] has dtype uint8", {"out": (CODES, CODES[..., 0])}),
        (DtypeError, r"out\[0\] has dtype uint8", {"out": (CODES, WEIGHTS), "quantized": False}),
        (ShapeError, "out is not a pair", {"out": (CODES,)}),
        (ShapeError, "out is not a pair", {"out": CODES}),
        (ShapeError, r"out\[1\] is None", {"out": (CODES, None)}),
        (ValueError, r"out\[1\] is read-only", {"out": (CODES, read_only(TOKENS, HEADS))}),
        (ValueError, "weights_scale is '0.5', allowed is a number", {"weights_scale": "0.5"}),
        (ValueError, "weights_scale is None", {"weights_scale": None}),
        (ValueError, "weights_scale is True", {"weights_scale": True}),
        (ValueError, "weights_scale is array", {"weights_scale": np.ones(1)}),
        (ValueError, r"position_ids\[1\] is -1", {"position_ids": positions(-1)}),
        (ValueError, r"position_ids\[1\] is .*0 to 16", {"position_ids": positions(POSITIONS)}),
        (ShapeError, "cos_sin_cache has rows of 130 values", {"cos_sin_cache": zeros(13, 130)}),
        (ShapeError, "q is None", {"q": None}),
        (ShapeError, "weights is a list", {"weights": [[1.0] * HEADS] * TOKENS}),
    ],
    "prepare_mla_query": [
        (DtypeError, "q_latent has dtype float64", {"q_latent": zeros(4, 2, 6, dtype="float64")}),
        (DtypeError, "q_pe has dtype float64", {"q_pe": zeros(4, 2, 4, dtype="float64")}),
        (ShapeError, r"q_pe has shape \[4, 3, 4\]", {"q_pe": zeros(4, 3, 4)}),
        (ShapeError, r"q_latent has shape \[4, 18\]", {"q_latent": zeros(4, 18)}),
        (ShapeError, r"position_ids has shape \[3\]", {"position_ids": np.arange(3)}),
        (DtypeError, "position_ids has dtype int32.*int64", {"position_ids": ints(0, 1, 2, 3)}),
        (ValueError, r"position_ids\[1\] is 5.*0 to 4", {"position_ids": np.array([0, 5, 0, 0])}),
        (ShapeError, r"cos_sin_cache has shape \[5, 4\].*\[4, \*\]", {"position_ids": None}),
        (ShapeError, "cos_sin_cache is empty", {"cos_sin_cache": zeros(0, 4)}),
        (ShapeError, r"cos_sin_cache.*\[\*, 4\]", {"cos_sin_cache": zeros(5, 2)}),
        (ShapeError, "cos_sin_cache has rows of 8", {"cos_sin_cache": zeros(5, 8)}),
        (ShapeError, r"out has shape \[4, 2, 9\]", {"out": zeros(4, 2, 9)}),
        (DtypeError, "out has dtype float64", {"out": zeros(4, 2, 10, dtype="float64")}),
        (ValueError, "out is read-only", {"out": read_only(4, 2, 10)}),
    ],
    "step_metadata": [
        (ShapeError, r"block_tables has shape \[2\]", {"block_tables": ints(0, 0)}),
        (DtypeError, "seq_lens_decoder has dtype int64", {"seq_lens_decoder": np.arange(2)}),
        (ShapeError, r"seq_lens_encoder has shape \[1\].*\[2\]", {"seq_lens_encoder": ints(1)}),
    ],
    "position_ids": [
        (DtypeError, "position_ids has dtype int64, .* int32", {"position_ids": np.arange(4)}),
        (ShapeError, r"seq_lens_encoder has shape \[1\]", {"seq_lens_encoder": ints(1)}),
        (ValueError, r"seq_lens_this_time\[1\] is -1", {"seq_lens_this_time": ints(3, -1)}),
        (ValueError, "position_ids holds 3 tokens, .* the 4", {"position_ids": ints(0, 0, 0)}),
    ],
    "indexer_logits": [
        (ShapeError, r"q has shape \[3, 2, 128\], allowed is \[4, ", {"q": zeros(3, HEADS, DIM)}),
        (ShapeError, r"cache has shape .*\[\*, \*, 128\]", {"cache": zeros(4, 64, 64)}),
        (DtypeError, "q has dtype .* uint8", {"cache": zeros(4, 64, 132, dtype="uint8")}),
        (DtypeError, "cache has dtype int32", {"cache": zeros(4, 64, DIM, dtype="int32")}),
        (ShapeError, r"weights has shape \[4, 3\].*\[4, 2\]", {"weights": zeros(TOKENS, 3)}),
        (ShapeError, "out has rows of 70 values, .* 71 and more", {"out": zeros(TOKENS, 70)}),
    ],
    "topk_indices": [
        (DtypeError, "logits has dtype int32", {"logits": zeros(TOKENS, 9, dtype="int32")}),
        (ShapeError, r"lengths has shape \[2\].*\[4\]", {"lengths": ints(1, 1)}),
        (ValueError, r"lengths\[1\] is 10, allowed is 0 to 9", {"lengths": ints(9, 10, 0, 1)}),
        (ValueError, "k is 0, allowed is at least 1", {"k": 0}),
        (ShapeError, "block_size is None and block_tables ndarray", TABLES),
        (ShapeError, "batch_ids is None and .* ndarray", {**TABLES, **SIZES, "batch_ids": None}),
        (ValueError, "num_blocks is 0", TABLES | SIZES | {"num_blocks": 0}),
        (DtypeError, "out has dtype int64", {"out": zeros(TOKENS, 2, dtype="int64")}),
        (ShapeError, r"out has shape \[4, 3\]", {"out": zeros(TOKENS, 3, dtype="int32")}),
    ],
    "sparse_mla": [
        (ShapeError, r"q has shape \[4, 16\]", {"q": zeros(TOKENS, 16)}),
        (DtypeError, "q has dtype bfloat16, .* float32", {"q": tensor(4, 2, 16, dtype="bfloat16")}),
        (ShapeError, "kv_lora_rank is 17, allowed is 1 to 16", {"kv_lora_rank": 17}),
        (ShapeError, "an fp8_ds_mla cache has keys of 576 values, q has 16", {"cache": RECORDS}),
        (ShapeError, "kv_lora_rank is 8, .* 512", {"cache": RECORDS, "q": zeros(TOKENS, 2, 576)}),
        (ShapeError, r"cache has shape \[9, 15\].*\[\*, 16\]", {"cache": zeros(9, 15)}),
        (DtypeError, "slots has dtype int64", {"slots": zeros(TOKENS, 3, dtype="int64")}),
        (ValueError, r"slots\[0, 0\] is 9, .* -1 to 8", {"slots": 9 + zeros(4, 3, dtype="int32")}),
        (ShapeError, "slots is a list", {"slots": [[0]] * TOKENS}),
    ],
    "dequantize": [
        (DtypeError, "slots has dtype int32", {"slots": ints(1)}),
        (ValueError, r"slots\[1\] is -1, allowed is 0 to 8", {"slots": np.array([0, -1])}),
        (ShapeError, r"cache has shape \[9, 600\].*656", {"cache": zeros(9, 600, dtype="uint8")}),
    ],
}


def memory_of(value: Any) -> Iterator[bytes]:
    """The bytes of an argument's arrays."""
    if isinstance(value, tuple):
        for part in value:
            yield from memory_of(part)
    elif hasattr(value, "shape"):
        yield (value if isinstance(value, np.ndarray) else value.numpy()).tobytes()


@pytest.mark.parametrize(
    ("call", "error", "message", "changes"),
    [(call, *row) for call, rows in REFUSALS.items() for row in rows],
)
def test_refusals(call: str, error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    arguments = CALLS[call]()
    norms = {name: value for name, value in changes.items() if name in NORMS}
    arguments |= {name: value for name, value in changes.items() if name not in NORMS}
    if norms:
        arguments["params"] = replace(arguments["params"], **norms)
    before = {name: list(memory_of(value)) for name, value in arguments.items()}
    function = prepare_mla_query if call == "prepare_mla_query" else getattr(ops, call)
    with pytest.raises(error, match=rf"^{call}: {message}"):
        function(**arguments)
    assert before == {name: list(memory_of(value)) for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: got 'int8', allowed are float32, bfloat16,"),
        ({"index_scale_fmt": "e8m0"}, "index_scale_fmt: got 'e8m0', allowed are 'ue8m0' and None"),
        ({"k_norm_weight": zeros(DIM)}, "k_norm_bias: got None, allowed are k_norm_weight"),
        ({"k_norm_bias": zeros(DIM)}, "k_norm_weight: got None, allowed are k_norm_weight"),
    ],
)
def test_params(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheWriteParams(**({"kv_cache_dtype": "float32"} | fields))


def test_queries_refuse_another_form_of_scales() -> None:
    with pytest.raises(ConfigError, match="scale_fmt: got 'e8m0', allowed are 'ue8m0' and None"):
        ops.indexer_query(**CALLS["indexer_query"](), scale_fmt="e8m0")


def test_positions_of_padding_may_be_anything() -> None:
    slots = np.where(np.arange(TOKENS) == 1, -1, CASE.slot_mapping)
    caches = []
    for value in (3, -7):
        arguments = write_arguments() | {"slot_mapping": slots, "position_ids": positions(value)}
        write_caches(**arguments)
        caches.append([arguments[name] for name in ("latent_cache", "index_cache")])
    assert_same_bytes(*caches)


def test_the_scale_of_the_weights_may_be_a_numpy_number() -> None:
    plain = ops.indexer_query(**CALLS["indexer_query"](), weights_scale=0.25)
    found = ops.indexer_query(**CALLS["indexer_query"](), weights_scale=np.float32(0.25))
    np.testing.assert_array_equal(found[1], plain[1])

"""Kernels of the read path refuse tensors that do not belong together, and launch nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import DtypeError, ShapeError
from tests.kernel_memory import POISON, KernelMemory

TOKENS, HEADS, DIM, BLOCKS, BLOCK, WIDTH, TOPK, RANK, ROPE = 5, 2, 32, 3, 16, 20, 4, 128, 16

Arguments = dict[str, Any]


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def pages() -> Arguments:
    """What a step says of its tokens."""
    return {
        "position_ids": zeros(TOKENS, dtype="int64"),
        "batch_id_per_token": zeros(TOKENS, dtype="int32"),
        "block_tables": zeros(2, 2, dtype="int32"),
    }


def score_arguments() -> Arguments:
    """Arguments of `score_pages`."""
    return {
        "q": zeros(TOKENS, HEADS, DIM),
        "weights": zeros(TOKENS, HEADS),
        "cache": zeros(BLOCKS, BLOCK, DIM),
        **pages(),
        "logits": zeros(TOKENS, WIDTH),
        "block_size": BLOCK,
        "first_token": 0,
    }


def select_arguments() -> Arguments:
    """Arguments of `select_slots`."""
    return {
        "logits": zeros(TOKENS, WIDTH),
        **pages(),
        "slots": zeros(TOKENS, TOPK, dtype="int32"),
        "block_size": BLOCK,
        "num_blocks": BLOCKS,
        "first_token": 0,
    }


def attend_arguments() -> Arguments:
    """Arguments of `attend_slots`."""
    return {
        "q": zeros(TOKENS, HEADS, RANK + ROPE),
        "cache": zeros(BLOCKS, 1, BLOCK, RANK + ROPE),
        "slots": zeros(TOKENS, TOPK, dtype="int32"),
        "out": zeros(TOKENS, HEADS, RANK),
        "softmax_scale": 1.0,
        "kv_lora_rank": RANK,
    }


def assert_refused(
    m: KernelMemory,
    function: Callable[..., None],
    result: str,
    arguments: Arguments,
    changes: Arguments,
    error: type[Exception],
    said: str,
) -> None:
    """The call names the operator and the argument, and leaves its result as it was."""
    arguments = arguments | changes
    given = {n: m.put(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    if isinstance(given[result], (int, list, type(None))):
        poisoned = None
    else:
        poisoned = given[result] = m.poisoned(arguments[result].shape, arguments[result].dtype.name)
    with pytest.raises(error, match=rf"^{function.__name__}: {said}"):
        function(**given)
    if poisoned is not None:
        assert (m.get(poisoned).view(np.uint8) == POISON).all()


PAGES = [
    ({"position_ids": zeros(TOKENS, dtype="int32")}, DtypeError, "position_ids has dtype int32"),
    ({"position_ids": zeros(4, dtype="int64")}, ShapeError, r"position_ids has shape \[4\].*\[5\]"),
    ({"batch_id_per_token": zeros(4, dtype="int32")}, ShapeError, "batch_id_per_token has shape"),
    ({"batch_id_per_token": zeros(5, dtype="int64")}, DtypeError, "batch_id_per_token has dtype"),
    ({"block_tables": zeros(2, dtype="int32")}, ShapeError, r"block_tables has shape \[2\]"),
    ({"block_tables": zeros(2, 2, dtype="int64")}, DtypeError, "block_tables has dtype int64"),
    ({"first_token": 1}, ShapeError, "first_token is 1 with 5 rows.*the 5 tokens"),
    ({"first_token": -1}, ShapeError, "first_token is -1"),
]
BYTES = {"cache": zeros(BLOCKS, BLOCK, DIM + 4, dtype="uint8")}
CODES = {"q": zeros(TOKENS, HEADS, DIM, dtype="uint8")}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        *PAGES,
        ({"q": zeros(TOKENS, DIM)}, ShapeError, r"q has shape \[5, 32\]"),
        ({"q": zeros(TOKENS, HEADS, DIM, dtype="int32")}, DtypeError, "q has dtype int32"),
        (CODES, DtypeError, "q has dtype uint8, allowed is float32 or bfloat16"),
        (BYTES, DtypeError, "q has dtype float32, allowed is uint8 or float8_e4m3fn"),
        (
            CODES | {"cache": zeros(BLOCKS, BLOCK, DIM, dtype="uint8")},
            ShapeError,
            r"cache has shape \[3, 16, 32\].*\[\*, 16, 36\]",
        ),
        ({"cache": zeros(BLOCKS, 8, DIM)}, ShapeError, r"cache has shape .*\[\*, 16, \*\]"),
        ({"cache": zeros(BLOCKS, BLOCK, 16)}, ShapeError, r"cache has shape .*\[\*, 16, 32\]"),
        ({"cache": None}, ShapeError, r"cache is None, allowed is an array of shape"),
        ({"weights": zeros(TOKENS, 3)}, ShapeError, r"weights has shape \[5, 3\].*\[5, 2\]"),
        ({"weights": zeros(TOKENS, HEADS, dtype="int32")}, DtypeError, "weights has dtype int32"),
        ({"logits": zeros(TOKENS)}, ShapeError, r"logits has shape \[5\]"),
        ({"logits": zeros(TOKENS, WIDTH, dtype="int32")}, DtypeError, "logits has dtype int32"),
        ({"logits": zeros(6, WIDTH)}, ShapeError, "first_token is 0 with 6 rows"),
    ],
)
def test_scores(
    kernel_memory: KernelMemory, changes: Arguments, error: type[Exception], said: str
) -> None:
    from fd_dsa.ops.logits.triton_kernel import score_pages

    arguments = score_arguments()
    assert_refused(kernel_memory, score_pages, "logits", arguments, changes, error, said)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        *PAGES,
        ({"logits": zeros(TOKENS)}, ShapeError, r"logits has shape \[5\]"),
        ({"logits": zeros(TOKENS, WIDTH, dtype="int32")}, DtypeError, "logits has dtype int32"),
        ({"slots": zeros(TOKENS, TOPK, dtype="int64")}, DtypeError, "slots has dtype int64"),
        ({"slots": zeros(TOKENS, dtype="int32")}, ShapeError, r"slots has shape \[5\]"),
        ({"num_rows": 6}, ShapeError, "first_token is 0 with 6 rows.*the 5 tokens"),
        ({"num_rows": -1}, ShapeError, "first_token is 0 with -1 rows"),
    ],
)
def test_selection(
    kernel_memory: KernelMemory, changes: Arguments, error: type[Exception], said: str
) -> None:
    from fd_dsa.ops.topk.triton_kernel import select_slots

    arguments = select_arguments()
    assert_refused(kernel_memory, select_slots, "slots", arguments, changes, error, said)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"q": zeros(TOKENS, 144)}, ShapeError, r"q has shape \[5, 144\]"),
        ({"q": zeros(TOKENS, HEADS, 144, dtype="int32")}, DtypeError, "q has dtype int32"),
        ({"kv_lora_rank": 0}, ShapeError, "kv_lora_rank is 0, allowed is 1 to 144"),
        ({"kv_lora_rank": 145}, ShapeError, "kv_lora_rank is 145, allowed is 1 to 144"),
        ({"cache": zeros(9, 143)}, ShapeError, r"cache has shape \[9, 143\].*\[\*, 144\]"),
        ({"cache": zeros(9, 144, dtype="int32")}, DtypeError, "cache has dtype int32"),
        (
            {"cache": zeros(9, 144, dtype="uint8")},
            ShapeError,
            r"cache has shape \[9, 144\].*\[\*, 164\]",
        ),
        (
            {"cache": zeros(9, 164, dtype="uint8"), "kv_lora_rank": 100},
            ShapeError,
            "kv_lora_rank is 100, an FP8 cache allows multiples of 128",
        ),
        ({"slots": zeros(4, TOPK, dtype="int32")}, ShapeError, r"slots has shape \[4, 4\].*\[5, "),
        ({"slots": zeros(TOKENS, TOPK, dtype="int64")}, DtypeError, "slots has dtype int64"),
        ({"slots": [[0] * TOPK] * TOKENS}, ShapeError, "slots is a list"),
        ({"out": zeros(TOKENS, HEADS, 144)}, ShapeError, r"out has shape .*\[5, 2, 128\]"),
        ({"out": zeros(TOKENS, HEADS, RANK, dtype="int32")}, DtypeError, "out has dtype int32"),
    ],
)
def test_attention(
    kernel_memory: KernelMemory, changes: Arguments, error: type[Exception], said: str
) -> None:
    from fd_dsa.ops.mla.triton_kernel import attend_slots

    arguments = attend_arguments()
    assert_refused(kernel_memory, attend_slots, "out", arguments, changes, error, said)

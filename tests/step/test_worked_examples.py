"""Two steps worked out by hand: the oracle and the builder must both give these numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.step import StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.reference.step_metadata import ref_step_metadata
from tests.step.helpers import ARRAY_FIELDS, COUNT_FIELDS, as_numpy

BLOCK_SIZE = 64

# prefill, decode, second chunk after 66 tokens, decode with a draft token, idle
FIVE_KINDS = {
    "rows": [(5, 0, 5), (0, 130, 1), (4, 66, 4), (0, 63, 2), (0, 0, 0)],
    "block_tables": [[7, -1, -1], [3, 9, 12], [2, 5, -1], [11, 4, -1], [-1, -1, -1]],
    "cu_seqlens_q": [0, 5, 6, 10, 12, 12],
    "batch_id_per_token": [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3],
    "position_ids": [0, 1, 2, 3, 4, 130, 66, 67, 68, 69, 63, 64],
    "slot_mapping": [448, 449, 450, 451, 452, 770, 322, 323, 324, 325, 767, 256],
    "cu_seqlens_kg": [0, 5, 6, 76, 78, 78],
    "indexer_attn_mask_offsets": [
        *(0, 1, 0, 2, 0, 3, 0, 4, 0, 5),
        *(0, 0),
        *(6, 73, 6, 74, 6, 75, 6, 76),
        *(0, 0, 0, 0),
    ],
    "cache_seqlens": [0, 131, 0, 65, 0],
    "num_prefill_tokens": 9,
    "num_decode_tokens": 3,
    "max_seqlen_k": 131,
}

# decode, first chunk, idle, chunk after one full block, decode with two draft tokens
IDLE_BETWEEN = {
    "rows": [(0, 130, 1), (5, 0, 5), (0, 0, 0), (4, 64, 4), (0, 20, 3)],
    "block_tables": [
        [7, 2, 9, -1],
        [4, -1, -1, -1],
        [-1, -1, -1, -1],
        [1, 6, -1, -1],
        [3, -1, -1, -1],
    ],
    "cu_seqlens_q": [0, 1, 6, 6, 10, 13],
    "batch_id_per_token": [0, 1, 1, 1, 1, 1, 3, 3, 3, 3, 4, 4, 4],
    "position_ids": [130, 0, 1, 2, 3, 4, 64, 65, 66, 67, 20, 21, 22],
    "slot_mapping": [578, 256, 257, 258, 259, 260, 384, 385, 386, 387, 212, 213, 214],
    "cu_seqlens_kg": [0, 1, 6, 6, 74, 77],
    "indexer_attn_mask_offsets": [
        *(0, 0),
        *(1, 2, 1, 3, 1, 4, 1, 5, 1, 6),
        *(6, 71, 6, 72, 6, 73, 6, 74),
        *(0, 0, 0, 0, 0, 0),
    ],
    "cache_seqlens": [131, 0, 0, 0, 23],
    "num_prefill_tokens": 9,
    "num_decode_tokens": 4,
    "max_seqlen_k": 131,
}

EXAMPLES = pytest.mark.parametrize(
    "example", [FIVE_KINDS, IDLE_BETWEEN], ids=["five_kinds", "idle_between"]
)


def _inputs(example: dict[str, Any]) -> tuple[np.ndarray, ...]:
    lengths = np.array(example["rows"], np.int32)
    return (*np.ascontiguousarray(lengths.T), np.array(example["block_tables"], np.int32))


def _wanted(example: dict[str, Any]) -> dict[str, Any]:
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
    lengths = dict(zip(names, np.array(example["rows"]).T.tolist(), strict=True))
    arrays = {name: value for name, value in example.items() if name != "rows"}
    return {**lengths, **arrays, "position_ids_int32": example["position_ids"]}


@EXAMPLES
def test_oracle_gives_the_numbers_worked_out_by_hand(example: dict[str, Any]) -> None:
    found = ref_step_metadata(*_inputs(example), BLOCK_SIZE)
    listed = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in found.items()}
    assert listed == _wanted(example)


@EXAMPLES
@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_builder_gives_the_numbers_worked_out_by_hand(example: dict[str, Any], device: str) -> None:
    inputs = _inputs(example)
    columns = inputs[3].shape[1]
    builder = StepMetadataBuilder(8, 32, columns, BLOCK_SIZE, 13, device, int32_position_ids=True)
    meta = builder.build(*inputs)
    found: dict[str, Any] = {n: as_numpy(getattr(meta, n)).tolist() for n in ARRAY_FIELDS}
    found |= {name: getattr(meta, name) for name in COUNT_FIELDS}
    assert found == _wanted(example)


@EXAMPLES
@pytest.mark.parametrize("on_host", [True, False])
def test_kernel_gives_the_numbers_worked_out_by_hand(
    kernel_memory: KernelMemory, example: dict[str, Any], on_host: bool
) -> None:
    m, inputs = kernel_memory, _inputs(example)
    columns = inputs[3].shape[1]
    builder = StepMetadataBuilder(8, 32, columns, BLOCK_SIZE, 13, "gpu", m.poisoned, True)
    counts = {"num_tokens": example["num_prefill_tokens"] + example["num_decode_tokens"]}
    counts |= {name: example[name] for name in ("num_prefill_tokens", "max_seqlen_k")}
    meta = builder.build(*(inputs if on_host else map(m.put, inputs)), **counts)
    found: dict[str, Any] = {n: m.get(getattr(meta, n)).tolist() for n in ARRAY_FIELDS}
    found |= {name: getattr(meta, name) for name in COUNT_FIELDS}
    assert found == _wanted(example)


@EXAMPLES
def test_decode_rows_alone_compute_no_windows(example: dict[str, Any]) -> None:
    encoder, decoder, this_time, tables = _inputs(example)
    decode = encoder == 0
    builder = StepMetadataBuilder(8, 32, tables.shape[1], BLOCK_SIZE, 13, "numpy")
    meta = builder.build(encoder[decode], decoder[decode], this_time[decode], tables[decode])
    assert meta.indexer_attn_mask_offsets is None
    assert meta.cu_seqlens_kg is None
    assert meta.num_prefill_tokens == 0
    assert meta.num_decode_tokens == example["num_decode_tokens"]

"""The kernels of a decode step as one graph: a replay with other rows does what launches do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.ops.cache_write import write_caches
from fd_dsa.ops.logits.triton_kernel import score_pages
from fd_dsa.ops.mla.triton_kernel import attend_slots
from fd_dsa.ops.topk.triton_kernel import select_slots
from fd_dsa.ops.unchecked import prepare_indexer_query
from tests.gpu_rig import Rig
from tests.kernel_memory import POISON, KernelMemory, open_memory
from tests.ops.cache_write_case import BITS, BLOCK, DIM, RANK, ROPE, arguments, make_case, on_cpu
from tests.step.helpers import builder_for
from tests.strategies import StepBatch, make_batch

pytestmark = [
    pytest.mark.gpu_rig,
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.own_process,
]

# tokens of the step, the last ones padding
TOKENS = 8
COLUMNS = 3
# (encoder, decoder, this_time) of each row, step after step; the capture is made with the first
STEPS = (
    [(0, 70, 1), (0, 0, 0), (0, 5, 2), (0, 150, 1)],
    [(0, 71, 1), (0, 0, 0), (0, 62, 2), (0, 151, 1)],
    [(0, 0, 0), (0, 100, 1), (0, 0, 0), (0, 130, 1)],
    [(0, 0, 0), (0, 9, 0), (0, 0, 0), (0, 0, 0)],
)
NUM_BLOCKS = 12


def make_step(index: int) -> StepBatch:
    """One of the steps, over blocks below NUM_BLOCKS."""
    batch = make_batch(
        STEPS[index], BLOCK, seed=index, num_columns=COLUMNS, num_padded_tokens=TOKENS
    )
    return replace(batch, num_blocks=NUM_BLOCKS)


class DecodeStep:
    """A layer's decode step in buffers that stay where they are: metadata, writes, attention."""

    def __init__(self, rig: Rig, memory: KernelMemory, dtype: str) -> None:
        self.place, self.memory, self.fp8 = rig.place, memory, dtype == "fp8_ds_mla"
        self.dtype = dtype
        self.heads, self.index_heads, topk = (16, 64, 128) if memory.large else (2, 4, 24)
        self.batch = make_step(0)
        self.builder = builder_for(self.batch, device=rig.device)
        self.tensors = [memory.put(array) for array in self.batch.inputs()]
        # every slot of both caches holds a key from before
        past = make_case(NUM_BLOCKS * BLOCK, dtype).changed(num_blocks=NUM_BLOCKS)
        latent, index = on_cpu(past)
        self.past = latent, index
        self.latent, self.index = memory.put(latent), memory.put(index)
        step = past.changed(
            kv_a=past.kv_a[:TOKENS], index_k=past.index_k[:TOKENS], num_blocks=NUM_BLOCKS
        )
        self.kv_a, self.index_k, _, _, self.cos_sin, _, _, self.params = arguments(memory, step)
        self.q = memory.poisoned((TOKENS, self.heads, RANK + ROPE), "float32")
        self.index_q = memory.poisoned((TOKENS, self.index_heads, DIM), "float32")
        self.weights = memory.poisoned((TOKENS, self.index_heads), "float32")
        self.outputs = {
            "prepared": memory.poisoned(self.index_q.shape, "uint8" if self.fp8 else "float32"),
            "folded": memory.poisoned((TOKENS, self.index_heads), "float32"),
            "logits": memory.poisoned((TOKENS, COLUMNS * BLOCK), "float32"),
            "slots": memory.poisoned((TOKENS, topk), "int32"),
            "out": memory.poisoned((TOKENS, self.heads, RANK), "float32"),
        }

    def load(self, index: int) -> None:
        """Put a step's rows and activations into the buffers; caches and outputs as at first."""
        rng = np.random.default_rng(index)
        self.batch = make_step(index)
        for tensor, array in zip(self.tensors, self.batch.inputs(), strict=True):
            self._set(tensor, array)
        for tensor in (self.kv_a, self.index_k, self.q, self.index_q, self.weights):
            self._set(tensor, rng.standard_normal(tensor.shape).astype(np.float32))
        for tensor, array in zip((self.latent, self.index), self.past, strict=True):
            self._set(tensor, array)
        for tensor in self.outputs.values():
            plain = self.memory.get(tensor)
            self._set(tensor, np.full(plain.nbytes, POISON, np.uint8).view(plain.dtype))

    def _set(self, tensor: Any, array: np.ndarray) -> None:
        """New values in the same memory."""
        source = paddle.to_tensor(array.reshape(tensor.shape), place=self.place)
        tensor.copy_(source, False)

    def run(self) -> None:
        """What a layer does in a decode step, kernels alone."""
        out = self.outputs
        # upper bounds: a graph serves all steps of these rows
        meta = self.builder.build(
            *self.tensors,
            num_tokens=TOKENS,
            num_prefill_tokens=0,
            max_seqlen_k=COLUMNS * BLOCK,
        )
        at = meta.position_ids, meta.batch_id_per_token, meta.block_tables
        write_caches(
            self.kv_a,
            self.index_k,
            meta.position_ids,
            meta.slot_mapping,
            self.cos_sin,
            self.latent,
            self.index,
            self.params,
        )
        prepare_indexer_query(
            self.index_q,
            self.weights,
            meta.position_ids,
            self.cos_sin,
            rope_interleave=False,
            quantized=self.fp8,
            out=(out["prepared"], out["folded"]),
        )
        logits = out["logits"]
        score_pages(out["prepared"], out["folded"], self.index, *at, logits, block_size=BLOCK)
        select_slots(logits, *at, out["slots"], block_size=BLOCK, num_blocks=NUM_BLOCKS)
        attend_slots(
            self.q, self.latent, out["slots"], out["out"], softmax_scale=0.07, kv_lora_rank=RANK
        )

    def results(self) -> dict[str, np.ndarray]:
        """All that the step wrote."""
        written = self.outputs | {"latent": self.latent, "index": self.index}
        return {name: self.memory.get(tensor) for name, tensor in written.items()}


def assert_padding(step: DecodeStep, found: dict[str, np.ndarray]) -> None:
    """Tokens past the live ones attend to nothing; no slot but theirs was written."""
    live = step.batch.num_tokens
    assert (found["slots"][live:] == -1).all() and (found["out"][live:] == 0).all()
    assert (found["logits"][live:].view(np.uint8) == POISON).all()
    assert np.isfinite(found["out"]).all() and (found["out"][:live] != 0).any(axis=(1, 2)).all()
    wanted = builder_for(step.batch).build(*step.batch.inputs(), TOKENS).slot_mapping
    past = step.past[0].reshape(NUM_BLOCKS * BLOCK, -1)
    changed = (found["latent"].reshape(past.shape) != past).any(axis=1)
    assert sorted(np.flatnonzero(changed)) == sorted(wanted[wanted >= 0])


@pytest.mark.parametrize("dtype", BITS)
def test_replays_do_what_launches_do(rig: Rig, dtype: str) -> None:
    memory = open_memory("rig")
    captured, launched = DecodeStep(rig, memory, dtype), DecodeStep(rig, memory, dtype)
    captured.load(0)
    with rig.strict():
        replay = rig.captured(captured.run)
    for index in (1, 2, 3, 0) if rig.is_real else (2, 3):
        captured.load(index)
        with rig.counting() as counted:
            replay()
        assert counted.delta == {}
        found = captured.results()
        launched.load(index)
        launched.run()
        for name, array in launched.results().items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{name}, step {index}")
        assert_padding(captured, found)

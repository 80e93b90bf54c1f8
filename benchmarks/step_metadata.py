"""The step's metadata: one launch a step against a chain of operators twice in every layer.

    python -m benchmarks.step_metadata        # decode batches, then steps with prefill

The baseline is what FastDeploy did before #7367: `slot_mapping` from the block table by division,
gather, remainder, multiply-add and cast, twice a layer, and before #7598, in steps with prefill, a
Python loop over the rows for `[ks, ke)` in every layer. It is given positions and rows for
nothing, which ours computes too. "graph" is device time of a captured graph, ours over up to 48
input sets in turn (those of large batches exceed the L2) and over one. "eager" is wall time of a
step, host included, on the same inputs again and again. The loop reads lengths from the device, so
it cannot be captured: the baseline's graph has the chains alone.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from tests.strategies import StepBatch, make_batch

Rows = list[tuple[int, int, int]]
DEVICE = "cuda"
OURS = "one launch"
LAYERS = 61
BLOCK_SIZE = 64
MAX_NUM_SEQS = 256
MAX_NUM_TOKENS = 32768
# of one row: 128k tokens and a prefill chunk
MAX_BLOCKS = 2560
DECODE_BATCHES = (1, 32, 128, 256)
CONTEXT = 16384
PREFILL_STEPS = {
    "1 x 32k": [(32768, 0, 32768)],
    "8 x 4k": [(4096, 0, 4096)] * 8,
    "128 decode + 8k": [(0, CONTEXT, 1)] * 128 + [(8192, 0, 8192)],
}


@dataclass(frozen=True)
class Step:
    """One step's inputs on the GPU, what the host knows of it, and the inputs of the baseline."""

    batch: StepBatch
    tensors: tuple[torch.Tensor, ...]
    counts: dict[str, int]
    position_ids: torch.Tensor
    batch_id_per_token: torch.Tensor
    cu_seqlens_q: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Fewest bytes read and written: lengths and table entries in, all arrays out."""
        prefill = self.counts["num_prefill_tokens"] > 0
        a_token = 4 + 4 + 8 + 8 + (8 if prefill else 0)
        a_row = 8 + 8 + (8 if prefill else 0)
        return a_token * self.batch.num_tokens + a_row * self.batch.num_rows


def allocate(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Poisoned CUDA memory for the builder."""
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)
    _gpu.poison(tensor)
    return tensor


def make_builder() -> StepMetadataBuilder:
    """A builder on torch memory, of a server's size."""
    return StepMetadataBuilder(
        MAX_NUM_SEQS, MAX_NUM_TOKENS, MAX_BLOCKS, BLOCK_SIZE, None, "gpu", allocate
    )


def make_step(rows: Rows, seed: int) -> Step:
    """A step over shuffled blocks."""
    batch = make_batch(rows, BLOCK_SIZE, seed=seed, num_columns=MAX_BLOCKS)
    cu_seqlens_q = np.concatenate([[0], np.cumsum(batch.seq_lens_this_time)])
    ids = np.repeat(np.arange(batch.num_rows), batch.seq_lens_this_time)
    positions = np.arange(batch.num_tokens) - cu_seqlens_q[ids] + batch.seq_lens_decoder[ids]
    return Step(
        batch,
        tuple(torch.from_numpy(array).to(DEVICE) for array in batch.inputs()),
        {
            "num_tokens": batch.num_tokens,
            "num_prefill_tokens": int(batch.seq_lens_encoder.sum()),
            "max_seqlen_k": int((batch.seq_lens_decoder + batch.seq_lens_this_time).max()),
        },
        torch.from_numpy(positions.astype(np.int64)).to(DEVICE),
        torch.from_numpy(ids.astype(np.int32)).to(DEVICE),
        torch.from_numpy(cu_seqlens_q.astype(np.int32)).to(DEVICE),
    )


def slot_chain(step: Step) -> torch.Tensor:
    """`slot_mapping` as every layer computed it, from positions and rows."""
    blocks = step.tensors[3][step.batch_id_per_token, step.position_ids // BLOCK_SIZE]
    return (blocks * BLOCK_SIZE + step.position_ids % BLOCK_SIZE).to(torch.int64)


def window_loop(step: Step) -> torch.Tensor:
    """`[ks, ke)` as every layer computed it: rows in Python, lengths read from the device."""
    encoder, cu_seqlens_q = step.tensors[0], step.cu_seqlens_q
    ks = torch.zeros(len(step.position_ids), dtype=torch.int32, device=DEVICE)
    ke = torch.zeros_like(ks)
    for row in range(len(encoder)):
        if encoder[row] > 0:
            start, end = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
            ks[start:end] = cu_seqlens_q[row]
            ke[start:end] = torch.arange(start + 1, end + 1, dtype=torch.int32, device=DEVICE)
    return torch.stack([ks, ke], dim=1).reshape(-1)


def per_layer_work(step: Step, windows: bool) -> None:
    """All slot mappings of one step, and the windows of one with prefill where they are asked."""
    for _ in range(2 * LAYERS):
        slot_chain(step)
    for _ in range(LAYERS if windows and step.counts["num_prefill_tokens"] else 0):
        window_loop(step)


def check_equal(meta: ForwardMeta, step: Step) -> None:
    """Ours and the baseline must agree before they are timed.

    Raises:
        AssertionError: an array differs.
    """
    wanted = {"slot_mapping": slot_chain(step), "position_ids": step.position_ids}
    wanted |= {"batch_id_per_token": step.batch_id_per_token, "cu_seqlens_q": step.cu_seqlens_q}
    if meta.indexer_attn_mask_offsets is not None:
        wanted["indexer_attn_mask_offsets"] = window_loop(step)
    for name, array in wanted.items():
        assert torch.equal(getattr(meta, name), array), name


def measure(record: _gpu.Recorder, builder: StepMetadataBuilder, label: str, rows: Rows) -> None:
    """Both sides of one step: in a graph, and eagerly with the host."""
    first = make_step(rows, 0)
    tables_bytes = first.tensors[3].nbytes
    steps = [first] + [make_step(rows, seed) for seed in range(1, _gpu.num_sets(tables_bytes))]

    def build(step: Step) -> Callable[[], ForwardMeta]:
        return partial(builder.build, *step.tensors, **step.counts)

    check_equal(build(first)(), first)
    sides = {f"{2 * LAYERS} chains": [partial(per_layer_work, first, False)]}
    sides |= {OURS: [build(step) for step in steps]}
    sides["one launch, inputs in the L2"] = [build(first)]
    times = _gpu.interleaved(sides, mode="graph", rounds=20)
    record.case(f"{label}, graph", times, ours=OURS, bytes_moved=first.num_bytes)

    eager = {"every layer": [partial(per_layer_work, first, True)], OURS: [build(first)]}
    has_loop = first.counts["num_prefill_tokens"] > 0
    times = _gpu.interleaved(eager, mode="wall", rounds=3 if has_loop else 15)
    effects = _gpu.effects(build(first))
    record.case(f"{label}, eager", times, ours=OURS, bytes_moved=first.num_bytes, **effects)


def decode_rows(batch_size: int) -> Rows:
    """Rows of a decode-only step, their contexts around CONTEXT."""
    return [(0, CONTEXT + 37 * row, 1) for row in range(batch_size)]


def subjects() -> dict[str, tuple[Callable[[], Any], list[torch.Tensor]]]:
    """Steps of real serving, for profiles and repeats."""
    found = {}
    cases = {"decode 128": decode_rows(128), "128 decode + 8k": PREFILL_STEPS["128 decode + 8k"]}
    for label, rows in cases.items():
        step, builder = make_step(rows, 0), make_builder()
        meta = builder.build(*step.tensors, **step.counts)
        outputs = [meta.slot_mapping, meta.position_ids, meta.batch_id_per_token]
        outputs += [meta.cu_seqlens_q, meta.cache_seqlens]
        if meta.indexer_attn_mask_offsets is not None:
            outputs += [meta.indexer_attn_mask_offsets, meta.cu_seqlens_kg]
        found[label] = partial(builder.build, *step.tensors, **step.counts), outputs
    return found


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One in a graph and one eager for each step."""
    steps = {f"decode {batch}": decode_rows(batch) for batch in DECODE_BATCHES} | PREFILL_STEPS
    builder = make_builder()
    for label in ("decode 128", "8 x 4k") if args.quick else steps:
        yield label, partial(measure, record, builder, label, steps[label])


main = partial(_gpu.main, "step_metadata", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())

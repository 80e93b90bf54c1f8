"""The step's metadata: one launch a step against a chain of operators twice in every layer.

    python -m benchmarks.step_metadata        # decode batches, then steps with prefill

The baseline is FastDeploy's form. Before #7367 every layer made `slot_mapping` twice from the block
table: division, gather, remainder, multiply-add and cast. Before #7598 every layer of a step with
prefill made `[ks, ke)` by a Python loop over the rows. The baseline gets positions and rows for
free, which ours computes too.

"graph" is device time of a captured graph. Ours runs over up to 48 input sets in turn (those of
large batches exceed the L2), and over one. "eager" is wall time of a step on the same inputs, host
included. The loop reads lengths from the device, so it cannot be captured: the baseline's graph has
the chains only.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import _gpu
from fd_dsa.step import StepMetadataBuilder
from tests.strategies import make_batch

Rows = list[tuple[int, int, int]]
DEVICE = "cuda"
OURS = "one launch"
LAYERS = 61
BLOCK_SIZE = 64
MAX_NUM_SEQS = 256
MAX_NUM_TOKENS = 32768
# of one row: 128k tokens and a prefill chunk
MAX_BLOCKS = 2560
CONTEXT = 16384


def decode_rows(batch_size: int) -> Rows:
    """Return rows of a decode-only step with contexts around CONTEXT."""
    return [(0, CONTEXT + 37 * row, 1) for row in range(batch_size)]


STEPS = {f"decode {batch}": decode_rows(batch) for batch in (1, 32, 128, 256)} | {
    "1 x 32k": [(32768, 0, 32768)],
    "8 x 4k": [(4096, 0, 4096)] * 8,
    "128 decode + 8k": [(0, CONTEXT, 1)] * 128 + [(8192, 0, 8192)],
}


def make_builder() -> StepMetadataBuilder:
    """Return a builder of a server's size on poisoned torch memory."""

    def allocate(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)
        _gpu.poison(tensor)
        return tensor

    sizes = MAX_NUM_SEQS, MAX_NUM_TOKENS, MAX_BLOCKS, BLOCK_SIZE
    return StepMetadataBuilder(*sizes, None, "gpu", allocate)


class Step:
    """A step's inputs on the GPU over shuffled blocks, and what the host knows of it."""

    def __init__(self, rows: Rows, seed: int) -> None:
        batch = make_batch(rows, BLOCK_SIZE, seed=seed, num_columns=MAX_BLOCKS)
        self.tensors = tuple(torch.from_numpy(array).to(DEVICE) for array in batch.inputs())
        self.counts = {
            "num_tokens": batch.num_tokens,
            "num_prefill_tokens": int(batch.seq_lens_encoder.sum()),
            "max_seqlen_k": int((batch.seq_lens_decoder + batch.seq_lens_this_time).max()),
        }
        windows = 8 if self.counts["num_prefill_tokens"] else 0
        # fewest bytes read and written: lengths and table entries in, all arrays out
        self.num_bytes = (24 + windows) * batch.num_tokens + (12 + windows) * batch.num_rows

    def build(self, builder: StepMetadataBuilder) -> _gpu.Call:
        """Return a call that makes its metadata."""
        return partial(builder.build, *self.tensors, **self.counts)


class Baseline:
    """The metadata work of every layer before #7367. Positions and rows are given.

    Args:
        step: its inputs.
        meta: our metadata of it, of which the given part is copied.
    """

    def __init__(self, step: Step, meta: Any) -> None:
        self._encoder, _, _, self._tables = step.tensors
        self._has_prefill = step.counts["num_prefill_tokens"] > 0
        names = "position_ids", "batch_id_per_token", "cu_seqlens_q"
        self._given = SimpleNamespace(**{name: getattr(meta, name).clone() for name in names})

    def slots(self) -> torch.Tensor:
        """Return `slot_mapping`, from positions and rows."""
        positions = self._given.position_ids
        blocks = self._tables[self._given.batch_id_per_token, positions // BLOCK_SIZE]
        return (blocks * BLOCK_SIZE + positions % BLOCK_SIZE).to(torch.int64)

    def windows(self) -> torch.Tensor:
        """Return `[ks, ke)`: rows in Python, lengths read from the device."""
        encoder, cu_seqlens_q = self._encoder, self._given.cu_seqlens_q
        ks = torch.zeros(len(self._given.position_ids), dtype=torch.int32, device=DEVICE)
        ke = torch.zeros_like(ks)
        for row in range(len(encoder)):
            if encoder[row] > 0:
                start, end = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
                ks[start:end] = cu_seqlens_q[row]
                ke[start:end] = torch.arange(start + 1, end + 1, dtype=torch.int32, device=DEVICE)
        return torch.stack([ks, ke], dim=1).reshape(-1)

    def work(self, windows: bool) -> None:
        """Make all slot mappings of a step, and the windows of a step with prompts if asked."""
        for _ in range(2 * LAYERS):
            self.slots()
        for _ in range(LAYERS if windows and self._has_prefill else 0):
            self.windows()


def measure(record: _gpu.Recorder, builder: StepMetadataBuilder, label: str) -> None:
    """Compare both sides of a step, in a graph and eagerly with the host.

    Raises:
        AssertionError: they do not agree.
    """
    rows = STEPS[label]
    first = Step(rows, 0)
    count = _gpu.num_sets(first.tensors[3].nbytes)
    steps = [first] + [Step(rows, seed) for seed in range(1, count)]
    meta = first.build(builder)()
    baseline = Baseline(first, meta)
    assert torch.equal(meta.slot_mapping, baseline.slots()), "slot_mapping"
    if meta.indexer_attn_mask_offsets is not None:
        assert torch.equal(meta.indexer_attn_mask_offsets, baseline.windows()), "windows"
    how = {"ours": OURS, "bytes_moved": first.num_bytes}
    sides = {f"{2 * LAYERS} chains": [partial(baseline.work, False)]}
    sides |= {OURS: [step.build(builder) for step in steps]}
    sides["one launch, inputs in the L2"] = [first.build(builder)]
    record.case(f"{label}, graph", _gpu.interleaved(sides, mode="graph", rounds=20), **how)

    eager = {"every layer": [partial(baseline.work, True)], OURS: [first.build(builder)]}
    rounds = 3 if first.counts["num_prefill_tokens"] else 15
    times = _gpu.interleaved(eager, mode="wall", rounds=rounds)
    record.case(f"{label}, eager", times, **how, **_gpu.effects(first.build(builder)))


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Return steps of real serving, for profiles and repeats."""
    found = {}
    for label in ("decode 128", "128 decode + 8k"):
        call = Step(STEPS[label], 0).build(make_builder())
        meta = call()
        outputs = [meta.slot_mapping, meta.position_ids, meta.batch_id_per_token]
        outputs += [meta.cu_seqlens_q]
        if meta.indexer_attn_mask_offsets is not None:
            outputs += [meta.indexer_attn_mask_offsets, meta.cu_seqlens_kg]
        found[label] = call, outputs
    return found


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Yield a captured and an eager case for each step."""
    builder = make_builder()
    for label in ("decode 128", "8 x 4k") if args.quick else STEPS:
        yield label, partial(measure, record, builder, label)


main = partial(_gpu.main, "step_metadata", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())

"""After a step's own tokens the buffers hold padding, whatever steps came before it.

A graph of the layers that was captured for more tokens reads exactly that tail; a graph that builds
its step writes all that it reads. `Tail` holds views of all tokens and rows, as such a graph does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.device.transfers import Transfers
from fd_dsa.step import StepMetadataBuilder, device_provider
from tests.kernel_memory import KernelMemory, open_memory
from tests.step.helpers import Get, arrays_of, as_numpy, counts_of, device_builder
from tests.strategies import StepBatch, examples, make_batch, step_sequences

ROWS, TOKENS = 8, 720
EXAMPLES = examples(6, in_soak=12)


class Tail:
    """All tokens and rows of a builder's buffers, by a first step with a token of a prompt."""

    def __init__(self, builder: StepMetadataBuilder, columns: int, get: Get = as_numpy) -> None:
        rows = [(1, 0, 1)] + [(0, 0, 0)] * (builder.limits.max_num_seqs - 1)
        first = make_batch(rows, builder.limits.block_size, num_columns=columns)
        self._meta, self._get = builder.build(*first.inputs(), builder.limits.max_num_tokens), get

    def check(self, batch: StepBatch, has_windows: bool, end: int | None = None) -> None:
        """There is only padding after the tokens, up to `end`, and after the rows of a batch."""
        found = arrays_of(self._meta, self._get)
        tokens, rows = batch.num_tokens, batch.num_rows
        for name in ("batch_id_per_token", "slot_mapping"):
            assert (found[name][tokens:end] == -1).all(), name
        for name in ("position_ids", "position_ids_int32"):
            assert not found[name][tokens:end].any(), name
        assert (found["cu_seqlens_q"][rows:] == tokens).all()
        # a step without windows leaves those of a step before it, and hands out none
        if has_windows:
            windows = found["indexer_attn_mask_offsets"].reshape(-1, 2)
            assert not windows[tokens:end].any()
            totals = found["cu_seqlens_kg"][rows:]
            assert (totals == totals[0]).all()


@pytest.mark.parametrize(("device", "many", "in_soak"), [("numpy", 40, 200), ("cpu", 10, 30)])
def test_on_a_cpu(device: str, many: int, in_soak: int) -> None:
    """Paddle's tensors are of the memory that NumPy fills, so they take fewer steps."""

    @examples(many, in_soak)
    @given(steps=step_sequences())
    def check(steps: list[StepBatch]) -> None:
        columns, block_size = steps[0].block_tables.shape[1], steps[0].block_size
        builder = StepMetadataBuilder(
            ROWS, TOKENS, columns, block_size, device=device, int32_position_ids=True
        )
        tail = Tail(builder, columns)
        for batch in steps:
            meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
            tail.check(batch, meta.indexer_attn_mask_offsets is not None)

    check()


@EXAMPLES
@given(
    steps=step_sequences(),
    slack=st.lists(st.sampled_from([0, 0, 3, 70]), min_size=6, max_size=6),
    unsure=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_on_a_device(
    kernel_memory: KernelMemory, steps: list[StepBatch], slack: list[int], unsure: list[bool]
) -> None:
    m, columns = kernel_memory, steps[0].block_tables.shape[1]
    builder = device_builder(m, steps[0], max_num_seqs=ROWS, max_num_tokens=TOKENS, num_blocks=None)
    tail = Tail(builder, columns, m.get)
    for batch, more, maybe_prefill in zip(steps, slack, unsure, strict=False):
        counts = counts_of(batch)
        counts["num_tokens"] += more
        if maybe_prefill:
            counts["num_prefill_tokens"] = counts["num_tokens"]
        meta = builder.build(*(m.put(array) for array in batch.inputs()), **counts)
        tail.check(batch, meta.indexer_attn_mask_offsets is not None)


Capture = Callable[[Callable[[], Any]], Callable[[], None]]
PROMPT = [(40, 0, 40), (0, 9, 1), (30, 16, 30)]
LONG_PROMPT = [(90, 0, 90), (0, 9, 1), (45, 16, 45)]
DECODE = [(0, 20, 2), (0, 0, 0), (0, 33, 1)]
ONE = [(0, 5, 1), (0, 0, 0), (0, 0, 0)]


def check_captured_steps(m: KernelMemory, capture: Capture, *, has_prefill: bool) -> None:
    """Steps, captures and replays in an order that the host cannot see through.

    Args:
        capture: makes a replay of work, which is not done by the capture.
        has_prefill: of the captured steps.
    """
    batches = {
        name: make_batch(rows, 16, num_columns=8, seed=seed)
        for seed, (name, rows) in enumerate(
            {"prompt": PROMPT, "long": LONG_PROMPT, "decode": DECODE, "one": ONE}.items()
        )
    }
    builder = device_builder(m, batches["prompt"], max_num_tokens=200, num_blocks=None)
    tensors = [m.put(array) for array in batches["prompt"].inputs()]
    tail = Tail(builder, 8, m.get)

    def load(name: str) -> StepBatch:
        for tensor, array in zip(tensors, batches[name].inputs(), strict=True):
            tensor.copy_(m.put(array), False)
        return batches[name]

    def step(name: str) -> None:
        """An eager step."""
        batch = load(name)
        meta = builder.build(*tensors, **counts_of(batch))
        tail.check(batch, meta.indexer_attn_mask_offsets is not None)

    def captured(num_tokens: int) -> Callable[[], None]:
        """A step of at most this many tokens."""
        prefill = num_tokens if has_prefill else 0
        return capture(
            lambda: builder.build(
                *tensors, num_tokens=num_tokens, num_prefill_tokens=prefill, max_seqlen_k=128
            )
        )

    step("prompt")
    # not run yet: the tokens of the prompt are still there
    small = captured(24)
    step("one")
    step("prompt")
    large = captured(100)
    step("decode")
    last = "prompt" if has_prefill else "decode"
    for work, name, size in ((small, "decode", 24), (large, last, 100)):
        for before in ("long", "one"):
            # after a step that is larger than all before the capture, and after a smaller one
            step(before)
            batch = load(name)
            work()
            tail.check(batch, has_prefill, size)
            step("one")
        step("prompt")


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """Launches of the block are kept, not run, as in a capture."""
    calls: list[Callable[[], None]] = []
    original = device_provider.BoundStepKernel.launch

    def keep(*args: Any) -> None:
        calls.append(lambda: original(*args))

    with monkeypatch.context() as patch:
        patch.setattr(device_provider.BoundStepKernel, "launch", keep)
        patch.setattr(Transfers, "is_capturing", lambda self: True)
        yield calls


@pytest.mark.triton
@pytest.mark.parametrize("has_prefill", [False, True], ids=["decode", "prefill"])
def test_around_replays_of_recorded_launches(
    monkeypatch: pytest.MonkeyPatch, has_prefill: bool
) -> None:
    def capture(work: Callable[[], Any]) -> Callable[[], None]:
        with recording(monkeypatch) as calls:
            work()
        assert len(calls) == 1
        return calls[0]

    check_captured_steps(open_memory("interpreter"), capture, has_prefill=has_prefill)


@pytest.mark.gpu
@pytest.mark.parametrize("has_prefill", [False, True], ids=["decode", "prefill"])
def test_around_replays_of_graphs(has_prefill: bool) -> None:
    import torch

    def capture(work: Callable[[], Any]) -> Callable[[], None]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    check_captured_steps(open_memory("torch"), capture, has_prefill=has_prefill)

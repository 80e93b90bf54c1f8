"""Samples and logits of steps on a device, as a runner enqueues them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.runner import InputBatch
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.runner.step import Step
from tests.kernel_memory import KernelMemory


def test_the_warm_up_samples_no_token(paddle_memory: KernelMemory) -> None:
    """160 rows of padding, more than there are batch rows: no token is written."""
    from fd_dsa.runner.device_steps import DeviceSteps

    batch = InputBatch(40, 40, 1, 16)
    steps = DeviceSteps(batch, 300, paddle_memory.poisoned, max_drafts=3)
    before = steps.read_drafts().result().copy()
    steps.warm_up()
    assert (steps.read_drafts().result() == before).all()


@pytest.mark.triton
def test_logits_come_in_memory_that_stays(paddle_memory: KernelMemory) -> None:
    from fd_dsa.runner.device_steps import DeviceSteps

    m = paddle_memory
    steps = DeviceSteps(InputBatch(2, 8, 1, 16), 3, m.poisoned)
    first = steps.logits_on_host(m.put(np.arange(6, dtype=np.float32).reshape(2, 3)))
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    second = steps.logits_on_host(m.put(np.float32([[9, 8, 7]])))
    assert second.tolist() == [[9, 8, 7]]
    assert second.ctypes.data == first.ctypes.data
    # prompts all of whose logits are wanted
    large = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_array_equal(steps.logits_on_host(m.put(large)), large)


@pytest.mark.triton
def test_samples_stay_while_the_next_step_is_sampled(paddle_memory: KernelMemory) -> None:
    from fd_dsa.ops.sampling.parameters import RowParameters
    from fd_dsa.runner.device_steps import DeviceSteps

    m = paddle_memory
    steps = DeviceSteps(InputBatch(2, 8, 1, 16), 5, m.poisoned)
    for batch_row in range(2):
        steps.sampler.set_parameters(batch_row, RowParameters(temperature=0.0))
    rows = [m.put(values, "int32") for values in ([0, 1], [0, 0], [-1, -1])]
    before: list[int] = []
    kept = np.array(before)
    for tokens in ([4, 2], [1, 3], [0, 0]):
        steps.sampler.sample(m.put(np.eye(5, dtype=np.float32)[tokens]), *rows)
        newest = steps.samples(2).result()
        assert newest.tolist() == tokens and kept.tolist() == before
        before, kept = tokens, newest


class Counting:
    """Layer whose draft is the id of the last token plus 1.

    Attributes:
        calls: token ids and numbers of tokens in the cache of each call.
    """

    num_streams = 1

    def __init__(self, m: KernelMemory, vocab_size: int) -> None:
        self._memory, self.calls = m, list[Any]()
        self.embed_tokens = m.put(np.eye(vocab_size, dtype=np.float32))

    def __call__(self, next_ids: Any, hidden: Any, step: Step) -> Any:
        get = self._memory.get
        self.calls.append([get(x).tolist() for x in (next_ids, step.num_computed_tokens)])
        return self._memory.put(np.roll(get(self.embed_tokens), -1, 0)[get(next_ids)])

    def compute_logits(self, hidden_states: Any, out: Any = None) -> Any:
        return hidden_states


@pytest.mark.triton
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_further_draft_goes_on_from_the_one_before(
    paddle_memory: KernelMemory, count: int
) -> None:
    """Two requests in batch rows 0 and 2, of 5 and 9 tokens, and room for three drafts of each."""
    from fd_dsa.ops.sampling.parameters import RowParameters
    from fd_dsa.runner.device_steps import DeviceSteps

    m, batch, vocab_size = paddle_memory, InputBatch(3, 40, 2, 16), 20
    layer = Counting(m, vocab_size)
    steps = DeviceSteps(batch, vocab_size, m.poisoned, max_drafts=3, mtp=layer)
    for row, length in ((0, 5), (2, 9)):
        steps.sampler.set_parameters(row, RowParameters(temperature=0.0))
        batch.add_row(row, [row], length - 1, is_prefill=False)
    sampled, next_ids = np.array([0, 1]), np.array([7, 11])
    steps.inputs.stage(batch.arrays(sampled), SamplingInputs(), next_ids)
    inputs, sampling = steps.inputs.views(2, 3, 2)
    built: list[Any] = []
    backend: Any = SimpleNamespace(build_step=lambda step, rows, hints: built.append(hints))
    states = m.put(np.zeros((2, vocab_size), np.float32))
    step = Step(*inputs, (), backend, sampling, hidden_states=states)
    steps.seed_drafts(step, next_ids, [[0, 0, 1, 5], [1, 2, 1, 9]])
    steps.draft(step, 2)
    steps.draft_more(step, 2, 9 + count, count)
    ids, buffer = steps.read_drafts().result(), steps.buffer
    drafts = [[int(ids[buffer.draft(depth, i)]) for depth in range(count)] for i in range(2)]
    assert drafts == [[8, 9, 10][:count], [12, 13, 14][:count]]
    # each step has one token a request, after those that the steps before have written
    assert layer.calls[1:] == [[[7 + n, 11 + n], [4 + n, 0, 8 + n]] for n in range(1, count)]
    assert [hints.max_seqlen_k for hints in built] == [9 + count] * (count - 1)

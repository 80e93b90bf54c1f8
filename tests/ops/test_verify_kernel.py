"""Drafts on a device: which stand, what penalties make of them, and where the next step goes on."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="drafts are verified by Triton's kernels")

from fd_dsa.engine import sampler as cpu
from fd_dsa.engine.logit_rules import LogitRules
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.ops.sampling.parameters import FLAGS, PENALIZED, RECORD, RowParameters
from fd_dsa.ops.sampling.sampler import DeviceSampler
from fd_dsa.ops.sampling.token_buffer import REJECTED
from fd_dsa.ops.sampling.verify_kernel import (
    FOLLOW_BLOCK,
    extend_kernel,
    follow_kernel,
    verify_kernel,
)
from tests.kernel_memory import KernelMemory


def test_what_follows_a_wrong_draft_is_marked(kernel_memory: KernelMemory) -> None:
    """Requests with 2, 0, 3, 1 and 2 drafts, of which 1, 0, 3, 0 and 0 stand; room for one more."""
    m = kernel_memory
    # a token with an error, whose draft is another, and one that is equal to it
    tokens = [5, 6, 7, 8, 1, 2, 3, 4, 9, 9, -1, 4, 5]
    ids = [30, 40, 5, 0, 31, 32, 1, 2, 3, 33, 8, 34, -1, 4]
    sampled = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    firsts = [0, 3, 4, 8, 10, 13, -1]
    batch_rows, positions = [4] * 3 + [0] + [2] * 4 + [5] * 2 + [1] * 3, [*range(10, 23)]
    lengths = [[100, 110, 120, 0, 140, 150], [1, 3, 4, 0, 3, 2]]
    places = (ids, sampled, batch_rows, positions, firsts, *lengths)
    put = [m.put(values, "int32") for values in places]
    found, going_on = m.put(np.array(tokens)), m.poisoned((4, 32), "int32")
    newest, counts = m.put(np.full(6, 77)), m.put(np.zeros((6, 50)), "int32")
    # batch rows 1 and 4 have penalties
    records = np.zeros((6, RECORD), np.int32)
    records[[1, 4], FLAGS] = PENALIZED
    verify_kernel[(6,)](
        found, *put, going_on, newest, m.put(records), counts, STRIDE=32, MAX_DRAFTS=3, VOCAB=50,
        num_warps=1,
    )  # fmt: skip
    # the token of batch row 1 is none
    assert np.argwhere(m.get(counts)).tolist() == [[4, 5], [4, 6]]
    marked = m.get(found).tolist()
    assert marked == [5, 6, REJECTED, 8, 1, 2, 3, 4, 9, REJECTED, -1, REJECTED, REJECTED]
    assert m.get(going_on)[:, :6].tolist() == [
        [2, 4, 8, 9, 11, 0],
        [4, 0, 2, 5, 1, -1],
        [12, 14, 18, 19, 21, 0],
        [142, 101, 124, 151, 111, 0],
    ]
    assert m.get(newest).tolist() == [6, 8, 4, 9, -1, 77]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_count_the_drafts_in_front(
    kernel_memory: KernelMemory, temperature: float
) -> None:
    """Slots with 3, 0 and 1 drafts; a draft may come twice, or be in prompt and output."""
    m, vocab_size, drafts = kernel_memory, 90, [[7, 7, 3], [], [8]]
    host, device = cpu.Sampler(3), DeviceSampler(3, vocab_size, m.poisoned, 7)
    kinds = [(1.5, 0.9, 0.4), (1.0, 0.0, 0.0), (1.0, -2.0, 0.0)]
    prompt, outputs = [3, 4, 5], [[7, 9], [1], [8, 8]]
    for batch_row, (kind, output) in enumerate(zip(kinds, outputs, strict=True)):
        record = RowParameters(temperature, 0, 0, 1, batch_row, *kind)
        device.set_parameters(batch_row, record, prompt, output)
    batch_rows, positions = [0, 0, 0, 0, 1, 2, 2], np.array([2, 3, 4, 5, 1, 2, 3])
    ids, sampled = [9, 7, 7, 3, 1, 8, 8], range(7)
    logits = 3 * np.random.default_rng(6).normal(size=(7, vocab_size)).astype(np.float32)
    before = m.get(device.counts)
    put = [m.put(values, "int32") for values in (batch_rows, positions, [-1] * 7, ids, sampled)]
    device.sample(m.put(logits), *put[:3], verified=(*put[3:], 3))
    found = m.get(device.tokens)
    for row, batch_row in enumerate(batch_rows):
        repetition, frequency, presence = kinds[batch_row]
        params = SamplingParams(
            temperature=temperature,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        rules = LogitRules(
            params,
            prompt,
            outputs[batch_row] + drafts[batch_row][: row - batch_rows.index(batch_row)],
        )
        host.set_parameters(batch_row, params, batch_row, rules if params.has_rules else None)
        one = slice(row, row + 1)
        assert found[one] == host.sample(logits[one], np.array([batch_row]), positions[one]), row
    assert (m.get(device.counts) == before).all()


def test_rows_that_go_on_from_a_draw_are_as_long_as_it_says(kernel_memory: KernelMemory) -> None:
    """600 rows, of which every third goes on, with up to three tokens fewer than planned."""
    m, rows = kernel_memory, np.arange(600)
    follows = np.where(rows % 3 == 0, rows // 3, -1)
    known, planned = 500 + 7 * np.arange(200), 1000 + rows
    planned = np.where(follows >= 0, known[follows] + rows % 4, planned)
    cached = m.put(planned, "int32")
    # tokens of two rows of the draw, of the second one's draft, and of padding; then of rows
    batch_rows, positions = np.full(605, -1), np.zeros(605)
    batch_rows[:5], positions[:5] = [9, 3, 3, -1, 599], [50, 60, 61, 7, 9]
    batch_rows[600], positions[600] = 597, 80
    drawn, ids = 3 * np.arange(200), np.arange(700)
    ids[[0, 255, 256, 699]] = -1 - np.array([0, 199, 7, 5])
    put = [m.put(values, "int32") for values in (ids, follows, batch_rows, positions)]
    follow_kernel[(-(-700 // FOLLOW_BLOCK),)](
        put[0], m.put(drawn), m.put(known, "int32"), 700, cached, *put[1:], 600, 605,
        BLOCK=FOLLOW_BLOCK, num_warps=4,
    )  # fmt: skip
    expected = np.where(follows >= 0, rows % 4, 0)
    assert (m.get(cached) == planned - expected).all()
    found = m.get(put[3])
    assert found[:5].tolist() == [50 - 1, 60 - 3, 61 - 3, 7, 9]
    assert found[600] == 80 - expected[597] and expected[597]
    ids[[0, 255, 256, 699]] = drawn[[0, 199, 7, 5]]
    assert (m.get(put[0]) == ids).all()
    # ids alone, as where there are no drafts
    before = m.get(cached)
    follow_kernel[(1,)](
        m.put([4, -3], "int32"), m.put(drawn), m.put(known, "int32"), 2, cached, *put[1:], 0, 0,
        BLOCK=FOLLOW_BLOCK, num_warps=4,
    )  # fmt: skip
    assert (m.get(cached) == before).all()


def test_a_further_draft_has_a_step_of_the_drafts_before_it(kernel_memory: KernelMemory) -> None:
    """400 requests in every other row, padded to 500; two drafts are before the new one."""
    m, requests = kernel_memory, np.arange(400)
    going_on = np.full((4, 512), -1)
    going_on[1:, :400] = 2 * requests + 1, 11 + requests, 1000 + 3 * requests
    on_device = m.put(going_on, "int32")
    cached, lengths = m.poisoned((900,), "int32"), m.poisoned((900,), "int32")
    extend_kernel[(1,)](
        on_device, cached, lengths, 500, 900, 2,
        STRIDE=512, BLOCK=FOLLOW_BLOCK, num_warps=4,
    )  # fmt: skip
    assert (m.get(on_device)[2, :400] == 12 + requests).all()
    expected = np.zeros(900)
    expected[going_on[1, :400]] = 1
    assert (m.get(lengths) == expected).all()
    assert (m.get(cached)[expected == 1] == 1001 + 3 * requests).all()

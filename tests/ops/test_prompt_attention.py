"""Dense attention of prompts against its definition in doubles: rows, chunks, borders, widths."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.step import ForwardMeta
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.prompt_case import SCALE, PromptCase
from tests.ops.tensor_core_case import widened

# around tiles of 32 tokens and keys, and index_topk of 70
BORDER = [(40, 30, True), (1, 9, False), (80, 0, True), (5, 68, True), (3, 70, True), (0, 0, False)]


def run(
    m: KernelMemory,
    case: PromptCase,
    most_keys: int = 1 << 20,
    *,
    quantised: bool = False,
    more_keys: int = 0,
    more_tiles: int = 0,
    tiling: tuple[int, ...] = (32, 32, 4, 2),
) -> Any:
    """Return the results of a step's launches, in poisoned memory with rows to spare.

    Grids may reach to more keys and tiles than the step has, as those of captured launches do.
    """
    from fd_dsa.attention.dense_prompts import row_groups
    from fd_dsa.ops.mla.prompt import attend_prompts, gather_keys
    from fd_dsa.ops.split_sums import Tiling
    from fd_dsa.tensor import Fp8Rows

    total, step = int(case.starts[-1]), case.step(m)
    counts = np.array([case.count(row) for row in range(len(case.rows))])
    out = m.poisoned((total + 3, case.heads, case.values), "bfloat16")
    if quantised:
        stride = -(-(total + 3) // 4) * 4
        codes = m.poisoned((total + 3, case.heads * 128), "uint8")
        out = Fp8Rows(codes, m.poisoned((case.heads, stride), "float32"))
    for group in row_groups(counts, case.cached, most_keys):
        num_keys, counts = group.num_keys, (*group.counts, *[1] * more_tiles)
        group = group._replace(num_keys=num_keys + more_keys, counts=counts)
        latents = m.poisoned((group.num_keys, case.rank), "bfloat16")
        rope = m.poisoned((group.num_keys, case.rope), "bfloat16")
        gather_keys(case.pages(m), step, group, case.topk, latents, rope, 8)
        for written in latents, rope:
            assert (m.get(written)[num_keys:].view(np.uint8) == POISON).all()
        up = case.up_projected(widened(m.get(latents).view(np.int16)))
        keys, values = (case.bits(m, x.astype(np.float32)) for x in up)
        attend_prompts(
            *(case.bits(m, case.q), m.put(case.cos_sin), keys, values, rope, step, group, out),
            index_topk=case.topk,
            softmax_scale=SCALE,
            rows=8,
            tiling=Tiling(*tiling),
            round_scales=True,
        )
    return out


def check(case: PromptCase, found: np.ndarray) -> None:
    """Check dense tokens within the rounding of weights and result, and others as untouched."""
    untouched = np.ones(len(found), bool)
    for row, first in enumerate(case.starts[:-1]):
        count = case.count(row)
        untouched[first : first + count] = False
        if count:
            exact = case.exact(row)
            # weights and the result have 8 bits each; keys that round the other way shift scores
            bound = 2.0**-7 * (np.abs(exact) + np.abs(exact).max())
            assert (np.abs(found[first : first + count] - exact) < bound).all(), row
    poison = widened(np.full(1, POISON * 0x101, np.uint16).view(np.int16))
    assert (found[untouched] == poison).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_chunks_hits_and_the_border(kernel_memory: KernelMemory, fp8: bool) -> None:
    case = PromptCase(BORDER, 70, fp8)
    check(case, widened(kernel_memory.get(run(kernel_memory, case)).view(np.int16)))


def test_tokens_see_the_keys_of_their_windows(kernel_memory: KernelMemory) -> None:
    case = PromptCase(BORDER, 70)
    # a late start, one key, the token's own key left out, later keys of the chunk, no key, past
    # both ends of the row's keys
    changed = {3: (5, 34), 9: (2, 3), 20: (0, 50), 39: (0, 60), 45: (0, 0), 50: (40, 40)}
    changed |= {60: (-9, 12), 75: (60, 300), 80: (0, 33)}
    for token, window in changed.items():
        case.set_window(token, *window)
    check(case, widened(kernel_memory.get(run(kernel_memory, case)).view(np.int16)))


def test_grids_for_more_keys_and_tiles_than_a_step_has(kernel_memory: KernelMemory) -> None:
    case = PromptCase(BORDER, 70)
    found = kernel_memory.get(run(kernel_memory, case, more_keys=40, more_tiles=3))
    np.testing.assert_array_equal(found, kernel_memory.get(run(kernel_memory, case)))


def test_widths_that_are_no_powers_of_two_and_groups_of_rows(kernel_memory: KernelMemory) -> None:
    case = PromptCase([(33, 0, True), (2, 40, True), (7, 1, True)], 64, heads=3, nope=24, values=40)
    found = [kernel_memory.get(run(kernel_memory, case, most)) for most in (1 << 20, 50, 42)]
    check(case, widened(found[0].view(np.int16)))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("widths", [(128, 128), (192, 256)])
def test_real_sizes(kernel_memory: KernelMemory, widths: tuple[int, int]) -> None:
    if not kernel_memory.large:
        pytest.skip("2,048 keys are for a GPU")
    from fd_dsa.ops.mla.prompt import fitting
    from fd_dsa.triton_runtime.device_api import traits_for

    nope, values = widths
    rows = [(2048, 0, True), (3, 900, False), (300, 1800, True), (129, 1000, True)]
    case = PromptCase(rows, 2048, True, nope=nope, values=values)
    shared = traits_for(kernel_memory.poisoned((1,), "float32")).shared_bytes
    for tiling in fitting(nope, 64, values, shared):
        found = run(kernel_memory, case, tiling=tiling)
        check(case, widened(kernel_memory.get(found).view(np.int16)))


def test_a_result_in_fp8_is_the_plain_one_quantised(paddle_memory: KernelMemory) -> None:
    from fd_dsa.ops.dense_kernels import quantize_rows

    m, case = paddle_memory, PromptCase([(20, 0, True), (2, 5, False)], 64, values=128)
    plain = run(m, case)
    rows = run(m, case, quantised=True)
    wanted = quantize_rows(plain[:20].reshape([20, -1]).contiguous(), True)
    np.testing.assert_array_equal(m.get(rows.codes)[:20], m.get(wanted.codes))
    np.testing.assert_array_equal(m.get(rows.scales)[:, :20], m.get(wanted.scales)[:, :20])
    assert (m.get(rows.codes)[20:] == POISON).all()


def test_the_other_tokens_of_a_step(paddle_memory: KernelMemory) -> None:
    from fd_dsa.attention.dense_prompts import DensePrompts
    from fd_dsa.triton_runtime.driver import GpuTraits

    m, case = paddle_memory, PromptCase([*BORDER, (90, 0, True)], 70)
    layout = CacheLayout("bfloat16", 16, 32, 16, 16)
    config = DSABackendConfig(2, 16, 70, SCALE, layout, 8, 256, 8, None, "bfloat16")
    prompts = DensePrompts(
        replace(config, head_widths=(16, 16)), m.poisoned, GpuTraits(90, 132, 227 << 10)
    )
    names = [field.name for field in fields(ForwardMeta)]
    step = ForwardMeta(**dict.fromkeys(names) | vars(case.step(m)))
    for _ in range(2):
        assert prompts.begin_step(step, (case.new, case.cached, case.this_time))
        others = [
            (token, row)
            for row, (first, end) in enumerate(zip(case.starts, case.starts[1:], strict=False))
            for token in range(first + case.count(row), end)
        ]
        other, left = prompts.other_step, [int(case.new[i]) - case.count(i) for i in range(7)]
        rows = m.get(other.batch_id_per_token).tolist()
        assert list(zip(m.get(prompts.others).tolist(), rows, strict=True)) == others
        assert m.get(other.seq_lens_encoder).tolist() == left
        assert other.num_prefill_tokens == sum(left)
        assert prompts.groups and not prompts.has_all
        # chunks of prompts past index_topk
        assert not prompts.begin_step(step, (case.new, case.cached + 70, case.this_time))


@pytest.mark.parametrize("spare", [0, 1, 40])
def test_a_list_of_absorbed_tokens_ends_in_padding(kernel_memory: KernelMemory, spare: int) -> None:
    from fd_dsa.ops.mla.prompt import list_absorbed

    m, case = kernel_memory, PromptCase([*BORDER, (90, 0, True)], 70)
    wanted = [
        (token, row)
        for row, first in enumerate(case.starts[:-1])
        for token in range(first + case.count(row), case.starts[row + 1])
    ]
    sizes = len(wanted) + spare, len(wanted) + spare, len(case.rows), 1
    *lists, count = (m.poisoned((size,), "int32") for size in sizes)
    list_absorbed(case.step(m), case.topk, *lists, 8, count)
    tokens, rows, left = map(m.get, lists)
    assert m.get(count).tolist() == [sum(map(case.num_keys, range(len(case.rows))))]
    assert [*zip(tokens.tolist(), rows.tolist(), strict=True)] == wanted + [(-1, -1)] * spare
    assert left.tolist() == [int(new) - case.count(row) for row, new in enumerate(case.new)]


def test_nan_of_another_request_stays_there(kernel_memory: KernelMemory) -> None:
    case = PromptCase([(10, 0, True), (10, 6, True)], 64)
    clean = kernel_memory.get(run(kernel_memory, case))
    case.cache[case.slots(1)[3]] = 0x7FC0
    found = kernel_memory.get(run(kernel_memory, case))
    np.testing.assert_array_equal(found[:10], clean[:10])
    assert np.isnan(widened(found[10:20].view(np.int16))).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": "float32"}, "activations are float32"),
        ({"cache_layout": CacheLayout("float32", 64, 512, 64, 128)}, "the cache is float32"),
        ({"cache_layout": CacheLayout("bfloat16", 64, 512, 8, 128)}, "heads of 128 + 8"),
        ({"head_widths": None}, "widths are not known"),
    ],
)
def test_what_is_dense_and_what_it_takes(changes: dict[str, Any], reason: str | None) -> None:
    from fd_dsa.attention.dense_prompts import max_keys, unsupported_reason, workspace_bytes

    sizes = (128, 64, 2048, 0.1, CacheLayout("fp8_ds_mla", 64, 512, 64, 128), 128, 8192, 512)
    config = replace(DSABackendConfig(*sizes, dtype="bfloat16", head_widths=(128, 128)), **changes)
    assert (reason or "") in (found := unsupported_reason(config) or "") and bool(found) == bool(
        reason
    )
    assert (workspace_bytes(config) > 0) == (reason is None)
    if reason is None:
        assert max_keys(config) == 8192
        assert 512 << 20 < workspace_bytes(config) < 530 << 20
        # a row has to fit, and more than all rows nobody needs
        assert max_keys(replace(config, num_heads=1024)) == 2048
        assert max_keys(replace(config, max_num_seqs=2)) == 4096

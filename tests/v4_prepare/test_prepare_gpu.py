"""Builders on a GPU: steps ahead of a busy device, and graphs that read their outputs."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Prepare, V4PrepareError, v4_prepare_np
from fd_dsa.v4_prepare.lists import csa_translate, fused_list
from tests.v4_prepare.kernel_case import make_step, serving_config
from tests.v4_prepare.places import open_place

pytestmark = pytest.mark.gpu

NUM_ROWS, LONGEST = 8, 16_384
CFG = serving_config(NUM_ROWS, LONGEST, 3)


def random_step(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, ...]:
    """Decode rows of any length with up to three drafts, idle ones among them."""
    rows = [(int(rng.integers(0, LONGEST)), int(rng.integers(0, 5))) for _ in range(num_rows)]
    step = make_step(CFG, rows, rng)
    return step.ctx, step.q, step.slot, step.block_table


def expected(step: tuple[np.ndarray, ...], rollback: np.ndarray | None = None) -> dict:
    """What the host builder says of a step."""
    ctx, q, slot, table = step
    left = ctx if rollback is None else np.where(q > 0, ctx - rollback[: len(q)], ctx)
    out = v4_prepare_np(CFG, left, q, slot, table)
    found = {name: getattr(out, name) for name in OUTPUT_SHAPES(CFG)}
    return found | {"hca_idx": found["hca_idx"][: found["counts"][2]]}


def test_steps_ahead_of_a_busy_device() -> None:
    import torch

    place, rng = open_place("torch"), np.random.default_rng(1)
    prepare = place.prepare(CFG)
    names = list(OUTPUT_SHAPES(CFG))
    queued = []
    for number in range(60):
        step = random_step(rng, 1 + number % NUM_ROWS)
        most = (step[0] - step[1]).clip(max=3)
        rejected = np.zeros(NUM_ROWS, np.int32)
        rejected[: len(most)] = rng.integers(0, most + 1)
        prepare.stage(*step)
        # the sampler writes it late: behind work that is queued and not done
        torch.cuda._sleep(int(rng.integers(0, 400_000)))
        rollback = torch.from_numpy(rejected).pin_memory().to("cuda", non_blocking=True)
        buffers = prepare.expand(rollback)
        copies = {name: getattr(buffers, name).clone() for name in names}
        queued.append((expected(step, rejected), copies))
    for wanted, copies in queued:
        for name, array in wanted.items():
            found = copies[name].cpu().numpy()
            np.testing.assert_array_equal(found[: len(array)], array, err_msg=name)
    prepare.poll_error()


def test_a_graph_reads_the_lists_of_the_step_before_its_replay() -> None:
    import torch

    place, rng = open_place("torch"), np.random.default_rng(2)
    prepare = place.prepare(CFG)
    topk = place.put(np.zeros((CFG.max_num_tokens, CFG.index_topk), np.int32))

    def derive() -> tuple:
        rows = prepare.csa_translate(topk)
        return rows, *(prepare.fused_list(k, rows if k == "csa" else None) for k in kinds)

    kinds = ("swa", "csa", "hca")
    prepare.stage(*random_step(rng, 2))
    prepare.expand()
    derive()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, *lists = derive()
        with pytest.raises(RuntimeError, match="graph capture"):
            prepare.stage(*random_step(rng, 2))
    for number in range(40):
        step = random_step(rng, 1 + number % NUM_ROWS)
        prepare.stage(*step)
        prepare.expand()
        out = v4_prepare_np(CFG, *step)
        chosen = rng.integers(-1, LONGEST // 4, (CFG.max_num_tokens, CFG.index_topk))
        topk.copy_(torch.from_numpy(chosen.astype(np.int32)))
        graph.replay()
        wanted = csa_translate(out, step[3], chosen)
        np.testing.assert_array_equal(place.get(rows)[: len(wanted)], wanted)
        for kind, (indptr, found) in zip(kinds, lists, strict=True):
            offsets, listed = fused_list(out, kind, wanted if kind == "csa" else None)
            np.testing.assert_array_equal(place.get(indptr), offsets)
            np.testing.assert_array_equal(place.get(found)[: len(listed)], listed)


def test_an_error_comes_when_its_step_has_run() -> None:
    import torch

    place, rng = open_place("torch"), np.random.default_rng(3)
    prepare: V4Prepare = place.prepare(CFG)
    step = random_step(rng, NUM_ROWS)
    rows = np.flatnonzero(step[1])
    rollback = np.zeros(NUM_ROWS, np.int32)
    rollback[rows] = -1
    rejected = place.put(rollback)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    prepare.stage(*step)
    prepare.expand(rejected)
    prepare.poll_error()
    torch.cuda.synchronize()
    with pytest.raises(V4PrepareError) as caught:
        prepare.poll_error()
    assert str(caught.value) == f"v4_prepare: E_CTX: row {rows[0]}: rollback=-1 < 0"

"""Graphs that serve steps, and the errors where none can be made."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import paddle
import pytest
from paddle.base import core
from paddle.device.cuda import graphs as paddle_graphs

from fd_dsa.attention.protocol import PromptLimits
from fd_dsa.errors import DeviceError
from fd_dsa.runner import InputBatch, step_graphs
from fd_dsa.runner.step_graphs import CaptureError, GraphKey, PaddleCapture, StepGraphs

PLACE = paddle.CPUPlace()


def filled(rows: list[tuple[int, int, bool]]) -> InputBatch:
    """A step of rows of some tokens, after cached ones, of a prompt or not."""
    batch = InputBatch(8, 64, 40, 16)
    for row, (tokens, done, is_prefill) in enumerate(rows):
        batch.add_row(row, [0] * tokens, done, is_prefill)
    return batch


def fitting(
    graphs: StepGraphs, rows: list[tuple[int, int, bool]], sampled: list[int] | None = None
) -> GraphKey | None:
    """Return the graph that serves a step of rows, see `filled`."""
    batch = filled(rows)
    tokens = range(batch.num_tokens) if sampled is None else sampled
    return graphs.fitting(batch, np.array(tokens, np.int64))


def test_a_step_is_padded_to_the_next_size() -> None:
    graphs = StepGraphs((8, 1, 4), max_dense_keys=100, longest=640)
    assert graphs.sizes == (1, 4, 8)
    found = [fitting(graphs, [(1, 100 - row, False) for row in range(n)]) for n in (1, 2, 4, 5, 8)]
    assert [step and step.num_tokens for step in found] == [1, 4, 4, 8, 8]
    assert fitting(graphs, [(3, 100, False)] * 3) is None
    # not all of them are sampled
    assert fitting(graphs, [(1, 100, False)] * 2, [1]) is None


@pytest.mark.parametrize(("max_seqlen_k", "reaches"), [(1, 100), (100, 100), (101, 640)])
def test_rows_past_the_selection_have_a_graph_of_their_own(max_seqlen_k: int, reaches: int) -> None:
    graphs = StepGraphs((2,), max_dense_keys=100, longest=640)
    step = fitting(graphs, [(1, 0, False), (1, max_seqlen_k - 1, False)])
    assert step == GraphKey(2, reaches)


# prompts, keys that are seen densely, and samples of steps of as many tokens
LIMITS = {8: PromptLimits(2, 10, 3), 16: PromptLimits(3, 20, 3)}
# rows as tokens, tokens before them, whether they are a prompt's; tokens that are sampled; tokens
# and longest row of the graph, with a selection of 12
PROMPTS: dict[str, tuple[list[tuple[int, int, bool]], list[int], tuple[int, int] | None]] = {
    "the next size": ([(5, 0, True)], [4], (8, 12)),
    "one of its own": ([(8, 0, True)], [7], (8, 12)),
    "several": ([(3, 0, True), (6, 0, True)], [2, 8], (16, 12)),
    "nothing is sampled": ([(5, 0, True)], [], (8, 12)),
    "beside a decode row": ([(3, 0, True), (1, 5, False)], [2, 3], (8, 12)),
    "keys in the cache": ([(3, 7, True)], [2], (8, 12)),
    "too many keys for a size": ([(3, 8, True)], [2], (16, 12)),
    "too many keys": ([(3, 7, True), (3, 8, True)], [5], None),
    "keys of decode rows do not count": ([(3, 0, True), (1, 500, False)], [3], (8, 640)),
    "a row across the selection": ([(2, 11, True)], [1], (16, 640)),
    "a row past it has no dense keys": ([(8, 500, True)], [7], (8, 640)),
    "too many rows for a size": ([(1, 0, True)] * 3, [0, 1, 2], (16, 12)),
    "too many rows": ([(1, 0, True)] * 4, [0], None),
    "too many sampled": ([(5, 0, True)], [1, 2, 3, 4], None),
    "too many decode tokens": ([(2, 0, True), (4, 9, False)], [5], None),
    "too many tokens": ([(17, 0, True)], [16], None),
}


@pytest.mark.parametrize(("rows", "sampled", "size"), PROMPTS.values(), ids=PROMPTS.keys())
def test_steps_with_prompts_are_padded_by_their_tokens(
    rows: list[tuple[int, int, bool]], sampled: list[int], size: tuple[int, int] | None
) -> None:
    graphs = StepGraphs((8,), 12, 640, LIMITS)
    found = fitting(graphs, rows, sampled)
    assert (found and found[:2]) == size
    assert found is None or found.limits == LIMITS[found.num_tokens]


@pytest.mark.parametrize(
    ("rows", "sampled", "reason"),
    [
        ([(9, 3, False)], [*range(9)], "tokens"),
        ([(4, 3, False)], [1], "samples"),
        ([(17, 0, True)], [16], "tokens"),
        ([(1, 0, True)] * 4, [0], "prompts"),
        ([(3, 7, True), (3, 8, True)], [5], "keys"),
        ([(5, 0, True)], [1, 2, 3, 4], "samples"),
        ([(2, 0, True), (4, 9, False)], [5], "samples"),
    ],
)
def test_an_eager_step_has_a_reason(
    rows: list[tuple[int, int, bool]], sampled: list[int], reason: str
) -> None:
    graphs = StepGraphs((8,), 12, 640, LIMITS)
    batch = filled(rows)
    assert graphs.fitting(batch, np.array(sampled, np.int64)) is None
    assert graphs.refusal(batch, len(sampled)) == reason
    graphs.drop_prompts()
    if batch.num_prefill_tokens:
        assert graphs.refusal(batch, len(sampled)) == "not_captured"


def test_the_largest_are_captured_first() -> None:
    steps = StepGraphs((1, 4), max_dense_keys=100, longest=640).steps()
    assert [key[:2] for key in steps] == [(4, 640), (4, 100), (1, 640), (1, 100)]
    # every row is short: one graph a size
    graphs = StepGraphs((1, 4), 100, longest=64, prompts={2: LIMITS[8]})
    assert graphs.steps() == [(4, 64, None), (2, 64, LIMITS[8]), (1, 64, None)]
    graphs.drop_prompts()
    assert graphs.steps() == [(4, 64, None), (1, 64, None)]


def test_further_drafts_take_the_smallest_graph_that_holds_them() -> None:
    graphs = StepGraphs((2, 4), 100, 640)
    for size in ((2, 100, 2), (2, 640, 2), (4, 640, 2), (4, 640, 3)):
        graphs.drafts[size] = partial(print, size)
    asked = (1, 100, 2), (2, 101, 2), (3, 9, 2), (1, 9, 3), (5, 9, 2), (1, 641, 2), (1, 9, 4)
    found = [graphs.more_drafts(*size) for size in asked]
    sizes = [replay.args[0] if isinstance(replay, partial) else None for replay in found]
    assert sizes == [(2, 100, 2), (2, 640, 2), (4, 640, 2), (4, 640, 3), None, None, None]


class Graph:
    """Stands for Paddle's CUDAGraph; `fails` is the call that it refuses."""

    fails = ""
    log: ClassVar[list[str]] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._graph = SimpleNamespace(reset=partial(self.log.append, "reset"))

    def call(self, name: str) -> None:
        self.log.append(name)
        if name == self.fails:
            raise OSError(f"stack\n\nFatalError: {name} is not permitted\n")

    def capture_begin(self) -> None:
        self.call("begin")

    def capture_end(self) -> None:
        self.call("end")

    def replay(self) -> None:
        self.call("replay")


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Replace Paddle's graphs, which need a device."""
    kind = type("Kind", (Graph,), {"log": []})
    monkeypatch.setattr(paddle_graphs, "is_cuda_graph_supported", lambda: True)
    monkeypatch.setattr(paddle_graphs, "CUDAGraph", kind)
    pools = SimpleNamespace(gen_new_memory_pool_id=iter((7, 8)).__next__)
    monkeypatch.setattr(core, "CUDAGraph", pools, raising=False)
    monkeypatch.setattr(paddle.device, "synchronize", lambda place: kind.log.append("wait"))
    for kept in ("MEMORY_POOLS", "LASTING_GRAPHS"):
        monkeypatch.setattr(step_graphs, kept, {})
    return kind


def test_work_runs_before_its_capture_and_graphs_share_a_pool(graph: type[Graph]) -> None:
    runs: list[bool] = []
    flag = "FLAGS_enable_api_kernel_fallback"

    def work() -> str:
        runs.append(paddle.get_flags([flag])[flag])
        graph.log.append("work")
        return "logits"

    result, replay = PaddleCapture(PLACE)(work)
    assert graph.log == ["work", "wait", "begin", "work", "end"]
    # outside of the capture nothing may go through the host
    assert runs == [False, True] and paddle.get_flags([flag])[flag]
    assert result == "logits"
    replay()
    assert graph.log[-1] == "replay" and replay.__self__.options["pool_id"] == 7


def test_a_wait_without_pythons_lock_comes_before_paddles(graph: type[Graph]) -> None:
    PaddleCapture(PLACE, finish=lambda: graph.log.append("finish"))(lambda: None)
    assert graph.log == ["finish", "wait", "begin", "end"]


def test_graphs_are_freed_but_for_one_that_keeps_their_pool(graph: type[Graph]) -> None:
    first, second = PaddleCapture(PLACE)(lambda: None), PaddleCapture(PLACE)(lambda: None)
    pools = [replay.__self__.options["pool_id"] for _, replay in (first, second)]
    assert pools == [7, 7]
    before = len(graph.log)
    del first
    assert len(graph.log) == before
    del second
    assert graph.log[before:] == ["reset"]


def test_a_build_without_graphs_is_refused() -> None:
    if paddle_graphs.is_cuda_graph_supported():
        pytest.skip("this session has a device with graphs")
    with pytest.raises(CaptureError, match="no CUDA graphs"):
        PaddleCapture(PLACE)


def fails_in_the_capture(log: list[str]) -> None:
    if "begin" in log:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("fails", "work", "error", "message", "last"),
    [
        # before or at its begin: the process goes on
        ("", lambda log: 1 // 0, CaptureError, "ZeroDivisionError", None),
        ("begin", list, CaptureError, "OSError: FatalError: begin is not permitted", "begin"),
        # inside or at its end: Paddle cannot
        ("", fails_in_the_capture, DeviceError, "not permitted .*--enforce-eager", "end"),
        ("end", list, DeviceError, "FatalError: end is not permitted; .*--enforce-eager", "end"),
    ],
    ids=["work", "begin", "work in capture", "end"],
)
def test_what_cannot_be_captured(
    graph: type[Graph], fails: str, work: Any, error: type, message: str, last: str | None
) -> None:
    graph.fails = fails
    with pytest.raises(error, match=message):
        PaddleCapture(PLACE)(lambda: work(graph.log))
    assert (graph.log[-1] if graph.log else None) == last

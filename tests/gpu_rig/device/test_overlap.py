"""Forks on Paddle's streams: the results of one stream, in graphs too, and nothing left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.device import side_stream
from fd_dsa.ops.indexer_projection.triton_kernel import project_indexer
from fd_dsa.ops.split_sums import new_scratch
from fd_dsa.runner import InputBatch
from fd_dsa.startup.warm_up import warm_up_kernels
from fd_dsa.triton_runtime.device_api import PaddleApi
from tests.gpu_rig import Rig, RigError
from tests.gpu_rig.device.test_capture import add_kernel
from tests.gpu_rig.device.test_demo_end_to_end import tiny_runner
from tests.gpu_rig.device.test_formats import FP8, SIZES, WIDE_KEYS, folder_of, runner_on
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import V32, run_rows, tiny_model

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

WIDTH, HEADS, BESIDE = 128, 64, 4
BLOCK = 256


class Layer:
    """Projections on two branches and a sum that needs both, in buffers that stay where they are.

    Args:
        max_tokens: threshold of the overlap; None = all of the layer's tokens fork.
    """

    def __init__(self, rig: Rig, max_tokens: int | None = None) -> None:
        self.rig = rig
        self.num_tokens, hidden = (64, 7168) if rig.is_real else (5, 48)
        rng = np.random.default_rng(3)
        weights = rng.standard_normal((2, hidden, WIDTH + HEADS)) / hidden**0.5
        self.weights = weights.astype(np.float32)
        both = [self.put(w) for w in self.weights]
        self.pairs = [(w[:, :WIDTH], w[:, WIDTH:]) for w in both]
        self.x = self.put(self.numbers(0))
        shape = [self.num_tokens, WIDTH]
        self.total = paddle.zeros(shape)
        self.out = [(paddle.zeros(shape), paddle.zeros([shape[0], HEADS])) for _ in range(2)]
        # the work beside a fork is the same launch, at the same time
        self.scratch_beside = new_scratch(self.out[1][1])
        most = self.num_tokens if max_tokens is None else max_tokens
        self.overlap = IndexerOverlap(rig.device, most)
        self.stream_of_project: int | None = None

    def put(self, array: np.ndarray) -> Any:
        return paddle.to_tensor(array, place=self.rig.place)

    def numbers(self, seed: int) -> np.ndarray:
        """Hidden states."""
        shape = self.num_tokens, self.weights.shape[1]
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def project(self, x: Any) -> Any:
        self.stream_of_project = self.rig.stream().value
        return project_indexer(x, *self.pairs[0], out=self.out[0])

    def beside(self) -> Any:
        """Several times the work of the fork."""
        for _ in range(BESIDE):
            keys, _ = project_indexer(
                self.x, *self.pairs[1], out=self.out[1], scratch=self.scratch_beside
            )
        return keys

    def add(self, x: Any, y: Any) -> None:
        n = self.num_tokens * WIDTH
        add_kernel[(-(-n // BLOCK),)](x, y, self.total, n, BLOCK=BLOCK)

    def run(self) -> None:
        beside, (keys, _) = self.overlap.run(self.num_tokens, self.beside, self.project, self.x)
        self.add(keys, beside)

    def check(self, x: np.ndarray) -> None:
        """The sum, as NumPy makes it of `x`."""
        keys = x.astype(np.float64) @ self.weights[:, :, :WIDTH].sum(0)
        np.testing.assert_allclose(self.total.numpy(), keys, rtol=0, atol=5e-5)


class SecondStream:
    """Stands for the second stream, which an interpreter has not; notes the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def end(self) -> None:
        self.calls.append("end")

    def join(self) -> None:
        self.calls.append("join")


def test_a_fork_has_a_stream_of_its_own_and_the_result_of_one_stream(rig: Rig) -> None:
    layers, main = (Layer(rig), Layer(rig, max_tokens=0)), rig.stream().value
    for layer in layers:
        # the first fork makes the stream
        layer.run()
        with rig.strict(), rig.counting() as counted:
            layer.run()
        assert counted.delta == {}
        layer.check(layer.numbers(0))
    assert layers[0].total.numpy().tobytes() == layers[1].total.numpy().tobytes()
    # where kernels are interpreted there is no second stream
    assert (layers[0].stream_of_project != main) == rig.is_real
    assert layers[1].stream_of_project == main == rig.stream().value


def test_paddle_has_the_second_stream_between_begin_and_end(rig: Rig) -> None:
    api = PaddleApi()
    assert api.device_of(paddle.ones([1])) == 0
    main = api.current_stream(0)
    side = side_stream.SideStream(api, 0)
    for _ in range(3):
        side.begin()
        assert api.current_stream(0) == api.stream_handle(side.stream) != main
        x = paddle.full([64], 2.0)
        side.end()
        assert api.current_stream(0) == main
        side.join()
        assert (x.numpy() == 2).all()


@pytest.mark.parametrize("where", ["project", "beside"])
def test_whatever_goes_wrong_the_next_fork_is_right(rig: Rig, where: str) -> None:
    layer = Layer(rig)
    go_wrong(layer, where)
    layer.run()
    layer.check(layer.numbers(0))


def go_wrong(layer: Layer, where: str) -> None:
    """A fork that ends with an error in the work or beside it."""

    def fail(name: str) -> None:
        if name == where:
            raise KeyError(where)

    def project(x: Any) -> None:
        layer.project(x)
        fail("project")

    def beside() -> None:
        layer.beside()
        fail("beside")

    with pytest.raises(KeyError):
        layer.overlap.run(layer.num_tokens, beside, project, layer.x)


def test_memory_that_comes_and_goes_around_forks(real_rig: Rig) -> None:
    layer = Layer(real_rig)
    zeros = paddle.zeros(layer.x.shape)
    wanted = layer.numbers(0).astype(np.float64) @ layer.weights[0]

    def beside() -> None:
        paddle.full(layer.x.shape, float("nan"))
        layer.beside()

    def project(x: Any, *pair: Any) -> Any:
        out = [paddle.empty([layer.num_tokens, width]) for width in (WIDTH, HEADS)]
        return project_indexer(x, *pair, out)

    for round_ in range(200):
        # of the size of the results, given back at once: what the fork is given next
        paddle.full([layer.num_tokens, (WIDTH, HEADS)[round_ % 2]], float("nan"))
        _, (keys, weights) = layer.overlap.run(
            layer.num_tokens, beside, project, layer.x + zeros, *layer.pairs[0]
        )
        if round_ % 20 == 0:
            found = np.concatenate([keys.numpy(), weights.numpy()], axis=1)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


@pytest.mark.own_process
def test_a_replay_does_it_for_other_inputs(rig: Rig) -> None:
    layer = Layer(rig)
    replay = rig.captured(layer.run)
    for seed in (1, 2, 3):
        x = layer.numbers(seed)
        layer.x.copy_(layer.put(x), False)
        replay()
        layer.check(x)


@pytest.mark.own_process
def test_a_capture_holds_both_branches(real_rig: Rig) -> None:
    layer = Layer(real_rig)
    layer.run()
    with real_rig.capture() as capture:
        layer.run()
    assert capture.num_nodes == BESIDE + 2
    assert layer.stream_of_project != real_rig.stream().value


@pytest.mark.own_process
@pytest.mark.parametrize("where", ["project", "beside"])
def test_a_capture_ends_cleanly_after_a_failed_fork(real_rig: Rig, where: str) -> None:
    layer = Layer(real_rig)
    layer.run()
    # a fork that is still open would end the capture with an error
    with real_rig.capture() as capture:
        go_wrong(layer, where)
        layer.run()
    layer.total.copy_(paddle.zeros(layer.total.shape), False)
    capture.replay()
    layer.check(layer.numbers(0))


@pytest.mark.own_process
def test_a_capture_without_the_join_fails(real_rig: Rig) -> None:
    layer = Layer(real_rig)
    layer.run()
    side = side_stream.side_stream_for(layer.x)
    assert side is not None
    with pytest.raises(RigError, match="unjoined"), real_rig.capture():
        side.begin()
        layer.project(layer.x)
        side.end()
    layer.run()
    layer.check(layer.numbers(0))


@pytest.mark.parametrize("form", ["float32", "fp8"])
def test_logits_of_a_model_are_the_same_bits(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    """In FP8 the head weights alone are made beside the GEMM of the others."""
    tokens = np.random.default_rng(7).integers(2, 50, 30).tolist()
    steps = [[(0, tokens[:20], 0, True)], [(0, tokens[20:21], 20, False)]]
    found = []
    for most in ("0", "64"):
        monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", most)
        if form == "fp8":
            fields = V32 | SIZES | WIDE_KEYS | FP8
            runner = runner_on(folder_of(tmp_path / most, fields, form), rig.device)
        else:
            runner = tiny_runner(V32, form, rig.device)
        assert runner.attn_backends[0].overlap.max_tokens == int(most)
        found.append([run_rows(runner, rows).tobytes() for rows in steps])
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_warm_up_forks_where_the_capture_forks(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of up to the threshold fork before the captures; eager steps after them do not."""
    monkeypatch.delenv("FD_DSA_OVERLAP_MAX_TOKENS", raising=False)
    monkeypatch.setattr("fd_dsa.attention.overlap.DEFAULT_OVERLAP_MAX_TOKENS", 2)
    model = tiny_model(V32, device=rig.device)
    batch, layout = InputBatch(2, 4, 1, 16), model.config.cache_layout("float32", 16)
    runner = dsa_runner(model, batch, layout, 2, rig.device)
    overlap, forked = runner.attn_backends[0].overlap, []
    overlap.side_stream = SecondStream()
    assert overlap.max_tokens == 2

    def stream_for(tensor: Any) -> Any:
        forked.append(runner.forward_meta.token_ids.shape[0])
        return overlap.side_stream

    monkeypatch.setattr(overlap, "stream_for", stream_for)
    warm_up_kernels(runner)
    assert forked == []
    warm_up_kernels(runner, before_captures=True)
    assert set(forked) == {1, 2}
    assert len(overlap.side_stream.calls) == 3 * len(forked)
    forked.clear()
    batch.set_blocks(0, [0])
    run_rows(runner, [(0, [5], 0, True)])
    assert forked == []

"""Forks on real streams of torch: the values of one stream, eager and in a graph."""

from __future__ import annotations

from typing import Any

import pytest

from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.ops.indexer_projection.triton_kernel import project_indexer
from fd_dsa.triton_runtime import streams

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, WIDTH, HEADS, BESIDE = 64, 7168, 128, 64, 8


class Layer:
    """Projections on two branches and a sum that needs both."""

    def __init__(self, max_tokens: int | None = TOKENS) -> None:
        import torch

        from benchmarks._torch_device import register

        register()
        torch.manual_seed(0)
        self.torch, how = torch, {"device": "cuda", "dtype": torch.bfloat16}
        self.x = torch.randn(TOKENS, HIDDEN, **how)
        weight = torch.randn(HIDDEN, WIDTH + HEADS, **how) / HIDDEN**0.5
        self.halves = weight[:, :WIDTH], weight[:, WIDTH:]
        self.down = torch.randn(HIDDEN, WIDTH, **how) / HIDDEN**0.5
        self.out = torch.empty(TOKENS, WIDTH, **how), torch.empty(TOKENS, HEADS, device="cuda")
        self.total = torch.zeros(TOKENS, WIDTH, **how)
        self.overlap = IndexerOverlap("gpu", max_tokens)
        self.streams: list[Any] = []

    def project(self, x: Any) -> Any:
        self.streams.append(self.torch.cuda.current_stream())
        return project_indexer(x, *self.halves, self.out)

    def beside(self) -> Any:
        for _ in range(BESIDE):
            beside = self.x @ self.down
        return beside

    def run(self) -> None:
        beside, (keys, weights) = self.overlap.run(TOKENS, self.beside, self.project, self.x)
        self.torch.add(keys, beside * weights[:, :1].bfloat16(), out=self.total)

    def bits(self) -> bytes:
        """What the newest run left."""
        self.torch.cuda.synchronize()
        return self.total.view(self.torch.int16).cpu().numpy().tobytes()


def test_forked_or_not_the_bits_are_the_same() -> None:
    layers = Layer(), Layer(max_tokens=0)
    for layer in layers:
        layer.run()
    assert layers[0].bits() == layers[1].bits()
    main = layers[0].torch.cuda.current_stream()
    assert layers[0].streams != [main] and layers[1].streams == [main]


def test_a_replay_does_it_for_other_inputs() -> None:
    layer, plain = Layer(), Layer(max_tokens=0)
    layer.run()
    plain.run()
    graph = layer.torch.cuda.CUDAGraph()
    with layer.torch.cuda.graph(graph):
        layer.run()
    for seed in range(3):
        layer.torch.manual_seed(seed)
        layer.x.normal_()
        plain.x.copy_(layer.x)
        layer.total.zero_()
        graph.replay()
        plain.run()
        assert layer.bits() == plain.bits()


def test_by_default_only_a_captured_step_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_DSA_OVERLAP_MAX_TOKENS", raising=False)
    layer = Layer(max_tokens=None)
    layer.run()
    wanted, main = layer.bits(), layer.torch.cuda.current_stream()
    assert layer.streams == [main]
    graph = layer.torch.cuda.CUDAGraph()
    with layer.torch.cuda.graph(graph):
        captured = layer.torch.cuda.current_stream()
        layer.run()
    assert layer.streams[1] not in (main, captured)
    layer.total.zero_()
    graph.replay()
    assert layer.bits() == wanted


@pytest.mark.parametrize("where", ["project", "beside"])
def test_a_failed_fork_leaves_a_capture_whole(where: str) -> None:
    layer = Layer()
    layer.run()
    wanted = layer.bits()

    def fail(name: str) -> None:
        if name == where:
            raise KeyError(where)

    def project(x: Any) -> None:
        layer.project(x)
        fail("project")

    graph = layer.torch.cuda.CUDAGraph()
    with layer.torch.cuda.graph(graph):
        with pytest.raises(KeyError):
            layer.overlap.run(TOKENS, lambda: fail("beside"), project, layer.x)
        layer.run()
    layer.total.zero_()
    graph.replay()
    assert layer.bits() == wanted


def test_a_capture_without_the_join_fails() -> None:
    layer = Layer()
    layer.run()
    wanted, side = layer.bits(), streams.side_stream_for(layer.x)
    assert side is not None
    main, graph = layer.torch.cuda.current_stream(), layer.torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="unjoined"), layer.torch.cuda.graph(graph):
        side.begin()
        layer.project(layer.x)
        side.end()
    # torch goes on with the stream of a capture that it could not end
    layer.torch.cuda.set_stream(main)
    layer.torch.cuda.synchronize()
    layer.run()
    assert layer.bits() == wanted

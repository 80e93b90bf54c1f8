"""Streams of hyper-connections on a device against float64, in every memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.device.transfers import Transfers
from fd_dsa.ops import split_sums, stream_kernels
from fd_dsa.ops.stream_kernels import (
    Connection,
    between_blocks,
    expand_streams,
    read_streams,
)
from fd_dsa.tensor import Normed
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8

pytestmark = pytest.mark.triton

NORM_EPS, EPS = 0.02, 0.05
STEPS = {"float32": 2.0**-20, "bfloat16": 2.0**-8}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Weights:
    """A connection drawn at random, in float64 and in a memory."""

    def __init__(self, streams: int, width: int, iterations: int) -> None:
        rng = np.random.default_rng([streams, width, iterations])
        mixes = (2 + streams) * streams if iterations else streams
        self.streams, self.iterations = streams, iterations
        self.fn, self.base, self.scale, self.norm = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in ((mixes, streams * width), mixes, 3 if iterations else 1, width)
        )
        self.fn *= np.float32((streams * width) ** -0.5)

    def put(self, m: KernelMemory) -> Connection:
        arrays = self.fn.reshape(-1), self.base, self.scale, self.norm
        return Connection(*map(m.put, arrays), NORM_EPS, EPS, self.iterations)

    def read(self, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Input of the block, and the factors [stream after, stream before or output]."""
        n, flat = self.streams, streams.reshape(len(streams), -1)
        mixed = flat @ self.fn.T.astype(np.float64)
        mixed /= np.sqrt((flat**2).mean(axis=1, keepdims=True) + NORM_EPS)
        pre = sigmoid(mixed[:, :n] * self.scale[0] + self.base[:n]) + EPS
        x = np.einsum("tn,tnc->tc", pre, streams)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + NORM_EPS) * self.norm
        if not self.iterations:
            return x, None
        post = 2 * sigmoid(mixed[:, n : 2 * n] * self.scale[1] + self.base[n : 2 * n])
        a = (mixed[:, 2 * n :] * self.scale[2] + self.base[2 * n :]).reshape(-1, n, n)
        a = np.exp(a - a.max(axis=2, keepdims=True))
        a = a / a.sum(axis=2, keepdims=True) + EPS
        a /= a.sum(axis=1, keepdims=True) + EPS
        for _ in range(self.iterations - 1):
            a /= a.sum(axis=2, keepdims=True) + EPS
            a /= a.sum(axis=1, keepdims=True) + EPS
        return x, np.concatenate((a.transpose(0, 2, 1), post[:, :, None]), axis=2)


def drawn(m: KernelMemory, kind: str, *shape: int) -> tuple[Any, np.ndarray]:
    """Values of a type in a memory, and in float64."""
    values = np.random.default_rng(shape).standard_normal(shape)
    exact = block_fp8.rounded(values, kind)
    return block_fp8.put(m, exact, kind), exact.astype(np.float64)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    ("tokens", "streams", "width"),
    [(1, 4, 48), (17, 2, 200), (3, 3, 128), (70, 4, 72), (70, 3, 24)],
    ids=str,
)
def test_two_blocks(
    tokens: int,
    streams: int,
    width: int,
    kind: str,
    paddle_memory: KernelMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 70 tokens are a long prompt
    monkeypatch.setattr(stream_kernels, "LONG_PROMPT", 64)
    m, step = paddle_memory, STEPS[kind]
    first, second, head = Weights(streams, width, 2), Weights(streams, width, 20), None
    head = Weights(streams, width, 0)
    embedded, exact = drawn(m, kind, tokens, width)
    found, sums = expand_streams(None, embedded, None, first.put(m), streams)
    wanted = np.repeat(exact[:, None], streams, axis=1)
    np.testing.assert_array_equal(block_fp8.get(m, found), wanted)
    for weights, following in ((first, second), (second, head)):
        x, mixture = read_streams(found, sums, weights.put(m))
        exact_x, factors = weights.read(wanted)
        check(block_fp8.get(m, x), exact_x, step)
        check(m.get(mixture), factors, 2.0**-16)
        change, exact = drawn(m, kind, tokens, width, 1)
        change, exact = change.reshape([tokens, width]), exact[:, :, 0]
        before = np.concatenate((wanted, exact[:, None]), axis=1)
        found, sums = expand_streams(found, change, mixture, following.put(m), streams)
        check(block_fp8.get(m, found), factors @ before, step)
        wanted = block_fp8.get(m, found).astype(np.float64)
    x, mixture = read_streams(found, sums, head.put(m))
    assert mixture is None
    check(block_fp8.get(m, x), head.read(wanted)[0], step)


@pytest.mark.parametrize("in_fixed_order", [False, True])
def test_number_of_tokens_and_parts_of_a_sum(
    in_fixed_order: bool, paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps have the same parts, also long prompts, whose programs have more tokens."""
    m, weights, parts = paddle_memory, Weights(2, 72, 0), []
    monkeypatch.setattr(stream_kernels, "LONG_PROMPT", 64)
    monkeypatch.setattr(stream_kernels, "fixed_order", lambda: in_fixed_order)
    for tokens in (1, 64, 65):
        streams, exact = drawn(m, "float32", tokens, 2, 72)
        _, sums = expand_streams(streams, None, None, weights.put(m), 2)
        found = m.get(sums)[..., :2]
        check(found.sum(axis=0), exact.reshape(tokens, -1) @ weights.fn.T, 2.0**-18)
        parts.append(len(found))
    assert parts == [2, 2, 2]


def test_streams_without_a_change(paddle_memory: KernelMemory) -> None:
    """They are projected alone, and mixed without a projection."""
    m, weights = paddle_memory, Weights(4, 40, 0)
    streams, exact = drawn(m, "float32", 5, 4, 40)
    found, sums = expand_streams(streams, None, None, weights.put(m), 4)
    assert found is streams
    x, _ = read_streams(found, sums, weights.put(m))
    check(m.get(x), weights.read(exact)[0], 2.0**-18)
    factors = np.random.default_rng(0).random((5, 4, 5), np.float32)
    change, added = drawn(m, "float32", 5, 40)
    found, _ = expand_streams(streams, change, m.put(factors), None, 4)
    check(m.get(found), factors @ np.concatenate((exact, added[:, None]), axis=1), 2.0**-18)


@pytest.mark.parametrize("kind", STEPS)
def test_a_change_of_every_stream(kind: str, paddle_memory: KernelMemory) -> None:
    """Streams without a mixture stay, and the change is added to each of them."""
    m, weights = paddle_memory, Weights(4, 40, 2)
    (streams, exact), (change, added) = drawn(m, kind, 5, 4, 40), drawn(m, kind, 5, 40)
    found, sums = expand_streams(streams, change, None, weights.put(m), 4)
    wanted = exact + added[:, None]
    check(block_fp8.get(m, found), wanted, STEPS[kind])
    x, _ = read_streams(found, sums, weights.put(m))
    check(block_fp8.get(m, x), weights.read(block_fp8.get(m, found))[0], STEPS[kind])


@pytest.mark.parametrize("round_scales", [False, True])
@pytest.mark.parametrize("width", [40, 200])
def test_codes_are_those_of_the_result(
    width: int, round_scales: bool, paddle_memory: KernelMemory
) -> None:
    m, connection = paddle_memory, Weights(2, width, 2).put(paddle_memory)
    streams, _ = drawn(m, "bfloat16", 5, 2, width)
    _, sums = expand_streams(streams, None, None, connection, 2)
    plain, mixture = read_streams(streams, sums, connection)
    found, same = read_streams(streams, sums, connection._replace(round_scales=round_scales))
    assert isinstance(found, Normed)
    values = block_fp8.get(m, plain)
    np.testing.assert_array_equal(block_fp8.get(m, found.plain), values)
    np.testing.assert_array_equal(m.get(same), m.get(mixture))
    block_fp8.check_quantized(m, found.fp8, values, round_scales)


class Site:
    """Arguments of `between_blocks` for some tokens, and its results.

    Args:
        absent: arguments that are None.
        head: True for the connection of the head.
    """

    def __init__(
        self,
        m: KernelMemory,
        kind: str,
        streams: int,
        width: int,
        absent: tuple[str, ...] = (),
        head: bool = False,
        round_scales: bool | None = True,
    ) -> None:
        self._m, self._kind, self._streams, self._absent = m, kind, streams, absent
        weights, rng = Weights(streams, width, 0 if head else 20), np.random.default_rng(width)
        shapes = ("streams", streams, width), ("change", width), ("mixture", streams, streams + 1)
        self._values = {name: rng.standard_normal((24, *shape)) for name, *shape in shapes}
        if not m.on_gpu:
            # sums of a CPU's GEMM depend on the place of a row, unless they are exact
            weights.fn = np.round(weights.fn * 64) / 64
            self._values = {name: np.round(values) for name, values in self._values.items()}
        self.connection = weights.put(m)._replace(round_scales=round_scales)

    def run(self, first: int, end: int) -> list[np.ndarray]:
        """Results for some of 24 tokens, in the order of tokens."""
        m, tensors = self._m, []
        for name, values in self._values.items():
            kind = "float32" if name == "mixture" else self._kind
            tensor = block_fp8.put(m, block_fp8.rounded(values[first:end], kind), kind)
            tensors.append(None if name in self._absent else tensor)
        out, x, mixture = between_blocks(*tensors, self.connection, self._streams)
        found = [m.get(out)]
        if isinstance(x, Normed):
            scales = m.get(x.fp8.scales)[:, : end - first].T
            found += [m.get(x.plain), m.get(x.fp8.codes), scales]
        else:
            found.append(m.get(x))
        return found if mixture is None else [*found, m.get(mixture)]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"absent": ("streams", "mixture")},
    {"absent": ("mixture",)},
    {"absent": ("mixture",), "head": True, "round_scales": None},
    {"round_scales": False},
    {"round_scales": None},
)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param(form, kind, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, form in enumerate(FORMS)
        for j, kind in enumerate(STEPS)
    ],
    ids=str,
)
def test_one_launch_has_the_bits_of_two(
    form: dict[str, Any],
    kind: str,
    paddle_memory: KernelMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A token's results do not depend on the number of tokens or of launches."""
    m = paddle_memory
    for streams, width in (
        (4, 200) if form else (3, 136),
        *([(4, 4096), (4, 7168)] if m.large else []),
    ):
        site = Site(m, kind, streams, width, **form)
        monkeypatch.setattr(stream_kernels, "FEW_PROGRAMS", 0)
        wanted = site.run(0, 24)
        monkeypatch.setattr(stream_kernels, "FEW_PROGRAMS", 1 << 20)
        for first, end in ((0, 1), (7, 8), (3, 7), (8, 24)):
            assert_same(site.run(first, end), [values[first:end] for values in wanted])
        counts = split_sums.scratch_beside(site.connection.base, "residual streams", 0)
        assert not m.get(counts).any()


def test_the_number_of_programs_selects_the_launches(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    for name in ("expand_streams", "read_streams"):
        function = getattr(stream_kernels, name)

        def spy(*arguments: Any, name: str = name, function: Any = function) -> Any:
            launched.append(name)
            return function(*arguments)

        monkeypatch.setattr(stream_kernels, name, spy)
    # 20 programs of a token
    site = Site(paddle_memory, "float32", 2, 1280)
    site.run(0, 13)
    assert launched == ["expand_streams"]
    site.run(0, 14)
    assert launched[1:] == ["expand_streams", "read_streams"]


def test_captured_before_the_first_run_it_has_two_launches(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(paddle_memory, "float32", 2, 40)
    wanted = site.run(0, 3)
    monkeypatch.setattr(Transfers, "is_capturing", lambda self: True)
    monkeypatch.setattr(split_sums, "SCRATCH", {})
    assert_same(site.run(0, 3), wanted)
    assert "run a step before the capture" in caplog.text and not split_sums.SCRATCH


def check(found: np.ndarray, wanted: np.ndarray | None, step: float) -> None:
    """Compare to a fraction of the largest value."""
    assert wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=0, atol=step * np.abs(wanted).max())

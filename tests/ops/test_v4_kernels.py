"""Keys, entries, states and attention of DeepSeek-V4 on a device against float64 loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.ops.dense_kernels import quantize_rows, rms_norm
from fd_dsa.ops.expert_tables import look_up_experts
from fd_dsa.ops.sampling.token_buffer import NO_TOKEN, NOT_FINITE
from fd_dsa.ops.v4_attend import attend_v4, new_partials, num_splits
from fd_dsa.ops.v4_entries import Compression, Plan, Pooling
from fd_dsa.ops.v4_places import Entries, TokenPlaces, Windows
from fd_dsa.ops.v4_rotation import rotate_heads
from fd_dsa.ops.v4_write_kernels import Ring, keep_step, write_step
from fd_dsa.tensor import Fp8Rows, Normed
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8

pytestmark = pytest.mark.triton

EPS, ROPE, LONGEST = 0.02, 8, 64
STEPS = {"float32": 2.0**-18, "bfloat16": 2.0**-7}
ANGLES = np.arange(LONGEST)[:, None] * 0.7 ** np.arange(ROPE // 2)
COS_SIN = np.concatenate((np.cos(ANGLES), np.sin(ANGLES)), axis=1).astype(np.float32)


def drawn(m: KernelMemory, kind: str, *shape: int) -> tuple[Any, np.ndarray]:
    """Values of a type in a memory, and in float64."""
    exact = block_fp8.rounded(np.random.default_rng(shape).standard_normal(shape), kind)
    return block_fp8.put(m, exact, kind), exact.astype(np.float64)


def rotated(x: np.ndarray, position: int, sign: int = 1, angles: np.ndarray = ANGLES) -> np.ndarray:
    """`x` [..., width] with its last channels rotated by `angles` [positions, pairs]."""
    turn, rope = np.exp(sign * 1j * angles[position]), 2 * angles.shape[1]
    pairs = x[..., -rope:].reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    both = np.stack((turned.real, turned.imag), axis=-1).reshape(*x.shape[:-1], rope)
    return np.concatenate((x[..., :-rope], both), axis=-1)


def with_sinks(q: np.ndarray, keys: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """Attention of heads [heads, width] to keys that are values, with a sink for each head."""
    logits = np.concatenate((q @ keys.T, sinks[:, None]), axis=1)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return np.asarray(share[:, :-1] @ keys)


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight


def check(found: np.ndarray, wanted: np.ndarray, kind: str) -> None:
    """Compare to a fraction of the largest value."""
    bound = STEPS[kind] * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("width", [32, 40])
def test_latents_keys_and_rotated_heads(width: int, kind: str, paddle_memory: KernelMemory) -> None:
    m, positions, rank = paddle_memory, np.array([0, 5, 63], np.int32), 7
    rows, exact = drawn(m, kind, 3, rank + width)
    rng = np.random.default_rng(1)
    weight, of_latents = rng.random(width, np.float32), m.put(rng.random(rank, np.float32))
    cos_sin, places = m.put(COS_SIN), m.put(positions)
    norms = of_latents, m.put(weight), EPS
    latents, keys = write_step(rows, *norms, cos_sin, places, round_scales=True)
    wanted = normed(exact[:, rank:], weight)
    check(
        block_fp8.get(m, keys),
        np.stack([rotated(x, p) for x, p in zip(wanted, positions, strict=True)]),
        kind,
    )
    _, alone = rms_norm(rows[:, :rank], None, of_latents, EPS, True)
    assert isinstance(latents, Normed) and isinstance(alone, Normed)
    pairs = zip((latents.plain, *latents.fp8[:2]), (alone.plain, *alone.fp8[:2]), strict=True)
    for one, other in pairs:
        # columns past the tokens are padding
        np.testing.assert_array_equal(m.get(one)[:, :3], m.get(other)[:, :3])
    wide, exact = drawn(m, kind, 3, 17 * width + 5)
    weights = m.put(rng.random((3, 20), np.float32))
    heads, own = rotate_heads(wide[:, 5:], weights[:, 3:], cos_sin, places)
    exact = exact[:, 5:].reshape(3, 17, width)
    wanted = np.stack([rotated(x, p) for x, p in zip(exact, positions, strict=True)])
    check(block_fp8.get(m, heads), wanted, kind)
    np.testing.assert_array_equal(m.get(own), m.get(weights)[:, 3:])


@pytest.mark.parametrize("has_prompts", [True, False])
@pytest.mark.parametrize(("halves", "ratio", "drafts"), [(2, 4, 0), (1, 6, 3)])
@pytest.mark.parametrize("kind", STEPS)
def test_entries_pool_old_and_new_sources(
    kind: str, halves: int, ratio: int, drafts: int, has_prompts: bool, paddle_memory: KernelMemory
) -> None:
    """Two rows: of prompts one from its beginning, one whose sources are partly in its state."""
    m, pool, widths = paddle_memory, halves * ratio, [32, 16][: 1 + (halves == 2)]
    source, kept_rows, rank = 2 * halves * sum(widths), pool + drafts, 3
    states = np.full((2 * kept_rows, source), np.nan, np.float32)
    history = np.random.default_rng(5).standard_normal((2, LONGEST, source)).astype(np.float32)
    before, news = [0, ratio * 3 + 1], [ratio + 1, ratio]
    if not has_prompts:
        before, news = [ratio - 1, ratio * 3 - 1], [1, 1 + drafts]
    for row in range(2):
        for position in range(max(before[row] - pool, 0), before[row]):
            states[row * kept_rows + position % kept_rows] = history[row, position]
    own = np.concatenate([history[r, before[r] : before[r] + news[r]] for r in range(2)])
    plan, rows, kept, token = [], [], [], 0
    for row in range(2):
        for number in range(news[row]):
            position = before[row] + number
            if (position + 1) % ratio == 0:
                plan.append((token, row, position, max(pool - 1 - number, 0)))
                rows.append(1 + 2 * row)
            if number >= news[row] - pool:
                kept.append((token, row, position, 0))
            token += 1
    plan.append((-1, -1, -1, -1))
    work = Plan(
        m.put(np.array(plan, np.int32)),
        m.put(np.array([*rows, -1], np.int32)),
        m.put(np.array(kept, np.int32)),
        *(len(plan), len(kept), ratio, pool, kept_rows),
    )
    rng, made, weights = np.random.default_rng(6), [], []
    for width in widths:
        gates = rng.standard_normal((ratio, halves, width)).astype(np.float32)
        norm, empty = rng.random(width, np.float32), m.poisoned((2, 2, width), kind)
        weights.append((gates, norm))
        made.append(Pooling(m.put(gates.reshape(-1)), m.put(norm), empty))
    # rows of sources have more columns, as the weights of an indexer's heads
    wide = m.put(np.pad(own, ((0, 0), (0, 5)), constant_values=np.nan))
    kept_sources = m.put(states)
    step = Compression(wide[:, :source], kept_sources, work, *made)
    places = np.arange(token, dtype=np.int32) - 1
    places = np.where(places > 3, -1, places).astype(np.int32)
    ring = Ring(m.put(places), m.poisoned((10, 32), kind))
    # one of these tokens is in the ring of its row, too
    snapshot = np.full(token, -1, np.int32)
    snapshot[:2] = 9, 7
    projected, ones = drawn(m, kind, token, rank + 32)[0], m.put(np.ones(32, np.float32))
    norms = m.put(np.ones(rank, np.float32)), ones, EPS
    given = m.put(COS_SIN), m.put(np.zeros(token, np.int32)), step
    _, keys = write_step(projected, *norms, *given, None if has_prompts else ring)
    if has_prompts:
        np.testing.assert_array_equal(m.get(kept_sources), states)
        keep_step(keys, ring, step, m.put(snapshot))
    first = 0
    for pooling, (gates, norm), width in zip(made, weights, widths, strict=True):
        found = block_fp8.get(m, pooling.entries).reshape(4, width)
        for (_, row, position, _), at in zip(plan[:-1], rows, strict=True):
            values, logits = [], []
            for number in range(pool):
                here = position - (pool - 1) + number
                if here < 0:
                    continue
                half = number // ratio
                parts = history[row, here, first : first + 2 * halves * width]
                parts = parts.reshape(2, halves, width).astype(np.float64)
                values.append(parts[0, half])
                logits.append(parts[1, half] + gates[here % ratio, half])
            share = np.exp(logits - np.max(logits, axis=0))
            mean = (share * values).sum(axis=0) / share.sum(axis=0)
            check(found[at], rotated(normed(mean, norm), position + 1 - ratio), kind)
        first += 2 * halves * width
    found, after = block_fp8.get(m, ring.keys), m.get(kept_sources)
    in_rings = np.stack([places, snapshot if has_prompts else places], axis=1)
    for both, key in zip(in_rings, block_fp8.get(m, keys), strict=True):
        for place in both[both >= 0]:
            np.testing.assert_array_equal(found[place], key)
    for one, row, position, _ in kept:
        np.testing.assert_array_equal(after[row * kept_rows + position % kept_rows], own[one])


class Attended:
    """Three rows of a step: a prompt, a later chunk and a decoding row, with one padded token."""

    window, ratio, per_block, topk, last = 5, 4, 2, 3, 20

    def __init__(self, m: KernelMemory, kind: str, heads: int, width: int) -> None:
        self.m, self.before, news = m, [0, 9, self.last], [6, 7, 1]
        self.kind, rng = kind, np.random.default_rng([heads, width])
        history = rng.standard_normal((3, LONGEST, width))
        self.history = self.rounded(history).astype(np.float64)
        positions = [self.before[r] + i for r in range(3) for i in range(news[r])]
        self.rows = np.array([*np.repeat(np.arange(3), news), -1], np.int32)
        self.positions = np.array([*positions, 0], np.int32)
        starts, tokens = np.cumsum([0, *news]).astype(np.int32), len(self.rows)
        table = rng.permutation(12).reshape(3, 4).astype(np.int32)
        self.table = table
        keys, ring = np.zeros((tokens, width)), np.full((3 * self.window, width), np.inf)
        for token, (row, position) in enumerate(zip(self.rows, self.positions, strict=True)):
            keys[token] = self.history[row, position]
        for row in range(3):
            for position in range(max(self.before[row] - self.window, 0), self.before[row]):
                ring[row * self.window + position % self.window] = self.history[row, position]
        self.pool = np.full((12, self.per_block, width), np.nan, np.float32)
        for row in range(3):
            for entry in range((self.before[row] + news[row]) // self.ratio):
                one = self.rounded(rng.standard_normal((1, width)))[0]
                self.pool.reshape(-1, width)[self.slot(row, entry)] = one
        # columns of wider rows, as in a layer with an indexer
        wide, exact = drawn(m, kind, tokens, heads * width + 16)
        self.q, self.exact_q = wide[:, 16:], exact[:, 16:].reshape(tokens, heads, width)
        self.sinks = rng.standard_normal(heads).astype(np.float32)
        self.windows = Windows(*map(self.put, (keys, ring)), self.window, self.window)
        arrays = self.positions, self.rows, starts, table
        self.places = TokenPlaces(*map(m.put, arrays))
        self.slots = np.full((tokens, self.topk), -1, np.int32)
        for token, (row, position) in enumerate(zip(self.rows, self.positions, strict=True)):
            visible = (position + 1) // self.ratio if row >= 0 else 0
            chosen = np.sort(rng.permutation(visible)[: self.topk])
            self.slots[token, : len(chosen)] = [self.slot(row, entry) for entry in chosen]

    def rounded(self, keys: np.ndarray) -> np.ndarray:
        """Keys [..., width] as their type holds them."""
        return block_fp8.rounded(keys, self.kind)

    def put(self, keys: np.ndarray) -> Any:
        """Keys [..., width] in the memory, in their type."""
        return block_fp8.put(self.m, keys.astype(np.float32), self.kind)

    def slot(self, row: int, entry: int) -> int:
        """The slot of an entry of a row."""
        block = self.table[row, entry // self.per_block]
        return int(block * self.per_block + entry % self.per_block)

    def wanted(self, token: int, selects: bool | None) -> np.ndarray:
        """Return float64 [heads, width], without entries if `selects` is None."""
        row, position = self.rows[token], self.positions[token]
        if row < 0:
            return np.zeros_like(self.exact_q[token])
        q = rotated(normed(self.exact_q[token], 1.0), position) * self.exact_q.shape[2] ** -0.5
        first = max(position + 1 - self.window, 0)
        keys, flat = (
            list(self.history[row, first : position + 1]),
            self.pool.reshape(-1, q.shape[1]),
        )
        if selects is not None:
            slots = [self.slot(row, e) for e in range((position + 1) // self.ratio)]
            slots = [s for s in self.slots[token] if s >= 0] if selects else slots
            keys += list(flat[slots].astype(np.float64))
        return rotated(with_sinks(q, np.array(keys), self.sinks), position, -1)


class AttendedInTiles(Attended):
    """The same with keys of several tiles, so that the splits of a token share them."""

    window, ratio, per_block, topk, last = 40, 2, 8, 20, 50


@pytest.fixture(params=["one program", "splits"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a token and a few heads: one as in a long step, or several."""
    if request.param == "one program":
        monkeypatch.setattr("fd_dsa.ops.v4_attend.num_splits", lambda *_: 1)


def attentions() -> list[Any]:
    """List sizes, forms of a launch, and keys of one tile or several. Half of most are slow."""
    sizes = ("float32", 8, 32), ("bfloat16", 20, 32), ("float32", 64, 24), ("float32", 3, 136)
    found = []
    for place, one in enumerate(sizes):
        for i, splits in enumerate(("one program", "splits")):
            for j, made in enumerate((Attended, AttendedInTiles)):
                marks = [pytest.mark.slow] * (place > 0 and i == j)
                found.append(pytest.param(*one, splits, made, marks=marks))
    return found


@pytest.mark.parametrize("selects", [None, False, True])
@pytest.mark.parametrize(
    ("kind", "heads", "width", "splits", "made"), attentions(), indirect=["splits"], ids=str
)
def test_attention(
    kind: str,
    heads: int,
    width: int,
    selects: bool | None,
    splits: None,
    made: type[Attended],
    paddle_memory: KernelMemory,
) -> None:
    m, case = paddle_memory, made(paddle_memory, kind, heads, width)
    entries = None
    if selects is not None:
        entries = Entries(case.put(case.pool), case.ratio, m.put(case.slots) if selects else None)
    shared = m.put(case.sinks), m.put(COS_SIN), case.places, EPS, new_partials(width, m.poisoned)
    found = block_fp8.get(m, attend_v4(case.q, case.windows, entries, *shared))
    wanted = np.stack([case.wanted(token, selects) for token in range(len(case.rows))])
    check(found.reshape(wanted.shape), wanted, kind)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("round_scales", [False, True])
def test_attention_in_fp8(round_scales: bool, paddle_memory: KernelMemory) -> None:
    """The codes are those of a launch that reads the values."""
    m, partials = paddle_memory, new_partials(256, paddle_memory.poisoned)
    case = AttendedInTiles(m, "bfloat16", 5, 256)
    entries = Entries(case.put(case.pool), case.ratio)
    given = case.q, case.windows, entries, m.put(case.sinks), m.put(COS_SIN), case.places, EPS
    plain = attend_v4(*given, partials)
    found = attend_v4(*given, partials, round_scales)
    assert isinstance(found, Fp8Rows)
    wanted, tokens = quantize_rows(plain, round_scales), len(case.rows)
    np.testing.assert_array_equal(m.get(found.codes), m.get(wanted.codes))
    np.testing.assert_array_equal(m.get(found.scales)[:, :tokens], m.get(wanted.scales)[:, :tokens])


def test_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits fill the device, and padding to the next power of two leaves their number."""
    sizes = 1, 2, 4, 8, 16, 32, 64, 2048
    assert [num_splits(n, 64, 99) for n in sizes] == [32, 32, 16, 8, 4, 2, 1, 1]
    assert [num_splits(n, 8, 99) for n in (8, 9, 16, 256, 257)] == [32, 16, 16, 1, 1]
    assert [num_splits(n, 128, 99) for n in (1, 5, 6, 7, 8)] == [32, 4, 4, 4, 4]
    # a window without entries has four tiles
    assert [num_splits(n, 64, 4) for n in (1, 16, 32)] == [4, 4, 2]
    monkeypatch.setattr("fd_dsa.ops.split_sums.fixed_order", lambda: True)
    assert num_splits(1, 8, 99) == 1


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_experts_by_token_id(score: str, paddle_memory: KernelMemory) -> None:
    """An expert that a row of the table names twice counts twice.

    Padding has none, nor has the result code of a request that got no token.
    """
    m, rng = paddle_memory, np.random.default_rng(0)
    logits = rng.standard_normal((6, 6)).astype(np.float32) * 20
    # two rows before the table, which no id names
    table = np.array([[1, 2, 3], [1, 2, 3], [0, 3, 5], [2, 2, 4], [1, 1, 1]], np.int32)
    ids = np.array([1, 0, 2, 1, NOT_FINITE, NO_TOKEN])
    rows = np.array([0, 0, 1, -1, 2, 3], np.int32)
    given = m.put(logits), m.put(table)[2:], m.put(ids), m.put(rows)
    found, weights = map(m.get, look_up_experts(*given, scaling=1.5, score=score)[:2])
    table = table[2:]
    functions = {
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    }
    for token in range(3):
        scores = functions[score](logits[token].astype(np.float64))
        own = np.zeros(6)
        np.add.at(own, table[ids[token]], scores[table[ids[token]]])
        own *= 1.5 / (own.sum() + 1e-20)
        summed = np.zeros(6)
        live = found[token] >= 0
        assert len(set(found[token][live])) == live.sum()
        np.add.at(summed, found[token][live], weights[token][live])
        np.testing.assert_allclose(summed, own, rtol=1e-5, atol=1e-9)
    assert (found[3:] == -1).all()
    assert (weights[3:] == 0).all()

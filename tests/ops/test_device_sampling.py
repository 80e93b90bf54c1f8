"""The device's sampler against the CPU's: codes and greedy tokens always, draws off the borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the sampler is made of Triton's kernels")

from fd_dsa.engine import sampler as cpu
from fd_dsa.engine.logit_rules import LogitRules, apply_rules
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.errors import ShapeError
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.ops.sampling.sampler import DeviceSampler
from fd_dsa.ops.sampling.token_buffer import NO_TOKEN, NOT_FINITE
from tests.engine.reference_sampler import ref_uniform
from tests.kernel_memory import KernelMemory, open_memory

# a share of the mass: this near to a border the order of float32 sums may decide
NEAR = 1e-6


class Both:
    """The samplers of both sides with the same batch rows."""

    def __init__(self, memory: KernelMemory, max_num_seqs: int, vocab_size: int) -> None:
        self.memory, self.vocab_size = memory, vocab_size
        self.cpu = cpu.Sampler(max_num_seqs)
        self.device = DeviceSampler(max_num_seqs, vocab_size, memory.poisoned)
        self.params: dict[int, tuple[SamplingParams, int]] = {}
        self.rules: dict[int, LogitRules] = {}

    def set_parameters(
        self,
        batch_row: int,
        params: SamplingParams,
        seed: int,
        prompt: tuple[int, ...] = (),
        output: list[int] | None = None,
        end_ids: tuple[int, ...] = (),
    ) -> None:
        """Give both a request; `output` grows with what is drawn."""
        output = [] if output is None else output
        rules = LogitRules(params, prompt, output, None, end_ids)
        self.params[batch_row] = params, seed
        self.rules[batch_row] = rules
        self.cpu.set_parameters(batch_row, params, seed, rules if params.has_rules else None)
        on_device = RowParameters(
            params.temperature, params.min_p, params.top_k, params.top_p, seed,
            params.repetition_penalty, params.frequency_penalty, params.presence_penalty,
            params.logit_bias or {}, params.bad_words_token_ids or (), end_ids, params.min_tokens,
        )  # fmt: skip
        self.device.set_parameters(batch_row, on_device, prompt, output)

    def sample(
        self, logits: np.ndarray, batch_rows: Any, positions: Any, mask_rows: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the CPU and of the device; padding has the CPU's NOT_FINITE."""
        n, put = len(logits), self.memory.put
        batch_rows, positions = np.array(batch_rows), np.array(positions)
        mask_rows = np.full(n, -1) if mask_rows is None else np.array(mask_rows)
        self.device.sample(
            put(logits), put(batch_rows, "int32"), put(positions, "int64"), put(mask_rows, "int32")
        )
        expected = np.full(n, NOT_FINITE)
        live = batch_rows >= 0
        expected[live] = self.cpu.sample(logits[live], batch_rows[live], positions[live])
        return expected, self.memory.get(self.device.tokens)[:n]

    def check(self, logits: np.ndarray, batch_rows: Any, positions: Any) -> None:
        """Equal tokens, or draws near a border of one that may be drawn."""
        expected, found = self.sample(logits, batch_rows, positions)
        for row, batch_row in enumerate(batch_rows):
            if expected[row] != found[row]:
                assert min(expected[row], found[row]) >= 0, (row, expected[row], found[row])
                adjusted = logits[row : row + 1].copy()
                apply_rules(adjusted, [self.rules[batch_row]])
                params, seed = self.params[batch_row]
                number = ref_uniform(seed, int(positions[row]))
                distance = border_distance(adjusted[0], params, number)
                assert distance < NEAR, (row, params, expected[row], found[row])


def border_distance(logits: np.ndarray, params: SamplingParams, number: float) -> float:
    """Return the distance of a number to the end of a token, or of top-p to that of a nucleus."""
    temperature = min(params.temperature, 1e30)
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.lexsort((np.arange(len(logits)), -logits))
    if params.min_p:
        order = order[logits[order] >= logits.max() + temperature * np.log(params.min_p)]
    order = order[: params.top_k if params.top_k > 0 else len(order)]
    ends = weights[order].cumsum()
    count, distance = len(order), 1.0
    if params.top_p < 1:
        shares = ends / ends[-1]
        distance = float(np.abs(shares - params.top_p).min())
        count = int((shares < params.top_p).sum()) + 1
    kept = np.zeros(len(logits))
    kept[order[:count]] = weights[order[:count]]
    borders = kept.cumsum() / kept.sum()
    return min(distance, float(np.abs(borders - number).min()))


def normal(rng: np.random.Generator, rows: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    """float32 logits."""
    return (rng.normal(size=(rows, vocab_size)) * scale).astype(np.float32)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.00002, 0.05, 0.3, 0.7, 1.0, 1.7, 5.0, 100.0, 1e300]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 40, 255, 256, 257, 700, 1999, 5000, 10**12]),
    top_p=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-30, 0.01, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.1]),
    logit_bias=st.sampled_from([None, None, {0: 100.0, 2: -0.1}, {1: 0.3}]),
    bad_words_token_ids=st.sampled_from([None, None, [0], [0, 1, 2]]),
    min_tokens=st.sampled_from([0, 0, 2]),
    max_tokens=st.just(None),
)


@pytest.mark.parametrize(
    "vocab_size", [3, 50, *(pytest.param(size, marks=pytest.mark.slow) for size in (700, 2000))]
)
def test_tokens_are_those_of_the_cpu(kernel_memory: KernelMemory, vocab_size: int) -> None:
    both = Both(kernel_memory, 8, vocab_size)

    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        params=st.lists(PARAMS, min_size=1, max_size=3),
        scale=st.sampled_from([0.0, 0.01, 1.0, 4.0]),
        decimals=st.sampled_from([0, 2, 9]),
        masked=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 2**32),
    )
    def compare(
        params: list[SamplingParams], scale: float, decimals: int, masked: float, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        outputs: list[list[int]] = []
        for batch_row, one in enumerate(params):
            prompt, output = rng.integers(0, vocab_size, (2, 4)).tolist()
            outputs.append(output[: batch_row % 3])
            both.set_parameters(
                batch_row, one, seed + batch_row, tuple(prompt), outputs[batch_row], (1, 2)
            )
        for _ in range(2):
            logits = normal(rng, len(params), vocab_size, scale).round(decimals)
            logits[rng.random(logits.shape) < masked] = -np.inf
            positions = [len(output) for output in outputs]
            both.check(logits, range(len(params)), positions)
            # the device has counted its own token
            found = both.memory.get(both.device.tokens)
            for output, token in zip(outputs, found, strict=False):
                output.append(max(int(token), 0))
            if (found[: len(params)] < 0).any():
                break

    compare()


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.5], ids=["equal", "flat", "curved"])
def test_a_cut_among_most_of_the_tokens(kernel_memory: KernelMemory, scale: float) -> None:
    vocab_size = 6000
    shares = [(0.2, 0), (0.999, 0), (0.5, 4100), (0.8, 0), (1.0, 4100), (0.9, 30)]
    rows = len(shares) if kernel_memory.large else 3
    both, rng = Both(kernel_memory, rows, vocab_size), np.random.default_rng(5)
    for batch_row, (top_p, top_k) in enumerate(shares[:rows]):
        both.set_parameters(batch_row, SamplingParams(top_p=top_p, top_k=top_k), batch_row)
    both.check(normal(rng, rows, vocab_size, scale), range(rows), [3] * rows)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_codes_of_rows_without_a_token(kernel_memory: KernelMemory, bad: float) -> None:
    vocab_size = 300
    both = Both(kernel_memory, 5, vocab_size)
    every = list(range(vocab_size))
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9, "top_k": 3},
        {"bad_words_token_ids": every},
        {"temperature": 0.0, "bad_words_token_ids": every, "presence_penalty": 1.0},
    ]
    for batch_row, one in enumerate(kinds):
        both.set_parameters(batch_row, SamplingParams(**one), batch_row)
    logits = normal(np.random.default_rng(1), 5, vocab_size)
    expected, found = both.sample(logits, range(5), [0] * 5)
    assert found.tolist() == expected.tolist()
    assert found[3:].tolist() == [NO_TOKEN] * 2
    logits[:, 17 if bad != -np.inf else slice(None)] = bad
    _, found = both.sample(logits, range(5), [0] * 5)
    assert found.tolist() == [NOT_FINITE] * 5


def test_padding_slots_and_masks(kernel_memory: KernelMemory) -> None:
    vocab_size = 130
    both, rng = Both(kernel_memory, 6, vocab_size), np.random.default_rng(2)
    for batch_row in range(6):
        both.set_parameters(batch_row, SamplingParams(temperature=float(batch_row % 2)), batch_row)
    logits = normal(rng, 6, vocab_size)
    logits[3] = logits[5] = np.sort(logits[3])
    allowed = np.zeros((2, 160), np.uint8)
    allowed[0, :40] = 1
    masks = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    both.device.set_masks(masks)
    batch_rows = [5, -1, 0, 2, 4, 2]
    expected, found = both.sample(logits, batch_rows, range(6), [-1, -1, -1, 0, 1, -1])
    live = [0, 2, 5]
    assert found[live].tolist() == expected[live].tolist()
    assert found[3] == logits[3, :40].argmax() and found[4] == NO_TOKEN


def test_extreme_logits_and_equal_weights(kernel_memory: KernelMemory) -> None:
    both = Both(kernel_memory, 4, 3)
    for batch_row, one in enumerate(
        [{"temperature": 2e-5}, {"top_p": 0.4}, {"temperature": 1e300, "top_k": 2}, {"min_p": 1.0}]
    ):
        both.set_parameters(batch_row, SamplingParams(**one), batch_row)
    row = [-3e38, 3e38, 0.0]
    logits = np.array([row, [3e38, -3e38, 3e38], row, [0.0, -0.0, -1e-45]], np.float32)
    for position in range(10 if kernel_memory.large else 3):
        both.check(logits, range(4), [position] * 4)


def test_a_real_vocabulary(kernel_memory: KernelMemory) -> None:
    vocab_size = 129_280
    kinds = [{"top_k": 50, "top_p": 0.9}, {"top_p": 0.95}, {}, {"temperature": 0.0}]
    # an interpreted program takes milliseconds for each block of a row
    rows = len(kinds) if kernel_memory.large else 1
    both, rng = Both(kernel_memory, rows, vocab_size), np.random.default_rng(3)
    for batch_row, one in enumerate(kinds[:rows]):
        both.set_parameters(batch_row, SamplingParams(**one), batch_row)
    both.check(normal(rng, rows, vocab_size), range(rows), [7] * rows)


def test_too_many_entries_are_refused(kernel_memory: KernelMemory) -> None:
    sampler = DeviceSampler(1, 50, kernel_memory.poisoned)
    with pytest.raises(ValueError, match="5000 tokens are biased or banned"):
        sampler.set_parameters(0, RowParameters(banned=range(5000)))


def test_more_rows_than_slots_are_refused(kernel_memory: KernelMemory) -> None:
    sampler, put = DeviceSampler(1, 50, kernel_memory.poisoned), kernel_memory.put
    rows = put(np.zeros(2, np.int32))
    with pytest.raises(
        ShapeError, match="sampling 2 rows of logits with 2 batch rows; this sampler has 1"
    ):
        sampler.sample(put(np.zeros((2, 50), np.float32)), rows, rows, rows)


MANY = (
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.98},
    {"top_k": 40},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"min_p": 0.02},
    {"temperature": 2.0, "top_k": 1000, "top_p": 0.8, "min_p": 0.001},
    {"temperature": 0.0},
)


def compare_many(memory: KernelMemory, rows: int, vocab_size: int, steps: int) -> None:
    """Draws of rows of different shapes and parameters, at one position after another."""
    both, rng = Both(memory, rows, vocab_size), np.random.default_rng(9)
    logits = normal(rng, rows, vocab_size) * rng.choice([0.1, 0.5, 1, 2], (rows, 1))
    logits = logits.astype(np.float32)
    for batch_row in range(rows):
        both.set_parameters(batch_row, SamplingParams(**MANY[batch_row % len(MANY)]), batch_row)
    for position in range(steps):
        both.check(logits, range(rows), [position] * rows)


def test_rows_of_all_kinds(kernel_memory: KernelMemory) -> None:
    compare_many(kernel_memory, 16, 300, 1)


def test_a_nucleus_that_lies_deep_in_the_top_k(kernel_memory: KernelMemory) -> None:
    """A row whose cut of top-k is nearer to one threshold than that of top-p to any."""
    rng = np.random.default_rng(9)
    logits = normal(rng, 1024, 4096) * rng.choice([0.1, 0.5, 1, 2], (1024, 1))
    both = Both(kernel_memory, 1, 4096)
    both.set_parameters(0, SamplingParams(temperature=2, top_k=1000, top_p=0.8, min_p=0.001), 398)
    both.check(logits[398:399].astype(np.float32), [0], [0])


@pytest.mark.gpu
@pytest.mark.slow
def test_a_million_draws() -> None:
    compare_many(open_memory("torch"), 1024, 4096, 977)


@pytest.mark.gpu
def test_a_captured_step_draws_what_its_launches_do() -> None:
    import torch

    memory, rng = open_memory("torch"), np.random.default_rng(4)
    both = Both(memory, 16, 129_280)
    for batch_row in range(16):
        both.set_parameters(batch_row, SamplingParams(**MANY[batch_row % len(MANY)]), batch_row)
    logits = memory.put(normal(rng, 16, 129_280))
    batch_rows, masks = (
        memory.put(np.arange(16, dtype=np.int32)),
        memory.put(np.full(16, -1, np.int32)),
    )
    positions = memory.put(np.zeros(16, np.int64))
    both.device.sample(logits, batch_rows, positions, masks)
    memory.sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both.device.sample(logits, batch_rows, positions, masks)
    for position in (3, 4):
        positions.fill_(position)
        graph.replay()
        replayed = memory.get(both.device.tokens)
        both.device.sample(logits, batch_rows, positions, masks)
        assert replayed.tolist() == memory.get(both.device.tokens).tolist()

"""Company, chunks, rows and hits change no logits: they are those of a prompt in one chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import ConfigError
from fd_dsa.models.registry import config_from_dict, read_config
from fd_dsa.v4_attention.pools import allocate_pools
from tests.one_order import check_equal_bits
from tests.v4_model.cases import CASES
from tests.v4_model.ours import ROWS, load_model, make_runner, prompt_logits, run_step

CASE = CASES["mixed"]
BLOCK = CASE.block_size
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model with layers of all kinds."""
    return load_model(CASE.write(tmp_path_factory.mktemp("mixed")))


def whole(model: Any, prompt: list[int]) -> np.ndarray:
    """Logits of a prompt alone, in one chunk."""
    return prompt_logits(make_runner(model, BLOCK), [prompt], len(prompt))[0]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 9))]
)
def test_random_histories(seed: int, model: Any) -> None:
    """Requests come and go in random rows; each step takes any number of tokens of each."""
    rng, runner = np.random.default_rng(seed), make_runner(model, BLOCK)
    waiting = [CASE.prompt(int(n)) for n in rng.integers(1, 100, 9)]
    wanted = [whole(model, prompt) for prompt in waiting]
    running: dict[int, tuple[int, int]] = {}
    found: list[list[np.ndarray]] = [[] for _ in waiting]
    next_one = 0
    while next_one < len(waiting) or running:
        for row in rng.permutation(ROWS).tolist():
            if row not in running and next_one < len(waiting) and rng.random() < 0.5:
                running[row] = (next_one, 0)
                next_one += 1
        parts = {}
        for row, (one, done) in running.items():
            count = int(rng.choice([0, 1, 1, 2, 5, 16, 40]))
            if ids := waiting[one][done : done + count]:
                parts[row] = (ids, done)
        if not parts:
            continue
        for row, logits in run_step(runner, parts).items():
            one, done = running.pop(row)
            found[one].append(logits)
            if done + len(logits) < len(waiting[one]):
                running[row] = (one, done + len(logits))
    for parts_found, logits in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.concatenate(parts_found), logits, **CLOSE)


@pytest.mark.parametrize("asked", [[], [39], [5, 39, 59]], ids=str)
def test_logits_of_some_tokens(asked: list[int], model: Any) -> None:
    """They are those of a step that gives all, and so are those of the step after."""
    prompts, found = [CASE.prompt(40), CASE.prompt(20)], []
    for tokens in (list(range(60)), asked):
        runner = make_runner(model, BLOCK)
        for row, prompt in enumerate(prompts):
            runner.input_batch.add_row(row, prompt, 0, is_prefill=True)
        logits = runner.execute_model(np.array(tokens, np.int64)).copy()
        found.append((logits, run_step(runner, {0: ([9], 40), 1: ([9], 20)})))
    (logits, after), (some, after_some) = found
    np.testing.assert_allclose(some, logits[asked], **CLOSE)
    for row in after:
        np.testing.assert_allclose(after_some[row], after[row], **CLOSE)


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("chunk", [3, 100])
def test_blocks_of_another_row(num_blocks: int, chunk: int, model: Any) -> None:
    """A row that takes over computed blocks goes on as the one that computed them.

    Its states are those of a request before it, which must not show.
    """
    runner, cached = make_runner(model, BLOCK), num_blocks * BLOCK
    prompt, other = CASE.prompt(70), CASE.prompt(64)
    wanted = whole(model, prompt)
    prompt_logits(runner, [prompt[:cached], other], 100)
    runner.input_batch.set_blocks(1, runner.input_batch.block_tables[0, :num_blocks])
    found = []
    for begin in range(cached, len(prompt), chunk):
        found.append(run_step(runner, {1: (prompt[begin : begin + chunk], begin)})[1])
    np.testing.assert_allclose(np.concatenate(found), wanted[cached:], **CLOSE)


# every logit of four prompts: alone in one chunk, in one batch, in chunks, one by one, after a hit
PROGRAM = """
import sys
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from pathlib import Path
import numpy as np
from fd_dsa.ops.fixed_order import check_fixed_order
from tests.v4_model.cases import CASES
from tests.v4_model.ours import load_model, make_runner, prompt_logits, run_step
check_fixed_order("cpu")
case = CASES["mixed"]
model = load_model(case.write(Path(sys.argv[1])))
prompts = [case.prompt(n) for n in (1, 17, 40, 63)]
alone = [prompt_logits(make_runner(model, 16), [p], len(p))[0] for p in prompts]
for chunk in (63, 24, 7, 1):
    found = prompt_logits(make_runner(model, 16), prompts, chunk)
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=str(chunk))
runner = make_runner(model, 16)
prompt_logits(runner, [prompts[3][:32], prompts[2]], 63)
runner.input_batch.set_blocks(1, runner.input_batch.block_tables[0, :2])
found = run_step(runner, {1: (prompts[3][32:], 32)})[1]
np.testing.assert_array_equal(found, alone[3][32:], err_msg="a hit")
print("equal")
"""


@pytest.mark.slow
def test_bits_with_one_order_of_sums(tmp_path: Path) -> None:
    check_equal_bits(PROGRAM, str(tmp_path))


def test_sizes_in_bytes(tmp_path: Path) -> None:
    """The plan's bytes are those of the arrays."""
    layout = read_config(CASE.write(tmp_path)).cache_layout("float32", BLOCK)
    for blocks, slots in ((1, 1), (7, 3)):
        pools = [
            pool
            for layer in allocate_pools(layout, blocks, slots)
            for pool in (layer.keys, layer.index_entries, layer.states, layer.records)
            if pool is not None
        ]
        held = sum(pool.nbytes for pool in pools)
        assert held == blocks * layout.bytes_per_block() + slots * layout.bytes_per_row()


def test_released_sizes() -> None:
    """Flash's entries, windows and states, float32: docs/models.md has the figures."""
    ratios = [0, 0, *([4, 128] * 20), 4]
    config = config_from_dict({"model_type": "deepseek_v4", "compress_ratios": [*ratios, 0]})
    layout = config.cache_layout("float32", 128)
    entries, windows, records = 2 * 6880 * 128, 43 * 128 * 2048, 21 * 20480
    assert layout.bytes_per_block() == entries + windows + records
    assert layout.bytes_per_row() == 21 * 80 * 1024 + 20 * 512 * 1024


@pytest.mark.parametrize("block_size", [8, 24, 100])
def test_blocks_that_do_not_fit(block_size: int, tmp_path: Path) -> None:
    config = read_config(CASE.write(tmp_path))
    with pytest.raises(ConfigError, match=f"--block-size: got {block_size}, .* multiples of 16"):
        config.cache_layout("float32", block_size)

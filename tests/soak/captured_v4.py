"""Random request histories of DeepSeek-V4 on a device: the engine changes no token.

    python -m tests.soak.captured_v4 --histories 20
    python -m tests.soak.captured_v4 --first 4711 --histories 1

A tiny model is on the test plug-in's device in host memory, where Triton interprets the kernels and
a graph is its work, run again. FD_DSA_RIG=real selects a GPU instead. Requests begin alike, and a
history has few rows, blocks and tokens a step. So chunks, prefix hits, snapshots, preemption and
aborts come in any order, with graphs or eager steps, drafts or none, and snapshots in host memory.
Each output must have the tokens of an engine that computes the request alone, from its beginning,
in eager steps.
"""

from __future__ import annotations

import gc
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.gpu_rig.session import opened

# before anything imports Paddle
RIG = opened()

from fd_dsa import LLM, SamplingParams  # noqa: E402
from fd_dsa.startup.capture import capture_graphs  # noqa: E402
from tests.gpu_rig.captures import capture_of  # noqa: E402
from tests.gpu_rig.device.test_v4_model import SMOOTH, poison_pools  # noqa: E402
from tests.soak import report  # noqa: E402
from tests.soak.captured import counts_of, play  # noqa: E402
from tests.soak.histories import Arrival  # noqa: E402
from tests.v4_model.cases import Case  # noqa: E402

CASE = Case("smooth", SMOOTH | {"num_nextn_predict_layers": 1}, seed=43)
SIZES: dict[str, Any] = {
    "block_size": CASE.block_size,
    "max_model_len": 80,
    "dtype": "float32",
    "enforce_eager": True,
    "device": RIG.device,
}
METHODS: tuple[dict[str, Any] | None, ...] = (
    None,
    None,
    {"method": "ngram", "num_speculative_tokens": 2},
    {"method": "mtp", "num_speculative_tokens": 2},
)


@dataclass(frozen=True)
class History:
    """Options of an engine, numbers of tokens of its graphs, and the requests of a history.

    Without numbers of decode tokens all steps are eager.
    """

    options: dict[str, Any]
    decode_sizes: tuple[int, ...]
    prompt_sizes: tuple[int, ...]
    arrivals: tuple[Arrival, ...]


@cache
def folder() -> str:
    """Folder of the model, which stays as long as the process."""
    made = tempfile.mkdtemp(prefix="fd-dsa-soak-")
    return str(CASE.write_served(Path(made)))


@cache
def engine_of_one() -> LLM:
    """The engine that computes each request alone."""
    # without a number of blocks it would take the whole memory of a GPU
    one: dict[str, Any] = {"max_num_seqs": 1, "num_gpu_blocks_override": 6}
    return LLM(folder(), enable_prefix_caching=False, **one, **SIZES)


@cache
def wanted(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """Tokens of a greedy request that has the engine for itself."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    [answer] = engine_of_one().generate([list(prompt)], params)
    return list(answer.outputs[0].token_ids)


def draw_history(number: int) -> History:
    """Draw the history of a number."""
    draw = random.Random(number)
    rows, method = draw.choice([2, 3, 4]), draw.choice(METHODS)
    options: dict[str, Any] = {
        "max_num_seqs": rows,
        "max_num_batched_tokens": draw.choice([12, 20, 40]),
        "num_gpu_blocks_override": 5 + draw.choice([0, 1, 4, 12]),
        "async_scheduling": draw.random() < 0.8,
        "kv_offload_bytes": draw.choice([0, 1 << 20]),
    }
    if method is not None:
        options["speculative_config"] = method
    stem = [draw.randrange(2, 90) for _ in range(50)]
    is_captured = draw.random() < 0.6
    num_drafts = 0 if method is None else method["num_speculative_tokens"]
    return History(
        options,
        decode_sizes=(rows, rows * (1 + num_drafts)) if is_captured else (),
        prompt_sizes=(draw.choice([8, 12]),) if is_captured else (),
        arrivals=tuple(_draw_arrival(draw, stem) for _ in range(6)),
    )


def _draw_arrival(draw: random.Random, stem: list[int]) -> Arrival:
    prompt = stem[: draw.choice([0, 7, 15, 16, 17, 31, 33, 40, 48])]
    prompt = prompt + [draw.randrange(2, 90) for _ in range(draw.randint(1, 6))]
    params = SamplingParams(
        temperature=0, max_tokens=draw.randint(1, 12), ignore_eos=True, n=draw.choice([1, 1, 1, 2])
    )
    at_step = draw.randint(0, 15)
    abort_at = at_step + draw.randint(1, 8) if draw.random() < 0.15 else None
    return Arrival(tuple(prompt), params, at_step, abort_at)


def run_history(history: History) -> Counter[str]:
    """Run a history.

    Returns:
        How often things happened.

    Raises:
        AssertionError: an output differs.
    """
    with LLM(folder(), **SIZES, **history.options) as llm:
        engine, runner = llm.engine, llm.engine.runner
        if history.decode_sizes:
            capture_graphs(runner, history.decode_sizes, capture_of(RIG), history.prompt_sizes)
            assert runner.graphs, "the captures were refused"
        poison_pools(runner)
        found, counts = play(engine, history.arrivals), counts_of(engine)
        # graphs must be gone before Paddle's memory
        runner.graphs = None
        del engine, runner
    gc.collect()
    for (name, _), output in found.items():
        one, tokens = history.arrivals[int(name)], output.token_ids
        whole = wanted(one.prompt, one.params.max_tokens)
        expected = whole if one.abort_at is None else whole[: len(tokens)]
        assert tokens == expected, f"request {name}: {tokens}, alone {whole}"
        counts["outputs"] += 1
    return counts


def run_histories(first: int, count: int) -> Counter[str]:
    """Run the histories `first` to `first + count - 1`. Returns how often things happened."""
    numbers = range(first, first + count)
    return report.run_numbers(
        "tests.soak.captured_v4", numbers, lambda number: run_history(draw_history(number))
    )


if __name__ == "__main__":
    report.main(__doc__, "histories", 20, run_histories)

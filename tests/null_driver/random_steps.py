"""Runs random steps of an engine of random sizes, and prints what compiles too late.

`python -m tests.null_driver.random_steps SEED [WHAT]`. WHAT is deepseek_v4, or one of
tests/models/four_bits.py for the format of the weights. The last line says how many steps ran.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks._harness import random_prompts
from benchmarks.host_time import v32
from tests.models.four_bits import FORMATS
from tests.null_driver.engine import V4, V4_FORMATS, NullDriver, open_engine, replace

STEPS = 120
# tokens that a prompt may have; the longest one is cut into chunks in most engines
LONGEST_PROMPT = 12_000


class Printer(logging.Handler):
    """Prints log lines: launches that have to compile, and the least divided step."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        print(record.getMessage())


def engine_sizes(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw fields of config.json, and of EngineConfig."""
    model = v32(layers=3, dense=1, experts=draw.choice((16, 128, 256)))
    ranks = draw.choice((1, 1, 2, 4, 8))
    config: dict[str, Any] = {
        "kv_cache_dtype": draw.choice(("fp8", "auto")),
        "max_model_len": draw.choice((300, 3000, 33_024)),
        "max_num_seqs": draw.choice((1, 3, 8, 64, 256)),
        "max_num_batched_tokens": draw.choice((64, 100, 576, 2048, 8192)),
        "kv_cache_memory_bytes": "8G",
        "enforce_eager": True,
        "tensor_parallel_size": ranks,
    }
    if draw.random() < 0.4:
        del model["quantization_config"]
    if ranks == 1 and draw.random() < 0.4:
        model["num_nextn_predict_layers"] = 1
        drafts = {"method": "mtp", "num_speculative_tokens": draw.choice((1, 3))}
        config["speculative_config"] = drafts
    if draw.random() < 0.3:
        config["target_inter_token_latency_ms"] = 50.0
    return model, config


def v4_sizes(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw the same for DeepSeek-V4."""
    config: dict[str, Any] = {
        "max_model_len": draw.choice((300, 3000, 8192)),
        "max_num_seqs": draw.choice((1, 3, 8, 64)),
        "max_num_batched_tokens": draw.choice((64, 100, 576, 2048, 8192)),
        "kv_cache_memory_bytes": "2G",
        "enforce_eager": True,
        "tensor_parallel_size": draw.choice((1, 2, 8)),
    }
    model = V4
    if draw.random() < 0.5:
        model = V4 | {"num_nextn_predict_layers": 1}
        drafts = {"method": "mtp", "num_speculative_tokens": draw.choice((1, 3))}
        config["speculative_config"] = drafts
    if draw.random() < 0.6:
        model = model | V4_FORMATS
    config["kv_cache_dtype"] = draw.choice(("fp8", "auto"))
    return model, config


def run_steps(engine: Any, draw: random.Random, longest: int) -> int:
    """Add random requests and run steps. Returns the number of steps."""
    from fd_dsa import SamplingParams

    steps = added = 0
    while steps < STEPS:
        for _ in range(draw.choice((0, 0, 1, 1, 2, 9))):
            # as many short prompts as long ones, by their magnitude
            tokens = min(int(LONGEST_PROMPT ** draw.random()), longest - 2)
            params = SamplingParams(
                temperature=draw.choice((0, 1)),
                max_tokens=min(draw.choice((1, 2, 5, 40)), longest - tokens),
                ignore_eos=True,
                logprobs=draw.choice((None, None, 3)),
                top_k=draw.choice((0, 5)),
                presence_penalty=draw.choice((0, 0.5)),
            )
            [ids] = random_prompts(1, tokens, 100_000, seed=added)
            engine.add_request(str(added), ids, params)
            added += 1
        if engine.has_unfinished_requests():
            engine.step()
            steps += 1
    return steps


def main() -> None:
    """Run the steps of one seed."""
    draw, what = random.Random(int(sys.argv[1])), "".join(sys.argv[2:])
    model, config = (v4_sizes if what == "deepseek_v4" else engine_sizes)(draw)
    if what in FORMATS:
        model["quantization_config"] = FORMATS[what].fields
    print(config)
    driver = NullDriver(config["tensor_parallel_size"])
    # tests have one processor each
    replace(import_module("fd_dsa.startup.warm_up"), "usable_cpus", lambda: 2)
    logging.getLogger("fd_dsa.triton_runtime").addHandler(Printer(logging.WARNING))
    logging.getLogger("fd_dsa.attention.head_exchange").addHandler(Printer(logging.INFO))
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(driver, model, Path(folder), **config)
    launches = driver.ordered.values()
    print(
        f"{len(launches)} kernels compiled by processes, others: {driver.unforeseen}, "
        f"{max(launches) - min(launches)} launches meanwhile"
    )
    steps = run_steps(engine, draw, config["max_model_len"])
    print(f"{steps} steps, {engine.metrics.steps.late_compilations} late compilations")


if __name__ == "__main__":
    main()

"""Decode steps of the embedded engine on Paddle tensors in CUDA memory: eager, and from graphs.

    python -m tests.gpu_rig.decode_steps --out DIR          # on a GPU; writes DIR/decode_steps.json

The demo model with fp8_ds_mla caches in two engines of this process. Both must give the same greedy
tokens; then steps of 1, 8 and 32 rows of short and long contexts take turns. A step is timed on the
host's clock, from scheduling to its tokens: it waits for the device once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import environment, percentiles, random_prompts, write_json
from tests.demo.samples import LEADING_PROMPTS, SHORT_PROMPTS
from tests.gpu_rig.rig import Rig, load

EAGER, GRAPH = "eager", "graph"
ROWS, CONTEXTS = (1, 8, 32), (128, 1024)
MAX_TOKENS, ROUNDS = 64, 3
# the first steps of rows make views that the others find
_DROPPED_STEPS = 4


def open_engine(rig: Rig, way: str, sizes: tuple[int, ...], max_model_len: int) -> Any:
    """The demo model in an engine whose decode steps are eager, or graphs of these sizes."""
    from fd_dsa import LLM
    from fd_dsa.startup.capture import capture_graphs
    from tests.gpu_rig.captures import stand_in

    options: dict[str, Any] = {"cudagraph_capture_sizes": sizes} if way == GRAPH else {}
    llm = LLM(
        device=rig.device,
        kv_cache_dtype="fp8_ds_mla",
        max_num_seqs=max(sizes),
        max_model_len=max_model_len,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=max(sizes) * -(-max_model_len // 64),
        enable_prefix_caching=False,
        enforce_eager=way == EAGER or not rig.is_real,
        **(options if rig.is_real else {}),
    )
    runner = llm.engine.runner
    if way == GRAPH and not rig.is_real:
        capture_graphs(runner, sizes, stand_in)
    if way == GRAPH and runner.captured_sizes != sizes:
        raise RuntimeError("decode steps were not captured; the log says why")
    return llm


def greedy(llm: Any, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    from fd_dsa import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [out.token_ids for out in llm.generate(prompts, params)]


def timed_steps(rig: Rig, llm: Any, rows: int, context: int, steps: int) -> dict[str, Any]:
    """Times of decode steps of so many rows that have about `context` tokens.

    Returns:
        `step_us` and, of them, `runner_us` of each step; `counted`, what the plug-in counted in
        one more.
    """
    from fd_dsa import SamplingParams

    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    names = [f"row {number}" for number in range(rows)]
    prompts = random_prompts(rows, context, engine.runner.vocab_size, seed=rows)
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, params)
    started: set[str] = set()
    while len(started) < rows:
        started.update(output.request_id for output in engine.step())
    whole, inside = [], []
    for _ in range(_DROPPED_STEPS + steps):
        before, begin = engine.stats().runner_time_s, time.perf_counter()
        engine.step()
        whole.append((time.perf_counter() - begin) * 1e6)
        inside.append((engine.stats().runner_time_s - before) * 1e6)
    with rig.counting() as counted:
        engine.step()
    for name in names:
        engine.abort_request(name)
    times = {"step_us": whole[_DROPPED_STEPS:], "runner_us": inside[_DROPPED_STEPS:]}
    return times | {"counted": counted.delta}


def case_of(rig: Rig, llms: dict[str, Any], rows: int, context: int, steps: int) -> dict[str, Any]:
    """One case, both ways in turn."""
    samples: dict[str, list[dict[str, Any]]] = {way: [] for way in llms}
    for way in list(llms) * ROUNDS:
        samples[way].append(timed_steps(rig, llms[way], rows, context, steps))

    def merged(key: str) -> dict[str, dict[str, float]]:
        return {
            way: percentiles([us for part in parts for us in part[key]])
            for way, parts in samples.items()
        }

    times = merged("step_us")
    return {
        "case": f"{rows} x {context}",
        "tier": "T1p",
        "rows": rows,
        "context": context,
        "times": times,
        "runner": merged("runner_us"),
        "counted": {way: parts[-1]["counted"] for way, parts in samples.items()},
        "ours": GRAPH,
        "ratios": {EAGER: times[EAGER]["p50"] / times[GRAPH]["p50"]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and time both ways; 0 if they give the same tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of decode_steps.json")
    parser.add_argument("--form", default="real", help="real, fake or guard")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32, help="timed steps of each of three rounds")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="that are compared")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rig = load(args.form)
    if rig.is_real:
        from custom_ops.build_library import build_library
        from fd_dsa import custom_ops

        custom_ops.use_library(build_library())
    prompts = LEADING_PROMPTS if rig.is_real else SHORT_PROMPTS
    sizes = tuple(sorted({*args.rows, len(prompts)}))
    llms = {way: open_engine(rig, way, sizes, args.max_model_len) for way in (EAGER, GRAPH)}
    eager, graph = (greedy(llm, prompts, args.max_tokens) for llm in llms.values())
    result: dict[str, Any] = {
        "name": "decode_steps",
        "env": environment() | {"tier": "T1p", "form": args.form},
        "gate": "passed" if eager == graph else "failed",
        "cases": [],
    }
    for rows in args.rows:
        for context in args.contexts:
            result["cases"].append(case_of(rig, llms, rows, context, args.steps))
            write_json(args.out / "decode_steps.json", result)
    for llm in llms.values():
        # graphs go before the process does
        llm.engine.runner.graphs = None
        llm.close()
    return int(eager != graph)


if __name__ == "__main__":
    sys.exit(main())

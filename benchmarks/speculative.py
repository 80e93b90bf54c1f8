"""Tokens per second with and without drafts, in turns.

    python -m benchmarks.speculative                        # on a CPU; about 15 minutes
    python -m benchmarks.speculative --model DIR --rounds 2 # a folder without an MTP layer: ngram
    python -m benchmarks.speculative --rig --out DIR        # a GPU through the test plug-in: P20
    python -m benchmarks.speculative --acceptance           # of the demo model's card, by task

Chat prompts, copies and random tokens come one request at a time, then 32 together. On a CPU all
engines are in this process and take turns. On a GPU each engine in turn has the process, twice,
because a host may be slow for a minute. The adaptive rule chooses the number of drafts. Prints
ratio and accepted share for each case and method, and the number of outputs that differ. Only
rounding may cause these. Writes benchmarks/results/speculative.json, on a GPU
speculative_demo.json. `--acceptance` times and writes no result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks._harness import (
    ROOT,
    environment,
    in_turns,
    out_parser,
    random_prompts,
    write_result,
)
from benchmarks.workers.gpu_engine import open_device
from fd_dsa import LLM, SamplingParams
from fd_dsa.accuracy.prompts import read_prompts
from fd_dsa.config import EngineConfig
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.models.registry import read_config

EVALUATION = ROOT / "tools/demo_training/demo_eval.jsonl"
ANIMALS = ("fox", "bear", "cat", "dog", "mouse", "bird", "frog")
LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
TOGETHER = 32


def chats(groups: Sequence[str], count: int) -> list[list[dict[str, str]]]:
    """Return the first `count` conversations of each group of the demo model's evaluation."""
    lines = EVALUATION.read_text("utf-8").splitlines()
    items = [item for item in map(json.loads, lines) if item["kind"] == "chat"]
    return [
        item["messages"]
        for group in groups
        for item in [one for one in items if one["group"] == group][:count]
    ]


def cases(llm: LLM, count: int) -> dict[str, tuple[list[list[int]], bool, SamplingParams]]:
    """Return the prompts of each case, True if they come together, and their parameters."""
    greedy = SamplingParams(temperature=0, max_tokens=96)
    drawn = SamplingParams(temperature=1, max_tokens=96, seed=0)
    encode = llm.tokenizer.apply_chat_template
    chat = [encode(one, True) for one in chats(("instruction", "assignment"), count // 2)]
    copies = [encode(one, True) for one in chats(("copying",), min(count, 25))]
    random = random_prompts(min(count, 8), 64, 4096, 0)
    endless = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)
    return {
        "chat, greedy": (chat, False, greedy),
        "chat, temperature 1": (chat, False, drawn),
        "copies, greedy": (copies, False, greedy),
        "random tokens, greedy": (random, False, endless),
        f"chat, {min(count, TOGETHER)} at once": (chat[:TOGETHER], True, greedy),
    }


def answered(
    llm: LLM, prompts: list[list[int]], at_once: bool, params: SamplingParams
) -> dict[str, Any]:
    """Run prompts. Returns tokens per second, drafts, accepted drafts and tokens."""
    begin, before = time.perf_counter(), llm.stats()
    outputs = []
    for part in [prompts] if at_once else [[prompt] for prompt in prompts]:
        outputs += llm.generate(part, params)
    for output in outputs:
        if output.error is not None:
            raise output.error
    now = llm.stats()
    tokens = [output.token_ids for output in outputs]
    return {
        "tokens_per_s": sum(map(len, tokens)) / (time.perf_counter() - begin),
        "drafts": now.num_draft_tokens - before.num_draft_tokens,
        "accepted": now.num_accepted_tokens - before.num_accepted_tokens,
        "tokens": tokens,
    }


Runs = Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]
"""Each case, and what `answered` gave for each method."""


def by_turns(args: argparse.Namespace, methods: dict[str, Any], common: dict[str, Any]) -> Runs:
    """Yield the runs of each case, by engines in one process that take turns."""
    engines = {
        method: LLM(args.model, speculative_config=given, **common)
        for method, given in methods.items()
    }
    for case, asked in cases(engines["none"], args.prompts).items():
        calls: dict[str, Callable[..., Any]] = {
            method: partial(answered, llm, *asked) for method, llm in engines.items()
        }
        in_turns(calls, 1)
        yield case, in_turns(calls, args.rounds)


def one_by_one(args: argparse.Namespace, methods: dict[str, Any], common: dict[str, Any]) -> Runs:
    """Measure each engine in turn, twice, with half of the rounds each time."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    half = -(-args.rounds // 2)
    for method, given in [*methods.items()] * 2:
        with LLM(args.model, speculative_config=given, **common) as llm:
            for case, asked in cases(llm, args.prompts).items():
                answered(llm, *asked)
                runs = [answered(llm, *asked) for _ in range(half)]
                found.setdefault(case, {}).setdefault(method, []).extend(runs)
    yield from found.items()


def measured(case: str, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of a case: each method, compared with the runs without drafts."""
    plain, rows = runs.pop("none"), []
    for method, found in runs.items():
        pairs = zip(found, plain, strict=True)
        ratios = [one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs]
        drafts, accepted = found[-1]["drafts"], found[-1]["accepted"]
        differ = sum(a != b for a, b in zip(found[-1]["tokens"], plain[-1]["tokens"], strict=True))
        row = {
            "case": case,
            "method": method,
            "ratio_p50": float(np.median(ratios)),
            "ratio_spread": [min(ratios), max(ratios)],
            "tokens_per_s_without": float(np.median([one["tokens_per_s"] for one in plain])),
            "drafts": drafts,
            "accepted_share": accepted / drafts if drafts else None,
            "outputs": len(plain[-1]["tokens"]),
            "outputs_that_differ": differ,
        }
        rows.append(row)
        share = f"{100 * accepted / drafts:.0f} % of {drafts}" if drafts else "no"
        print(
            f"{case:22} {method:8} {row['ratio_p50']:.2f} times, {share} drafts accepted, "
            f"{differ} of {row['outputs']} outputs differ",
            flush=True,
        )
    return rows


def tasks(count: int) -> dict[str, list[list[dict[str, str]]]]:
    """Return conversations of the tasks whose acceptance the demo model's card has."""
    sys.path.insert(0, str(ROOT / "tools"))
    from demo_training.evalset import read

    needles = [one for one in read(EVALUATION)[0] if one["length"] == 1024]
    texts = {
        "stories": [f"Tell me a story about a {a} and a {b}." for a, b in combinations(ANIMALS, 2)],
        "IFEval's prompts": [prompt.text for prompt in read_prompts()],
        "retrieval, 1,024 tokens": [one["prompt"] for one in needles],
    }
    return {"chats": chats(("instruction", "assignment"), count // 2)} | {
        task: [[{"role": "user", "content": text}] for text in asked[:count]]
        for task, asked in texts.items()
    }


def print_acceptance(count: int) -> None:
    """Print shares of accepted drafts, by task and maximum number of drafts."""
    for most in (1, 2, 3):
        with LLM(speculative_config={"method": "mtp", "num_speculative_tokens": most}) as llm:
            spec_decoder: Any = llm.engine.spec_decoder
            # as if drafts cost the same on every machine
            spec_decoder.costs = DraftCosts({1: [1 + n / 10 for n in range(most + 1)]})
            for task, asked in tasks(count).items():
                prompts = [llm.tokenizer.apply_chat_template(one, True) for one in asked]
                for temperature in (0, 1):
                    params = SamplingParams(temperature=temperature, max_tokens=96, seed=0)
                    found = answered(llm, prompts, False, params)
                    share = 100 * found["accepted"] / found["drafts"]
                    print(f"{task:24} temperature {temperature}, {most} at most: {share:.0f} %")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns 0."""
    parser = out_parser(__doc__)
    parser.add_argument("--model", help="folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=40, help="of chats (default: 40)")
    parser.add_argument("--rig", action="store_true", help="a GPU through the test plug-in")
    parser.add_argument("--acceptance", action="store_true", help="by task, on a CPU")
    args = parser.parse_args(argv)
    if args.acceptance:
        print_acceptance(args.prompts)
        return 0
    device, name, tier = "cpu", "speculative", "T0"
    if args.rig:
        device, name, tier = open_device(True, "gpu"), "speculative_demo", "T1p"
    methods: dict[str, Any] = {"none": "none"}
    methods["ngram 3"] = {"method": "ngram", "num_speculative_tokens": 3, **LOOKUP}
    folder = EngineConfig(model=args.model).model_path
    if read_config(folder).num_nextn_predict_layers:
        for most in (1, 2, 3):
            methods[f"mtp {most}"] = {"method": "mtp", "num_speculative_tokens": most}
    common = {"device": device, "max_model_len": 1024, "max_num_seqs": TOGETHER}
    # each run computes its prompts
    common |= {"enable_prefix_caching": False, "kv_cache_memory_bytes": "256M"}
    measure = one_by_one if args.rig else by_turns
    rows = [row for case, runs in measure(args, methods, common) for row in measured(case, runs)]
    result = {"name": name, "tier": tier, "env": environment(), "model": folder.name}
    write_result(args.out, result | {"rounds": args.rounds, "cases": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

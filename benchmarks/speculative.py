"""Speculative decoding: tokens per second with drafts over those without, in turns.

    python -m benchmarks.speculative                        # on a CPU; about 15 minutes
    python -m benchmarks.speculative --model DIR --rounds 2 # a folder without an MTP layer: ngram
    python -m benchmarks.speculative --rig --out DIR        # a GPU through the test plug-in: P20
    python -m benchmarks.speculative --acceptance           # of the demo model's card, by task

Chat prompts, copies and random tokens come one request at a time, then 32 at once. On a CPU all
engines are in this process and take turns; on a GPU each has the process for itself, one after
another, twice, since a host may be slow for a minute. The number of drafts is that of the adaptive
rule. Prints for each case and method the ratio and the accepted share, and counts outputs that
differ from those without drafts, which rounding alone may cause. Writes
benchmarks/results/speculative.json, on a GPU speculative_demo.json. `--acceptance` times nothing
and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, ROOT, environment, in_turns, random_prompts, write_json
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
    """The first conversations of some groups of the demo model's evaluation, `count` of each."""
    lines = EVALUATION.read_text("utf-8").splitlines()
    items = [item for item in map(json.loads, lines) if item["kind"] == "chat"]
    return [
        item["messages"]
        for group in groups
        for item in [one for one in items if one["group"] == group][:count]
    ]


def cases(llm: LLM, count: int) -> dict[str, tuple[list[list[int]], bool, SamplingParams]]:
    """Prompts of each case, whether they come at once, and how they are answered."""
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
    """Seconds, tokens, drafts and accepted ones of one run."""
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
    """All engines at once, which take turns."""
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
    """One engine after another, twice: each has half of the rounds at another time."""
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
    """What each method gave in a case, beside the runs without drafts."""
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
    """Conversations of the tasks whose acceptance the demo model's card has."""
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
    """Shares of drafts that were accepted, by task and most drafts of a step."""
    for most in (1, 2, 3):
        with LLM(speculative_config={"method": "mtp", "num_speculative_tokens": most}) as llm:
            speculator: Any = llm.engine.speculator
            # as if drafts cost the same on every machine
            speculator.costs = DraftCosts({1: [1 + n / 10 for n in range(most + 1)]})
            for task, asked in tasks(count).items():
                prompts = [llm.tokenizer.apply_chat_template(one, True) for one in asked]
                for temperature in (0, 1):
                    params = SamplingParams(temperature=temperature, max_tokens=96, seed=0)
                    found = answered(llm, prompts, False, params)
                    share = 100 * found["accepted"] / found["drafts"]
                    print(f"{task:24} temperature {temperature}, {most} at most: {share:.0f} %")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=40, help="of chats (default: 40)")
    parser.add_argument("--rig", action="store_true", help="a GPU through the test plug-in")
    parser.add_argument("--acceptance", action="store_true", help="by task, on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
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
    write_json(args.out / f"{name}.json", result | {"rounds": args.rounds, "cases": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

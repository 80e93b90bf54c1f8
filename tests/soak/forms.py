"""Memory and time of compiled forms: hostile ones, each followed by random outputs.

    python -m tests.soak.forms --tokens 2000

Outputs of one form share the states of its lexer, so a form that is in use grows until these come
to their limit.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.config import demo_model_path
from fd_dsa.engine.grammar import GrammarCompiler, GrammarMatcher
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from tests.soak.fuzz import held_mib
from tests.soak.hostile import GRAMMARS, REGEXES, SCHEMAS

MAX_USED_MIB = 100
# states of these grow with every token, or with every step of an output
GREEDY = (
    "(a|b)*a(a|b){20}x",
    "(?s:.{1000,10000})",
    "(.*[aeiou].{15})+x",
    "(\\w{1,20}\\W{1,20}){1,300}",
    "|".join(f"(.*{chr(97 + i)}.{{{8 + i}}})" for i in range(20)),
)


@dataclass(frozen=True)
class Cost:
    """What one form took: most MiB while it was compiled and used, and seconds of one mask."""

    form: str
    used_mib: int
    slowest_mask_s: float


def forms() -> Iterator[StructuredOutputsParams]:
    """Those of the hostile requests that are forms at all, and greedy ones."""
    fields: list[dict[str, Any]] = [{"regex": text} for text in (*REGEXES, *GREEDY)]
    fields += [{"grammar": text} for text in GRAMMARS]
    fields += [{"json": schema} for schema in SCHEMAS]
    for one in fields:
        try:
            yield StructuredOutputsParams(**one)
        except ValueError:
            continue


def measure(
    compiler: GrammarCompiler, form: StructuredOutputsParams, num_tokens: int
) -> Cost | None:
    """What a form takes when so many tokens of outputs have followed it; None: it is refused."""
    before = held_mib()
    Path("/proc/self/clear_refs").write_text("5")
    try:
        compiler.check(form)
    except ValueError:
        return None
    slowest, draw = 0.0, random.Random(0)
    while num_tokens > 0:
        taken, seconds = _follow(compiler, form, num_tokens, draw)
        num_tokens -= max(taken, 1)
        slowest = max(slowest, seconds)
    compiler._recent.clear()
    return Cost(str(form.definition())[:60], _peak_mib() - before, slowest)


def _follow(
    compiler: GrammarCompiler, form: StructuredOutputsParams, most: int, draw: random.Random
) -> tuple[int, float]:
    """One random output; its tokens, and the seconds of the slowest mask."""
    matcher = GrammarMatcher(compiler, form)
    mask = np.zeros(-(-compiler._vocab_size // 32), np.int32)
    slowest = 0.0
    for taken in range(most):
        begin = time.perf_counter()
        matcher.fill_bitmask(mask)
        slowest = max(slowest, time.perf_counter() - begin)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(allowed) or matcher.accept(int(draw.choice(allowed))):
            return taken, slowest
    return most, slowest


def _peak_mib() -> int:
    """The most memory that this process has had since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def run(num_tokens: int) -> list[Cost]:
    """All forms, the largest first.

    Raises:
        AssertionError: one holds more than it may.
    """
    tokenizer = Tokenizer.from_folder(demo_model_path())
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, eos)
    compiler.check(StructuredOutputsParams(regex="warm"))
    found = [measure(compiler, form, num_tokens) for form in forms()]
    costs = sorted((cost for cost in found if cost), key=lambda cost: -cost.used_mib)
    assert costs[0].used_mib < MAX_USED_MIB, costs[0]
    return costs


def main() -> None:
    """Run what the command line asks for and print the most expensive forms."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2000, help="of outputs, for each form")
    costs = run(parser.parse_args().tokens)
    print(f"{len(costs)} forms that are served; those that need the most:")
    for cost in costs[:8]:
        mask_ms = 1000 * cost.slowest_mask_s
        print(f"  {cost.used_mib:3d} MiB, one mask {mask_ms:3.0f} ms: {cost.form}")


if __name__ == "__main__":
    main()

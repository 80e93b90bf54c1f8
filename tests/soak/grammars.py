"""Random schemas, grammars, regular expressions and lists of tools, each with bounds on its cost.

    python -m tests.soak.grammars --cases 10000      # about 20 minutes on two cores

A case is compiled, then two outputs follow it for some tokens, as an engine's step would. It may be
refused. Ends with an AssertionError that has the smallest case if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa.chat.grammar import CALL_FORMS, forced_calls_grammar
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.grammar_process import processor_time
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.grammars.messages import COMPILE_S, GAIN_S, TOKENS_S
from tests import proc
from tests.engine.byte_model import EOS, TOKENIZER, VOCAB_SIZE

# processor time of this process and of the worker, seconds
MAX_S = 2.0
# memory that a worker does not share with others
MAX_WORKER_MIB = 200
NUM_OUTPUTS, NUM_TOKENS = 2, 8
# errors of a limit have its value
LIMIT = re.compile(r"more than [\d.]+ s of|more than [\d,]+ steps|\(limit \d+|at most [\d,]+ ")

NAMES = st.sampled_from(["a", "b", "c", "$ref", "ä b", '"', "type"])
LETTERS = st.sampled_from(["a", "b", "0", " ", "é", ".", "\\d", "\\w", "[a-c]", "[^b]", "\\p{L}"])
COUNTS = st.sampled_from([0, 1, 2, 3, 7, 50, 999, 100_000])


def repeated(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """An expression with a quantifier."""
    bounds = st.tuples(COUNTS, COUNTS).map(sorted).map(lambda b: f"{{{b[0]},{b[1]}}}")
    return st.tuples(inner, st.sampled_from(["*", "+", "?"]) | bounds).map(
        lambda p: f"({p[0]}){p[1]}"
    )


REGEXES = st.recursive(
    LETTERS,
    lambda inner: (
        repeated(inner)
        | st.lists(inner, min_size=1, max_size=4).map("".join)
        | st.lists(inner, min_size=1, max_size=4).map(lambda parts: f"({'|'.join(parts)})")
    ),
    max_leaves=25,
)
RULES = ("start", "a", "b", "c")
LARK_ITEMS = st.recursive(
    st.sampled_from([*RULES, "T", "U", '"x"', '"(" ', '""', "/[a-z ]/", "/(?s:.)/", "/a*b/"]),
    lambda inner: (
        repeated(inner).filter(lambda text: "100000" not in text)
        | st.lists(inner, min_size=1, max_size=4).map(lambda parts: f"({' | '.join(parts)})")
        | st.lists(inner, min_size=1, max_size=4).map(" ".join)
    ),
    max_leaves=12,
)
TERMINALS = st.lists(
    st.tuples(st.sampled_from(["", "~"]), REGEXES.filter(lambda text: "/" not in text)).map(
        lambda pair: f"{pair[0]}/{pair[1]}/"
    ),
    min_size=1,
    max_size=4,
).map(" & ".join)
LARK = st.fixed_dictionaries(
    {name: st.lists(LARK_ITEMS | st.just(""), min_size=1, max_size=4) for name in RULES}
    | {name: st.lists(TERMINALS, min_size=1, max_size=1) for name in "TU"}
).map(lambda rules: "\n".join(f"{name}: {' | '.join(parts)}" for name, parts in rules.items()))
LEAVES = st.sampled_from(
    [
        {},
        True,
        {"type": "string"},
        {"type": "string", "format": "uri"},
        {"type": "integer", "minimum": -5, "maximum": 10**18},
        {"type": "integer", "multipleOf": 99_991},
        {"type": "number", "exclusiveMinimum": 0.1},
        {"enum": ["a", 1, None, {"b": []}]},
        {"const": "x"},
        {"$ref": "#"},
        {"$ref": "#/$defs/d"},
        {"$ref": "#/nowhere"},
    ]
) | st.builds(
    lambda pattern, most: {"type": "string", "pattern": pattern, "maxLength": most}, REGEXES, COUNTS
)


def schemas_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas with other schemas inside."""
    several = st.lists(inner, min_size=1, max_size=4)
    properties = st.dictionaries(NAMES, inner, max_size=4)
    return (
        st.builds(
            lambda name, parts: {name: parts}, st.sampled_from(["anyOf", "allOf", "oneOf"]), several
        )
        | st.builds(
            lambda items, least, most: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": most,
            },
            inner,
            COUNTS,
            COUNTS,
        )
        | st.builds(
            lambda known, required, others, patterns: {
                "type": "object",
                "properties": known,
                "required": required,
                "additionalProperties": others,
                **({"patternProperties": patterns} if patterns else {}),
            },
            properties,
            st.lists(NAMES, max_size=3, unique=True),
            inner,
            st.dictionaries(REGEXES, inner, max_size=1),
        )
    )


SCHEMAS = st.builds(
    lambda schema, definition: (
        {**schema, "$defs": {"d": definition}} if isinstance(schema, dict) else schema
    ),
    st.recursive(LEAVES, schemas_of, max_leaves=12),
    st.recursive(LEAVES, schemas_of, max_leaves=4),
)
ARGUMENTS = SCHEMAS | st.builds(
    lambda properties, required: {
        "type": "object",
        "properties": properties,
        "required": required,
    },
    st.dictionaries(NAMES, LEAVES | SCHEMAS, max_size=4),
    st.lists(NAMES, max_size=3, unique=True),
)
TOOLS = st.tuples(
    st.sampled_from(sorted(CALL_FORMS)),
    st.dictionaries(st.sampled_from(["f", "g", "get_x", "h-1"]), ARGUMENTS, min_size=1, max_size=3),
    st.booleans(),
)
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "schema": SCHEMAS,
    "lark": LARK,
    "regex": REGEXES,
    "tools": TOOLS,
}


def form_of_case(kind: str, case: Any) -> StructuredOutputsParams:
    """Form of an output.

    Raises:
        ValueError: the case is refused.
    """
    if kind == "schema":
        return StructuredOutputsParams(json=json.dumps(case))
    if kind == "regex":
        return StructuredOutputsParams(regex=case)
    if kind == "lark":
        return StructuredOutputsParams(grammar=case)
    tool_format, schemas, several = case
    text = forced_calls_grammar(tool_format, schemas, several=several)
    return StructuredOutputsParams(grammar=text)


def worker_s(pid: int) -> float:
    """Processor time of a worker, seconds; if it has ended, the time that it may have taken."""
    return processor_time(pid) or COMPILE_S + TOKENS_S + NUM_OUTPUTS * NUM_TOKENS * GAIN_S


def worker_mib(pid: int) -> float:
    """Memory of a worker that is its own, MiB; 0 if it has ended."""
    lines = proc.read(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def try_case(kind: str, case: Any, compiler: GrammarCompiler) -> str:
    """Compile a case and follow it; returns how it ended.

    Raises:
        AssertionError: it takes too much time or memory, or an error does not say why.
    """
    begin_s = time.process_time()
    try:
        params = SamplingParams(structured_outputs=form_of_case(kind, case))
        compiled = compiler.find(params)
    except ValueError as error:
        took_s, end = time.process_time() - begin_s + COMPILE_S, end_of_error(str(error), case)
    else:
        end = follow(compiler, params, case)
        pid = compiled.process.pid
        took_s = time.process_time() - begin_s + worker_s(pid)
        used_mib = worker_mib(pid)
        assert used_mib < MAX_WORKER_MIB, f"{used_mib:.0f} MiB: {case}"
    assert took_s < MAX_S, f"{took_s:.1f} s: {case}"
    return end


def end_of_error(error: str, case: Any) -> str:
    """Check an error, and return if a limit is its reason."""
    assert error.strip() and "\n" not in error, case
    names_limit = LIMIT.search(error) is not None
    assert names_limit or "the grammar is too complex" not in error, error
    return "over a limit" if names_limit else "refused"


def follow(compiler: GrammarCompiler, params: SamplingParams, case: Any) -> str:
    """Have outputs take random tokens that their grammar allows; returns how they ended."""
    rng, end = np.random.default_rng(0), "followed"
    matchers = [GrammarMatcher(compiler, params) for _ in range(NUM_OUTPUTS)]
    for _ in range(NUM_TOKENS):
        for matcher in matchers:
            if matcher.is_finished:
                continue
            if matcher.error is not None:
                end = end_of_error(matcher.error, case)
                continue
            mask = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
            matcher.fill_bitmask(mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
            # the grammar is followed, or it has an end or an error
            if bits.any():
                matcher.accept(int(rng.choice(np.flatnonzero(bits))))
    return end


def fuzz(kind: str, count: int, compiler: GrammarCompiler | None = None) -> Counter[str]:
    """Try so many cases of a kind; returns how many ended in which way."""
    compiler = compiler or GrammarCompiler(TOKENIZER, VOCAB_SIZE, [EOS])
    ends: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind])
    def one(case: Any) -> None:
        ends[try_case(kind, case, compiler)] += 1

    one()
    return ends


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="default: 10000")
    args = parser.parse_args(argv)
    for kind in KINDS:
        begin = time.monotonic()
        ends = fuzz(kind, args.cases // len(KINDS))
        print(f"{kind}: {dict(ends)} in {time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

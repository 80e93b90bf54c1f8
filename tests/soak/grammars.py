"""Random schemas, grammars, regular expressions and lists of tools, each with bounds on its cost.

    python -m tests.soak.grammars --cases 10000      # ten minutes on two cores

A case is compiled, then two outputs follow it for some tokens, as an engine's step would. It may be
refused. Ends with an AssertionError that has the smallest case if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa.chat.grammar import _FORMS, forced_calls_grammar
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.grammars.messages import MEMORY_MIB
from tests.engine.byte_model import EOS, TOKENIZER, VOCAB_SIZE

# processor time of the engine's process for a case: parsing and writing its grammar, and messages
MOST_S = 1.0
# memory that a worker shares with others is no growth of its own
MOST_WORKER_MIB = MEMORY_MIB
NUM_TOKENS = 12

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
    st.sampled_from(sorted(_FORMS)),
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


@contextmanager
def bounded(case: Any) -> Iterator[None]:
    """AssertionError if the block takes too much processor time of this process."""
    begin = time.process_time()
    yield
    took_s = time.process_time() - begin
    assert took_s < MOST_S, f"{took_s:.1f} s: {case}"


def worker_mib(pid: int) -> float:
    """Memory of a worker that is its own, MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def try_case(kind: str, case: Any, compiler: GrammarCompiler) -> str:
    """Compile a case and follow it; returns how it ended."""
    with bounded(case):
        try:
            params = SamplingParams(structured_outputs=form_of_case(kind, case))
            compiled = compiler.find(params)
        except ValueError as error:
            assert str(error).strip(), case
            return "too complex" if "too complex" in str(error) else "refused"
        rng = np.random.default_rng(0)
        matchers = [GrammarMatcher(compiler, params) for _ in range(2)]
        end = "followed"
        for _ in range(NUM_TOKENS):
            for matcher in matchers:
                if matcher.is_finished or matcher.error is not None:
                    end = "failed" if matcher.error is not None else end
                    continue
                mask = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
                matcher.fill_bitmask(mask)
                bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
                # the grammar is followed, or it has an end or an error
                if bits.any():
                    matcher.accept(int(rng.choice(np.flatnonzero(bits))))
        assert worker_mib(compiled.process.pid) < MOST_WORKER_MIB, case
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

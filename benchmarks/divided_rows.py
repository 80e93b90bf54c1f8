"""Prompts after long contexts: work divided among ranks by tokens, and not divided.

    python -m benchmarks.divided_rows --rig -tp 4     # on the test plug-in: P42
    python -m benchmarks.divided_rows --rig -tp 4 --layers 8 --tokens 8192 2048 512 256
    python -m benchmarks.divided_rows --rig -tp 4 --attention --contexts 2048 61440
    python -m benchmarks.divided_rows --rig -tp 4 --attention --tokens 4096 2048 1024
    python -m benchmarks.divided_rows --rig -tp 2 --v4    # DeepSeek-V4 of v4_gpu
    python -m benchmarks.divided_rows --dry -tp 2     # small widths on the CPU: shows that it runs

A step of N tokens follows a cached context. An engine divides steps of at least N tokens past
`index_topk`, so a step of N - 1 tokens is whole on every rank. Both run in turns, in one engine and
in each context. The model has the shape of DeepSeek-V3.2-REAP-345B in FP8. A context is at least
`index_topk` long, so all tokens of a step are scored.

The division is that of the indexer's rows. With --attention it is that of the attention by tokens
instead of heads. The indexer's rows are then divided in both forms, from its default on. A CPU has
no attention by tokens.

With --v4 it is that of DeepSeek-V4's residual streams and of the selection of entries, see
`fd_dsa.distributed.equal_parts`. All tokens of a step count.

Writes benchmarks/results/divided_rows_<ranks>.json, divided_attention_<ranks>.json or
divided_rows_v4_<ranks>.json. A ratio above 1 means that the division pays. Results for small N
bound the default, `fd_dsa.environment.DEFAULT_DIVIDED_MIN_TOKENS`, or a value of
FD_DSA_EXCHANGED_MIN_TOKENS.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from benchmarks._gpu_engine_model import Shape, engine_options, of_ranks, shape_of
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result
from benchmarks._v4_gpu_model import V4Shape, v4_options, v4_shape_of
from benchmarks.v4_gpu import CONFIG as V4_CONFIG
from fd_dsa.distributed.equal_parts import LEAST_TOKENS
from fd_dsa.environment import DEFAULT_DIVIDED_MIN_TOKENS, DIVIDED_VARIABLE, EXCHANGED_VARIABLE

TARGET = "benchmarks.workers.divided_rows:Engine"
TOKENS, CONTEXTS = (8192,), (2048, 16384, 61440, 122880)
P42 = 8192, 61440
"""Tokens and context of the case with a target."""
GATE = 1.3
BY_TOKENS = (8192, 2048), (8192, 61440)
"""Tokens and context of the cases in which attention by tokens must not be slower."""
_TURNS = 4


def in_turns(engine: Worker, tokens: int, context: int) -> tuple[float, float]:
    """Return median milliseconds of a whole step and of a divided one."""
    times: dict[bool, list[float]] = {False: [], True: []}
    # the first turn computes the context
    for turn in range(-2, _TURNS):
        # the order cancels a drift
        for is_divided in (False, True) if turn % 2 else (True, False):
            new = tokens - (not is_divided)
            found = engine.call(op="after", prefix=context, prompt=new)
            if turn >= 0:
                times[is_divided].append(1e3 * new / found["tok_s"])
    return statistics.median(times[False]), statistics.median(times[True])


class Division(NamedTuple):
    """Work that ranks divide.

    Attributes:
        name: name of the result, without the number of ranks.
        variable: variable of the minimum number of tokens of a divided step.
        default_tokens: minimum number of tokens of a divided step; None = ranks divide no step.
        shape: shape of the model.
        engines: context of the options of a worker's engine.
    """

    name: str
    variable: str
    default_tokens: int | None
    shape: Shape | V4Shape
    engines: AbstractContextManager[dict[str, Any]]


def cases(
    division: Division, options: dict[str, Any], tokens: int, contexts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield the case of each context, from one engine."""
    variable = division.variable
    with Worker(TARGET, variable=variable, min_tokens=tokens, **options) as engine:
        for context in contexts:
            whole, divided = in_turns(engine, tokens, context)
            entry = {"case": f"{tokens} tokens after {context}", "tokens": tokens}
            entry |= {"context": context, "whole_ms": whole, "divided_ms": divided}
            entry["ratio"] = whole / divided
            if (division.name, tokens, context) == ("divided_rows", *P42):
                entry |= {"target": "P42", "gate": GATE}
            elif variable == EXCHANGED_VARIABLE and (tokens, context) in BY_TOKENS:
                entry["gate"] = 1.0
            yield entry


def division_of(args: argparse.Namespace, config: dict[str, Any]) -> Division:
    """Return the division that flags select.

    Args:
        config: fields of EngineConfig, which the model's own fields complete.
    """
    ranks = args.tensor_parallel_size
    if args.v4:
        # a context is a multiple of a block in a dry run too
        own = config | {"block_size": 128 if args.dry else V4_CONFIG["block_size"]}
        v4 = V4Shape(4, 8, ranks) if args.dry else v4_shape_of(ranks, args.layers, None)
        engines = v4_options(args, v4, own)
        return Division("divided_rows_v4", DIVIDED_VARIABLE, ranks * LEAST_TOKENS, v4, engines)
    own = config | ({} if args.dry else {"kv_cache_dtype": "fp8"})
    shape = Shape(2, 1, ranks=ranks) if args.dry else shape_of(ranks, args.layers)
    engines = engine_options(args, shape, own)
    if args.attention:
        return Division("divided_attention", EXCHANGED_VARIABLE, None, shape, engines)
    least = DEFAULT_DIVIDED_MIN_TOKENS
    return Division("divided_rows", DIVIDED_VARIABLE, least, shape, engines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--layers", type=int, metavar="N", help="default: all 61")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="tokens of a step")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="cached tokens")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--attention", action="store_true", help="divide the attention")
    forms.add_argument("--v4", action="store_true", help="DeepSeek-V4, whole depth")
    args = parser.parse_args(argv)
    ranks = args.tensor_parallel_size
    if ranks < 2:
        parser.error("--tensor-parallel-size: got 1, allowed: at least 2")
    sizes = args.tokens or ((256,) if args.dry else TOKENS)
    # multiples of a block, whose keys a later request finds
    contexts = args.contexts or ((128, 512) if args.dry else CONTEXTS)
    config: dict[str, Any] = {
        "max_model_len": max(contexts) + max(sizes) + 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": max(sizes),
        "target_inter_token_latency_ms": 0,
        "tensor_parallel_size": ranks,
        # decode steps take no part
        "enforce_eager": True,
    }
    found = division_of(args, config)
    result = rig_result(of_ranks(found.name, ranks), args, shape=found.shape._asdict())
    if found.default_tokens is not None:
        result["default_tokens"] = found.default_tokens
    with found.engines as options:
        for tokens in sizes:
            for entry in cases(found, options, tokens, contexts):
                result["cases"].append(entry)
                print(
                    f"{entry['case']:<28} whole {entry['whole_ms']:9.2f} ms, divided "
                    f"{entry['divided_ms']:9.2f} ms, {entry['ratio']:.3f}x",
                    flush=True,
                )
                # kept if a later case has no time left
                write_json(args.out / f"{result['name']}.json", result)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

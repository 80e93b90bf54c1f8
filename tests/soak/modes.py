"""One model through the modes of the embedded engine, token by token.

    python -m tests.soak.modes
    FD_DSA_BATCH_INVARIANT=1 python -m tests.soak.modes

The same greedy requests run with other chunk sizes, with prefix hits, with evicted blocks in host
memory, with preemption, and one at a time. With float32 caches every mode must give the tokens of
the reference; another token passes only where the two likeliest lie within rounding. With
FD_DSA_BATCH_INVARIANT=1 every logit must be the same, bit for bit, for all cache dtypes. A mode
that did not happen, such as a small cache in which nothing was preempted, fails too.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from fd_dsa.accuracy.retrieval.prompts import endless
from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import batch_invariant, prepare_cpu_runtime, quiet
from fd_dsa.startup.build import build_engine

CACHE_DTYPES = ("float32", "bfloat16", "fp8_ds_mla")
# of logits in float32, between GEMMs of different numbers of rows
ROUNDING = 1e-2
BLOCK_SIZE, CHUNK, SMALL_CHUNK = 64, 512, 64


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to answer it with."""

    key: str
    token_ids: tuple[int, ...]
    max_tokens: int

    @property
    def num_blocks(self) -> int:
        """Cache blocks that it needs at its end."""
        return -(-(len(self.token_ids) + self.max_tokens) // BLOCK_SIZE)


@dataclass(frozen=True)
class Mode:
    """Fields of EngineConfig that differ from the reference, and what must have happened."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    preempts: bool = False
    hits: bool = False
    host_hits: bool = False


@dataclass(frozen=True)
class Token:
    """A greedy token, the lead of its logit over the next, and a checksum of all logits."""

    token_id: int
    lead: float
    checksum: int


Answers = dict[str, list[Token]]


def modes(requests: Sequence[Request]) -> list[Mode]:
    """The reference first."""
    longest = max(request.num_blocks for request in requests)
    scarce = {"num_gpu_blocks_override": longest + 1}
    small = {"max_num_batched_tokens": SMALL_CHUNK}
    prefix, host = {"enable_prefix_caching": True}, {"kv_offload_bytes": "256M"}
    most = max(len(request.token_ids) for request in requests)
    found = [
        Mode("reference"),
        Mode("small chunks", small),
        Mode("one chunk", {"max_num_batched_tokens": max(most, CHUNK)}),
        Mode("prefix hits", prefix, hits=True),
        Mode("preemption", scarce, preempts=True),
        Mode("host memory", {**prefix, **scarce, **host}, hits=True, host_hits=True),
        Mode("all at once", {**small, **prefix, **scarce}, preempts=True, hits=True),
    ]
    if batch_invariant():
        found.append(Mode("one at a time", {"max_num_seqs": 1}))
    return found


def draw_requests(tokenizer: Tokenizer, count: int, longest: int, seed: int) -> list[Request]:
    """Passages of old tales to go on with: short ones, which preempt each other, then others."""
    found = []
    for index in range(count):
        random = Random(f"{seed}:{index}")
        # admission keeps one block spare for each request: short ones grow by two
        length, max_tokens = random.randint(20, 30), 2 * BLOCK_SIZE - 16
        if index >= count // 2:
            length, max_tokens = random.randint(BLOCK_SIZE, longest), random.randint(16, 48)
        stream, text = endless(random), ""
        while len(token_ids := tokenizer.encode(text)) < length:
            text += next(stream) + " "
        found.append(Request(str(index), tuple(token_ids[:length]), max_tokens))
    return found


def engine_for(mode: Mode, requests: Sequence[Request], dtype: str) -> LLMEngine:
    """An engine in this mode."""
    fields: dict[str, Any] = {
        "device": "cpu",
        "kv_cache_dtype": dtype,
        "block_size": BLOCK_SIZE,
        "max_model_len": max(r.num_blocks for r in requests) * BLOCK_SIZE,
        "max_num_seqs": 32,
        "max_num_batched_tokens": CHUNK,
        "num_gpu_blocks_override": sum(r.num_blocks for r in requests),
        "speculative_config": "none",
        "enable_prefix_caching": False,
        **mode.fields,
    }
    with quiet():
        return build_engine(EngineConfig(**fields))


class _Watched:
    """A runner that keeps the logits of its last step."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute_model(self, logits_indices: Any) -> Any:
        self.logits = self._runner.execute_model(logits_indices)
        return self.logits


def answer(engine: LLMEngine, requests: Sequence[Request]) -> Answers:
    """Greedy answers to requests that come all at once."""
    runner = engine.runner
    watched = engine.runner = _Watched(runner)
    found: Answers = {request.key: [] for request in requests}
    for request in requests:
        params = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
        engine.add_request(request.key, request.token_ids, params)
    while engine.has_unfinished_requests():
        # the outputs of a step come in the order of the rows of its logits
        for row, output in enumerate(engine.step()):
            if output.error is not None:
                raise output.error
            logits = np.ascontiguousarray(watched.logits[row])
            second, first = np.partition(logits, -2)[-2:]
            token = Token(output.new_token_ids[0], float(first - second), zlib.crc32(logits))
            found[output.request_id].append(token)
    engine.runner = runner
    return found


def run_mode(mode: Mode, requests: Sequence[Request], dtype: str) -> Answers:
    """Answers of one mode; raises AssertionError if what it is about did not happen."""
    engine = engine_for(mode, requests, dtype)
    if mode.hits:
        # some requests run twice, the last ones first: a small cache still holds their prompts
        found: Answers = {}
        size = max(4, len(requests) // 4)
        for start in range(0, len(requests), size):
            group = requests[start : start + size]
            answer(engine, group)
            found |= answer(engine, group[::-1])
    else:
        found = answer(engine, requests)
    stats = engine.stats()
    assert not mode.hits or stats.prefix_cache_hits, f"{mode.name}: no prefix was found"
    assert not mode.host_hits or stats.prefix_cache_host_hits, f"{mode.name}: nothing was copied"
    assert not mode.preempts or stats.num_preemptions, f"{mode.name}: nothing was preempted"
    return found


def differences(reference: Answers, other: Answers, *, bits: bool) -> Iterator[str]:
    """Yield the errors in the answers of a mode, one line a request.

    Args:
        bits: all logits must be the same; otherwise another token may come within rounding.
    """
    for key, tokens in reference.items():
        assert len(other[key]) == len(tokens)
        for place, (one, two) in enumerate(zip(tokens, other[key], strict=True)):
            if bits and one.checksum != two.checksum:
                yield f"request {key}: logits of token {place} differ"
                break
            if one.token_id != two.token_id:
                # what follows another token is another text
                if one.lead > ROUNDING:
                    yield (
                        f"request {key}: token {place} is {two.token_id}, not {one.token_id}, "
                        f"which leads by {one.lead:.3g}"
                    )
                break


def run_modes(count: int, longest: int, seed: int, name: str | None = None) -> list[str]:
    """Run every mode, or the one of this name, and print a line for each; what is wrong."""
    prepare_cpu_runtime()
    bits = batch_invariant()
    requests = draw_requests(Tokenizer.from_folder(demo_model_path()), count, longest, seed)
    wrong = []
    for dtype in CACHE_DTYPES if bits else CACHE_DTYPES[:1]:
        reference, *others = modes(requests)
        expected = run_mode(reference, requests, dtype)
        for mode in (mode for mode in others if name in (None, mode.name)):
            lines = list(differences(expected, run_mode(mode, requests, dtype), bits=bits))
            print(f"{dtype}, {mode.name}: {count - len(lines)} of {count} requests agree")
            wrong += [f"{dtype}, {mode.name}: {line}" for line in lines]
    return wrong


def main() -> int:
    """Run; returns 1 where a mode differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1500, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = run_modes(args.requests, args.longest, args.seed)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Worker: the engine without a model, to time what the host does in a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

_BLOCK_SIZE = 64
_MAX_MODEL_LEN = 1024
_PROMPT_TOKENS = 100
_WARM_UP = 5
# steps of the prefill of many prompts, and of the warm-up
_SPARE = 64


class PlainRunner:
    """Runner without optional parts, of this package and of those before the protocol."""

    @property
    def info(self) -> Any:
        """Return the optional parts, for which packages before the protocol do not ask."""
        from fd_dsa.runner.protocol import RunnerInfo

        return RunnerInfo()


class IdleRunner(PlainRunner):
    """A runner whose steps cost nothing: the same logits for every step, no copy.

    A row's logits fall off as those of language models do: few tokens hold most of the mass.
    """

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        from fd_dsa.runner.input_batch import InputBatch

        columns = _MAX_MODEL_LEN // _BLOCK_SIZE
        self.input_batch = InputBatch(num_rows, max(num_rows, 2048), columns, _BLOCK_SIZE)
        self.vocab_size = vocab_size
        rng = np.random.default_rng(0)
        # Zipf's law, in an order of its own for each row
        falling = -1.2 * np.log1p(np.arange(vocab_size))
        rows = [rng.permutation(falling) for _ in range(num_rows)]
        self._logits = np.array(rows, np.float32)

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Return the first rows of the logits."""
        return self._logits[: len(logits_indices)]


@cache
def _tokenizer() -> Any:
    from fd_dsa.config import demo_model_path
    from fd_dsa.engine.tokenizer import Tokenizer

    return Tokenizer.from_folder(demo_model_path(), None)


def _decoding(requests: int, sampling: dict[str, Any], steps: int, vocab_size: int) -> Any:
    """Return an engine whose requests all decode, for at least `steps` steps."""
    from fd_dsa import SamplingParams
    from fd_dsa.engine.engine import LLMEngine

    engine = LLMEngine(
        IdleRunner(requests, vocab_size),
        _tokenizer(),
        num_blocks=requests * _MAX_MODEL_LEN // _BLOCK_SIZE,
        max_model_len=_MAX_MODEL_LEN,
        eos_token_ids=(1,),
    )
    params = SamplingParams(**sampling, max_tokens=steps + _SPARE, ignore_eos=True)
    for index in range(requests):
        tokens = [10 + (7 * index + place) % 1000 for place in range(_PROMPT_TOKENS)]
        engine.add_request(str(index), tokens, params)
    while engine.stats().computed_prompt_tokens < requests * _PROMPT_TOKENS:
        engine.step()
    for _ in range(_WARM_UP):
        engine.step()
    return engine


def _timed_us(call: Callable[[], Any], steps: int) -> list[float]:
    """Time a call `steps` times. Returns microseconds of each call."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


def host_us(requests: int, sampling: dict[str, Any], steps: int, vocab_size: int) -> dict[str, Any]:
    """Return microseconds of each of `steps` decode steps of `requests` requests."""
    engine = _decoding(requests, sampling, steps, vocab_size)
    outputs: list[int] = []
    times = _timed_us(lambda: outputs.append(len(engine.step())), steps)
    if set(outputs) != {requests}:
        raise RuntimeError(f"steps gave {outputs} outputs, not {requests}")
    return {"us": times}


def pass_us(requests: int, steps: int, vocab_size: int) -> dict[str, Any]:
    """Return microseconds of a pass over the logits, which every sampler needs."""
    logits = IdleRunner(requests, vocab_size).execute_model(np.arange(requests))
    return {"us": _timed_us(lambda: logits.argmax(axis=1), steps)}

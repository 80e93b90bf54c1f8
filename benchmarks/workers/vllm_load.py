"""vLLM under a load: MODEL, options of the engine as JSON, --tp N. Answers JSON lines.

It runs with vLLM's packages and the `vllm_bench.py` of the peer's folder, and without this project.
The engine is `AsyncLLM`, whose client is this process. Requests are {"op": "version"} and {"op":
"replay", "load": FILE}. The flag --tp is for the `run.sh` of the peer's folder.
"""

import asyncio
import gc
import json
import os
import sys
import time

# fewer sizes than by default, up to vLLM's limit of 512 tokens, so that it starts sooner
CAPTURED = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def spread_weights():
    """Make the dummy weights random, and different in every process of the engine."""
    import vllm_bench

    vllm_bench.patch_weights()


def engine_of(model, options):
    """Start the engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    # FlashInfer's sum with a norm may use NVLink multicast, which may be off
    passes = {"fuse_allreduce_rms": False}
    arguments = AsyncEngineArgs(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        gpu_memory_utilization=0.9,
        disable_log_stats=True,
        compilation_config={"cudagraph_capture_sizes": CAPTURED, "pass_config": passes},
        **options,
    )
    return AsyncLLM.from_engine_args(arguments)


async def stream(engine, name, request, begin, answer):
    """Send a request at its time, and add to its answer the time of each token, or the error."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=request["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    prompt = {"prompt_token_ids": request["prompt"]}
    await asyncio.sleep(max(begin + request["at"] - time.perf_counter(), 0))
    try:
        async for output in engine.generate(prompt, params, name):
            came = time.perf_counter() - begin
            answer["times"] += [came] * len(output.outputs[0].token_ids)
    except Exception as error:
        # whatever the engine raises, the other requests go on
        answer["error"] = repr(error.__cause__ or error)


async def replay(engine, run, load):
    """Send the requests of a file at their times.

    Returns `answers`, of each request `times` and maybe `error`; `seconds`; and `loop_share`, the
    share of the time in which the event loop had a processor.
    """
    with open(load) as file:
        requests = json.load(file)
    answers = [{"times": []} for _ in requests]
    # as vLLM's server does; a search for garbage in all token ids would hold up the answers
    gc.collect()
    gc.freeze()
    cpu, begin = time.thread_time(), time.perf_counter()
    streams = (
        stream(engine, f"{run}-{number}", request, begin, answers[number])
        for number, request in enumerate(requests)
    )
    await asyncio.gather(*streams)
    seconds = time.perf_counter() - begin
    share = (time.thread_time() - cpu) / seconds
    return {"answers": answers, "seconds": seconds, "loop_share": share}


async def serve(model, options, answers):
    """Write an answer for each line of the standard input. The engine needs one event loop."""
    import vllm

    engine = engine_of(model, options)
    try:
        for run, line in enumerate(sys.stdin):
            request = json.loads(line)
            if request["op"] == "version":
                answer = vllm.__version__
            else:
                answer = await replay(engine, run, request["load"])
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        engine.shutdown()


def main():
    """Serve, with nothing that vLLM prints between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spread_weights()
    try:
        # the event loop of vLLM's server
        from uvloop import run
    except ImportError:
        from asyncio import run
    run(serve(sys.argv[1], json.loads(sys.argv[2]), answers))


# the engine's processes, when they are spawned, import this file by this name
if __name__ == "__mp_main__":
    spread_weights()
if __name__ == "__main__":
    main()

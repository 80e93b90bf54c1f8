"""Runs eager steps of an engine, and prints the bytes of their activations.

`python -m tests.null_driver.eager_memory MODEL FORMAT RANKS DRAFTS`. MODEL is one of MODELS, and
FORMAT is `released` or `bfloat16`. The device of the null driver has the allocator of a GPU, which
counts the bytes that tensors have, and the bytes that it took for them.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._harness import random_prompts
from benchmarks.host_time import GLM_5, v32
from tests.null_driver.engine import V4, V4_FORMATS, NullDriver, open_engine, replace

SIZES = (512, 2048, 8192)
# few layers of every kind; all experts, because scores and lists grow with them
MODELS: dict[str, dict[str, Any]] = {
    "v32": v32(layers=4, dense=2, experts=256),
    "glm": GLM_5 | {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "v4": V4 | V4_FORMATS | {"n_routed_experts": 256},
}
FORMATS = ("quantization_config", "expert_dtype")


def run_steps(engine: Any, size: int) -> None:
    """Run steps of up to `size` tokens: within the selection, past it, and beside decode rows."""
    from fd_dsa import SamplingParams

    # the first prompt is one step; the second one has chunks, which see many keys at last
    for number, prompts in enumerate(([size], [size + 16_384], [200] * 8 + [4 * size])):
        for index, ids in enumerate(random_prompts(len(prompts), max(prompts), 100_000, number)):
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            engine.add_request(f"{number}.{index}", ids[: prompts[index]], params)
        while engine.has_unfinished_requests():
            engine.step()


def main() -> None:
    """Print bytes by size: the largest sum, the plan, dense keys, and all that the device gave."""
    name, form, (ranks, drafts) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
    left_out = FORMATS if form == "bfloat16" else ()
    model = {key: value for key, value in MODELS[name].items() if key not in left_out}
    config: dict[str, Any] = {
        "kv_cache_dtype": "auto" if left_out else "fp8",
        "max_model_len": 65_536,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": "12G",
        "enforce_eager": True,
        "tensor_parallel_size": ranks,
    }
    if drafts:
        model["num_nextn_predict_layers"] = 1
        config["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    driver = NullDriver(ranks)
    import paddle

    from fd_dsa.environment import DIVIDED_VARIABLE
    from fd_dsa.startup import build
    from fd_dsa.startup.graph_sizes import activation_bytes

    # a whole step takes more than a divided one
    os.environ[DIVIDED_VARIABLE] = "0"
    # every step drafts, whatever the host measures
    replace(build, "measure_step_costs", lambda *given: None)
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            engine = open_engine(driver, model, Path(folder), max_num_batched_tokens=size, **config)
        paddle.device.reset_max_memory_allocated(driver.device)
        before = paddle.device.memory_allocated(driver.device)
        run_steps(engine, size)
        largest = paddle.device.max_memory_allocated(driver.device) - before
        taken = paddle.device.memory_reserved(driver.device) - before
        sizes, keys = engine.runner.model.config, 0
        planned = activation_bytes(sizes, size, "bfloat16")
        if name != "v4":
            # a part of the attention's workspace
            heads = sizes.num_attention_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
            keys = 2 * engine.runner.attn_backends[0].max_gathered_keys * heads
        print(f"{size} tokens: {largest} of {planned} and {keys}, {taken} taken")
        del engine
        gc.collect()
        paddle.device.empty_cache()


if __name__ == "__main__":
    main()

"""vLLM's decode steps with drafts of its MTP layer: MODEL, rows, result.

It runs with vLLM's packages and the `vllm_bench.py` of the peer's folder, and without this project.
Random weights accept nearly no draft, so a token takes a step.
"""

import argparse
import functools
import json
import sys


def main() -> None:
    """Write {rows: milliseconds of a step of two tokens a row}, contexts of 4k tokens."""
    import vllm
    import vllm_bench

    model, rows, out = sys.argv[1:4]
    whole, models = vllm_bench.realistic_dummy_weights, []

    def weights(part, *args, **options):
        # called for a model and then for its parts; the drafting layer is a model of its own
        if not any(part is other for model in models for other in model.modules()):
            models.append(part)
            whole(part, seen=set())

    vllm_bench.realistic_dummy_weights = weights
    drafting = {"method": "mtp", "num_speculative_tokens": 1}
    vllm.LLM = functools.partial(vllm.LLM, speculative_config=drafting)
    options = {"moe_backend": "auto", "tp": 1, "kv": "fp8", "max_len": 33024, "max_seqs": 128}
    options |= {"batched_tokens": 8192, "memory": 0.9, "eager": False}
    options["capture"] = "1,2,4,8,16,32,64,128,256"
    bench = vllm_bench.Bench(argparse.Namespace(model=model, **options))
    bench.run("warm", 1)
    steps = {}
    for batch in json.loads(rows):
        steps[batch] = bench.run(f"decode-{batch}x4k", 1)["tpot_ms"]
        with open(out, "w") as file:
            json.dump(steps, file)


if __name__ == "__main__":
    main()

"""Bytes of a token in the caches, and what the chunks of a prompt take beside them, at any length.

    python -m benchmarks.memory_use       # about a minute on 2 cores

Two baselines that are arithmetic, not another program: 656 + 132 bytes a token and layer, and a
budget of 512 MiB for the scores of prompts. Caches are allocated as the runner does it and their
arrays measured. On a CPU the peak of a prompt's last chunk is measured; on a device everything is
allocated once, so there the buffers that its attention asks for are counted, in host memory that
nobody writes to. Writes benchmarks/results/memory_use.json.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks._harness import Worker, save

RECORD_BYTES, SHARED_RECORD_BYTES, BUDGET_MIB = 656 + 132, 656, 512
# layers and layers with an indexer: DeepSeek-V3.2; GLM-5.2, most of whose layers share a selection
MODELS = {"DeepSeek-V3.2": (61, 61), "GLM-5.2": (78, 21)}
CHUNK = 8192
# context -> tokens of its last chunk on a CPU; from 32k on each of them scores the whole context by
# itself
CPU_TOKENS = {4096: 256, 32768: 64, 131072: 16, 1 << 20: 4}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 where a size is not what it should be, else 0."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    result: dict[str, Any] = {"tier": "T0", "budget_mib": BUDGET_MIB, "caches": [], "prompts": []}
    is_right = []
    with Worker("benchmarks.workers.memory_use") as worker:
        for model, (layers, indexers) in MODELS.items():
            case = {"layers": layers, "indexer_layers": indexers}
            found = worker.call(op="cache_bytes", num_blocks=16, **case)
            shared = layers - indexers
            wanted = (indexers * RECORD_BYTES + shared * SHARED_RECORD_BYTES) / layers
            result["caches"].append({"model": model, **case, **found, "wanted": wanted})
            is_right.append(found["planned"] == found["allocated"] == wanted)
            print(f"{model}: {found['allocated']:.2f} bytes a token and layer, wanted {wanted:.2f}")
        engine = result["engine"] = worker.call(op="engine_bytes")
        is_right.append(engine["bytes_a_token_and_layer"] == RECORD_BYTES)
        print(f"a running engine: {engine['bytes_a_token_and_layer']:.2f} bytes")
        for length, tokens in CPU_TOKENS.items():
            device = worker.call(op="device_buffers", max_model_len=length, max_num_tokens=CHUNK)
            cpu = worker.call(op="prefill_peak", context=length, tokens=tokens)
            case = {"context": length, "device": device, "cpu": cpu, "cpu_tokens": tokens}
            result["prompts"].append(case)
            mib = device["scores_mib"], cpu["numpy_mib"] + cpu["paddle_mib"]
            is_right.append(max(mib) <= BUDGET_MIB)
            line = "device scores {:.0f} MiB; CPU peak {:.0f} MiB".format(*mib)
            print(f"{length:8} tokens: {line}", flush=True)
    result["is_right"] = all(is_right)
    print(f"written: {save('memory_use', result)}")
    return int(not all(is_right))


if __name__ == "__main__":
    sys.exit(main())

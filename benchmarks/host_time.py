"""Host time of eager steps of large models, by shape and by cause, without a GPU.

    python -m benchmarks.host_time                        # about ten minutes on 2 cores
    python -m benchmarks.host_time --baseline CHECKOUT    # and the package of another checkout

The engine launches its kernels through a CUDA driver that does nothing (`tests.null_driver`), so a
step takes the time of Python and of the calls into the driver. A model that is split is rank 0,
without the other ranks. Each step is timed on its thread's processor clock, between two runs of a
fixed loop of Python. The times are those of a processor that always runs the loop at the fastest
time seen. On the host of a GPU the driver's own calls take longer.

The calls of a cause depend on the code alone. Its milliseconds are its share of the samples of a
profile. With a baseline the two packages take turns. Writes benchmarks/results/host_time.json.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._gpu_engine_model import FP8, WIDTHS
from benchmarks._harness import Worker, compare_packages, in_turns, percentiles, workers
from benchmarks.workers.host_time import LOOP_TURNS

TARGET = "benchmarks.workers.host_time:Engine"
ROUNDS, STEPS, PROFILED_MS = 3, 10, 4000


class Model(NamedTuple):
    """Fields of config.json, and the number of ranks."""

    fields: Mapping[str, Any]
    ranks: int = 1


class Case(NamedTuple):
    """Rows of a step.

    Attributes:
        rows: number of rows that decode.
        context: tokens of each such row before the step.
        prompt: tokens of a new prompt, 0 without one.
    """

    rows: int
    context: int
    prompt: int


def v32(layers: int, dense: int, experts: int) -> dict[str, Any]:
    """Return a model with the widths of DeepSeek-V3.2 in FP8."""
    sizes = {"num_hidden_layers": layers, "first_k_dense_replace": dense}
    return WIDTHS | sizes | {"n_routed_experts": experts, "quantization_config": FP8}


# fields that are left out are those of the release
GLM_5 = {"model_type": "glm_moe_dsa", "torch_dtype": "bfloat16", "quantization_config": FP8}
MODELS = {
    "7 layers": Model(v32(7, 1, 256)),
    "61 layers of 128 experts, 4 ranks": Model(v32(61, 3, 128), 4),
    "61 layers of 256 experts, 8 ranks": Model(v32(61, 3, 256), 8),
    "GLM-5, 8 ranks": Model(GLM_5, 8),
}
# rows past 2,048 tokens select their keys
CASES = {
    "decode, 1 row of 4k": Case(1, 4096, 0),
    "decode, 32 rows of 4k": Case(32, 4096, 0),
    "32 rows of 1k and a prompt of 512": Case(32, 1024, 512),
    "32 rows of 1k and a prompt of 2,048": Case(32, 1024, 2048),
    "32 rows of 4k and a prompt of 512": Case(32, 4096, 512),
}


def times(sides: Mapping[str, Worker], case: Case, rounds: int) -> dict[str, Any]:
    """Return launches and time of a step of each package, the packages in turn.

    `turns_a_launch` is the time of a launch in turns of the fixed loop.
    """
    calls = {
        label: partial(worker.call, op="times", steps=STEPS, **case._asdict())
        for label, worker in sides.items()
    }
    answers = in_turns(calls, rounds)
    fastest_ms = min(ms for found in answers.values() for a in found for ms in a["loop_ms"])
    result = {}
    for label, found in answers.items():
        pairs = [pair for a in found for pair in zip(a["cpu_ms"], a["loop_ms"], strict=True)]
        loops, launches = percentiles([step / loop for step, loop in pairs]), found[0]["launches"]
        ms = {name: fastest_ms * value for name, value in loops.items()}
        result[label] = {
            "launches": launches,
            "ms": ms,
            "us_a_launch": 1e3 * ms["p50"] / launches,
            "turns_a_launch": LOOP_TURNS * loops["p50"] / launches,
        }
    return result


def causes(worker: Worker, case: Case, step_ms: float) -> list[dict[str, Any]]:
    """Return calls and milliseconds of a step by cause, the longest first."""
    steps = max(1, round(PROFILED_MS / step_ms))
    answer = worker.call(op="causes", steps=steps, **case._asdict())
    samples, calls = Counter(answer["samples"]), answer["calls"]
    return [
        {"cause": cause, "calls": calls.get(cause, 0), "ms": step_ms * share / samples.total()}
        for cause, share in samples.most_common()
    ]


def measure(checkouts: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure all cases of all models, and print them."""
    found = []
    for name, model in MODELS.items():
        with workers(TARGET, checkouts, model=dict(model.fields), ranks=model.ranks) as sides:
            for case_name, case in CASES.items():
                timed = times(sides, case, rounds)
                for label, side in timed.items():
                    side["causes"] = causes(sides[label], case, side["ms"]["p50"])
                found.append({"model": name, "case": case_name, "sides": timed})
                print_case(found[-1])
    return {"steps": STEPS, "cases": found}


def print_case(found: Mapping[str, Any]) -> None:
    """Print the figures of a case: a line for each package, then a line for each cause."""
    print(f"{found['model']}, {found['case']}")
    for label, side in found["sides"].items():
        calls = sum(cause["calls"] for cause in side["causes"])
        print(
            f"  {label}: {side['launches']:,} launches, {calls:,} calls, {side['ms']['p50']:.1f} "
            f"ms, {side['us_a_launch']:.1f} us a launch"
        )
        for cause in side["causes"]:
            print(f"    {cause['cause']:<28} {cause['calls']:>7,} calls {cause['ms']:7.2f} ms")
    sys.stdout.flush()


main = partial(compare_packages, "host_time", __doc__, measure, ROUNDS)

if __name__ == "__main__":
    sys.exit(main())

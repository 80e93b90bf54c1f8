"""Sessions of the forms that need no GPU, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import time_limit
from tests.gpu_rig.session import VARIABLE, built

ROOT = Path(__file__).parents[2]
DEVICE = "tests/gpu_rig/device"
# seconds; a test that runs a session needs more than the usual limit
TIMEOUT_S = 3600
# tests that take another test's way with another type or composition; a GPU runs all of them
TWINS = (
    *(
        f"test_captured_prompts.py::test_random_steps_are_those_of_eager_ones[{case}]"
        for case in ("0-dense-0.04", "1-absorbed-1e-05", "1-dense-0.04")
    ),
    "test_batch_invariance.py::test_answers_do_not_depend_on_company[glm-fp8]",
    "test_batch_invariance.py::test_answers_do_not_depend_on_company[v32-bfloat16]",
    "test_captured_decode.py::test_logits_are_those_of_eager_steps[v32]",
    "test_captured_decode.py::test_tokens_of_the_demo_model",
    "test_captured_histories.py::test_graphs_and_eager_steps_of_one_history_change_no_output",
    "test_demo_end_to_end.py::test_drafts_change_no_token_on_the_device[0.0]",
    "test_demo_end_to_end.py::test_every_write_leaves_the_bytes_of_the_cpu[float32]",
    "test_demo_end_to_end.py::test_greedy_tokens_of_the_demo_model[float32]",
    *(
        f"test_four_bits.py::test_logits_are_those_of_the_dequantised_model[{layout}]"
        for layout in (
            "nvfp4 of compressed-tensors",
            "nvfp4 experts, fp8 attention",
            "int4 of compressed-tensors",
            "int4 of compressed-tensors, zero points, groups of 32",
            "gptq",
            "gptq, symmetric",
            "gptq of version 2",
            "auto-round as gptq",
            "auto-round as awq",
        )
    ),
    "test_formats.py::test_logits_are_those_of_the_cpu[glm-fp8]",
    "test_formats.py::test_logits_are_those_of_the_cpu[v32-bfloat16]",
    "test_formats.py::test_logits_are_those_of_the_cpu[v32-wide-keys-bfloat16]",
    "test_mtp.py::test_a_step_with_drafts_is_a_few_graphs_one_copy_in_one_out_and_one_wait[one]",
    *(
        f"test_mtp.py::test_outputs_are_those_without_drafts_and_drafts_those_of_the_cpu[{form}]"
        for form in ("eager", "sampled on the host")
    ),
    "test_v4_captured.py::test_random_steps_are_those_of_eager_ones[0]",
    "test_v4_captured.py::test_random_steps_are_those_of_eager_ones[1]",
    "test_v4_captured.py::test_steps_across_entries_of_128_tokens[bfloat16-0.002]",
    "test_v4_drafts.py::test_rejected_drafts_leave_nothing[released-150-118-True]",
    "test_v4_drafts.py::test_tokens_of_the_engine[preemption-sizes_of_graphs1]",
    "test_v4_drafts.py::test_tokens_of_the_engine[hits-sizes_of_graphs2]",
    "test_v4_hits.py::test_logits_after_a_hit[float32-2-False]",
    "test_v4_hits.py::test_logits_after_a_hit[float32-2-True]",
    "test_v4_hits.py::test_logits_after_a_snapshot_inside_of_a_chunk[16-3]",
    "test_v4_hits.py::test_logits_after_a_snapshot_inside_of_a_chunk[5-4]",
    "test_v4_hits.py::test_tokens_of_the_engine[chunks of 24 beside answers-sizes_of_graphs2]",
    "test_v4_hits.py::test_tokens_of_the_engine[preemption-sizes_of_graphs3]",
    "test_v4_model.py::test_logits_of_chunks[repeated-experts]",
    "test_v4_mtp.py::test_answers_and_drafts[hits-sizes_of_graphs2]",
    "test_v4_mtp.py::test_answers_and_drafts[preemption-sizes_of_graphs3]",
    "test_v4_mtp.py::test_logits_of_chunks[released-float32-sizes2-0.0001]",
)
# device tests of the first of the three guarded sessions, which take about equally long. It is one
# file of DeepSeek-V4, which would else take longest
FIRST = (
    "test_captured_decode.py",
    "test_captured_prompts.py",
    "test_demo_end_to_end.py",
    "test_mtp.py",
    "test_v4_hits.py",
)


def run_session(form: str, *arguments: str) -> int:
    """Run tests on a form in a process of its own.

    Returns:
        The number of tests that passed.

    Raises:
        AssertionError: a test failed; the message is the report of the session.
    """
    built(form)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {VARIABLE: form} | time_limit.half_of_the_rest()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    report = f"{done.stdout}{done.stderr}"
    assert done.returncode == 0, report
    passed = re.search(r"(\d+) passed", report)
    late = re.search(rf"tests {time_limit.REASON}: (\d+)", report)
    if late:
        pytest.skip(f"{late[1]} tests of the session were {time_limit.REASON}")
    return int(passed[1]) if passed else 0


def run_guarded(*arguments: str) -> int:
    """Run tests without twins by `run_session`, on the form in which host access faults."""
    return run_session("guard", *arguments, *(f"--deselect={DEVICE}/{test}" for test in TWINS))

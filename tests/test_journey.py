"""Files of the package that one request passes through, whose numbers have limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fd_dsa import LLM, SamplingParams
from tests.gpu_rig.session import built
from tests.journey import files_entered

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MAX_FILES_OF_A_STEP = 28
MAX_FILES_OF_A_DEVICE_STEP = 48
MAX_FILES_OF_A_CHAT = 40


def test_a_chat_and_a_decode_step_enter_few_files() -> None:
    with LLM(speculative_config="none") as llm:
        params = SamplingParams(temperature=0, max_tokens=6)
        llm.chat(QUESTION, params)
        chat = files_entered(lambda: llm.chat(QUESTION, params))
        stream = llm.chat(QUESTION, params, stream=True)
        for _ in range(3):
            next(stream)
        step = files_entered(lambda: next(stream))
    assert len(step) <= MAX_FILES_OF_A_STEP, sorted(step)
    assert len(chat) <= MAX_FILES_OF_A_CHAT, sorted(chat)
    # both have gone through the engine and the model
    assert {"engine/engine.py", "runner/model_runner.py"} <= step <= chat


@pytest.mark.slow
@pytest.mark.triton
def test_a_decode_step_on_a_device_enters_few_files() -> None:
    built("fake")
    done = subprocess.run(
        [sys.executable, "-m", "tests.device_journey"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    step = set(json.loads(done.stdout.splitlines()[-1]))
    assert len(step) <= MAX_FILES_OF_A_DEVICE_STEP, sorted(step)
    # it has gone through the sampler and the attention of the device
    assert {"runner/device_steps.py", "attention/device.py"} <= step

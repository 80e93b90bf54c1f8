"""Files of the package that one request passes through, whose numbers may only fall."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fd_dsa import LLM, SamplingParams

PACKAGE = Path(__file__).parents[1] / "fd_dsa"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MAX_FILES_OF_A_STEP = 42
MAX_FILES_OF_A_CHAT = 60


def files_entered(work: Callable[[], object]) -> set[str]:
    """Return the files of the package whose functions are called, by their path in it."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    paths = map(Path, entered)
    return {str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE)}


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

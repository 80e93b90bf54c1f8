"""Every file of `examples/` runs, and prints what its comments promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from fd_dsa import LLM, SamplingParams

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# file -> what its output matches
PRINTED = {
    "caches": r"positions: \[2, 3, 4, 4\] slots: \[66, 67, 68, 4\]\n"
    r"by FastDeploy's operator: \[2, 3, 4, 4, -1, -1\]\n"
    r"codes: \[4, 64, 128\] folded weights: \[4, 64\]\nerror of a key below 0.2: True\n",
    "metadata": r"position: \[70\] slot: \[198\]\n",
    "v4_steps": r"positions: \[126, 127, 128, 129, 8, 9\]\n"
    r"HCA entries of each token: \[0, 1, 1, 1, 0, 0\]\n"
    r"CSA entries of each token: \[31, 32, 32, 32, 2, 2\]\n"
    r"token 1 of row 0 at 127 pools 126 old sources to entry 7\n"
    r"positions: \[127, 128, 129, 130, 10, 11\] tokens after the step: \[131, 12\]\n",
    "chat": r"assistant: .+\nended by: stop after \d+ tokens\n"
    r"assistant: .*Paris.*\nprompt tokens: \d+ cached: [1-9]\d*\n",
    "operators": r"position and slot of the new token: 4 4\n"
    r"selected positions: \[\d, \d, \d\]\nattention output: .*1, 16, 512.*\n",
    "runner": "abc -> defghi length\nm -> nopqrs length\nwxy -> z stop\n",
    "stream": r"(?s)\[0\] .*\[1\] .*\[[01]\] complete: .*\[[01]\] complete: .*"
    r"running requests after close: 0\n",
    "tools": r"user: What is the weather in Paris\?\nassistant: \n"
    r"  calls get_weather \{\"city\": \"Paris\"\}\ntool: (It is sunny, 21 degrees\.)\n"
    r"assistant: The tool says: \1\n",
    "structured": r"ended by: stop\nkeys: \['city', 'is_capital'\]\nchoice: (Paris|Rome|Berlin)\n",
}


def test_every_example_has_its_output_here() -> None:
    assert PRINTED.keys() == {path.stem for path in FOLDER.iterdir() if path.suffix == ".py"}


def _by_time(name: str) -> Any:
    """Mark an example that loads the demo model as slow."""
    quick = ("caches", "metadata", "operators", "runner", "tools", "v4_steps")
    marks = () if name in quick else pytest.mark.slow
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [_by_time(name) for name in PRINTED])
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "structured":
        pytest.importorskip("llguidance", reason="llguidance (extra structured) is not installed")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.fullmatch(PRINTED[name], printed), printed


@pytest.mark.slow
def test_the_recorded_answers_are_those_of_the_demo_model() -> None:
    example = runpy.run_path(str(FOLDER / "tools.py"))
    user, call, result, answer = example["conversation"]()
    params = SamplingParams(temperature=0, max_tokens=64)
    with LLM(max_num_seqs=1) as llm:
        for turns, recorded in zip(
            ([user], [user, call, result]), example["RECORDED"], strict=True
        ):
            output = llm.chat(turns, params, tools=example["TOOLS"])[0].outputs[0]
            assert (output.text, output.finish_reason) == (recorded, "stop")
    assert answer["content"] == example["RECORDED"][1]


def test_an_example_is_short_and_says_how_it_is_started() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text("utf-8")
        assert f"python examples/{path.name}\n" in text
        assert len(text.splitlines()) <= 80

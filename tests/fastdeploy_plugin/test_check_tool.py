"""The tool for real installations: its rules, and a run of it over the double's server."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.fastdeploy_plugin.tree_checks import CHECKS
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.loader import validate
from fd_dsa.models.registry import read_config
from fd_dsa.offline.llm import LLM
from tests.fakes import trees
from tests.fastdeploy_plugin.launcher import ROOT, environment, plugin_folder
from tools.fastdeploy_check import __main__ as tool_module
from tools.fastdeploy_check import parity, step_time
from tools.fastdeploy_check.cut import main as cut
from tools.fastdeploy_check.servers import OURS, UPSTREAM, CheckFailed, Server
from tools.fastdeploy_check.tiny import FLAGS, write_tiny_model


def tool(
    folder: Path,
    *argv: str,
    script: dict[str, Any] | None = None,
    installed: bool = True,
    model: bool = True,
    tree: trees.Tree = trees.DEVELOP,
) -> tuple[int, dict[str, Any], str]:
    """Status, result file and output of a run; the report is in `folder`."""
    env = dict(os.environ)
    if installed:
        variables = {"FAKE_FASTDEPLOY_SERVER": json.dumps(script or {})}
        env = environment(plugin_folder(folder / "site"), variables, tree)
    out = folder / "result.json"
    files = ["--out", str(out), "--report", str(folder / "report.md")]
    files += ["--log-folder", str(folder / "logs")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tools.fastdeploy_check"),
            *([str(folder)] if model else []),
            *files,
            *argv,
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=540,
    )
    result = json.loads(out.read_text()) if out.exists() else {}
    return done.returncode, result, done.stdout + done.stderr


def test_without_fastdeploy_it_says_so(tmp_path: Path) -> None:
    status, result, output = tool(tmp_path, installed=False)
    assert (status, result) == (2, {})
    assert output.startswith(
        "fastdeploy_check: FastDeploy is not installed in this Python; install"
    )
    assert "Traceback" not in output


@pytest.mark.slow
def test_without_a_model_it_makes_a_tiny_one(tmp_path: Path) -> None:
    script = {"imports": ["fastdeploy.worker.gpu_worker"]}
    status, result, output = tool(tmp_path, "--only", "smoke", model=False, script=script)
    assert status == 0, output
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "| FastDeploy | 0.0.0+fake |" in report
    for check in CHECKS:
        assert f"| {check} | ok |" in report
    assert "| fd_dsa | FastDeploy 0.0.0+fake, derived from its DSA backend" in report
    # V1's cache manager is for FastDeploy's own path only
    own = f"FD_DSA_DISABLE=1 {trees.V1_VARIABLE}=1"
    assert f"| FastDeploy | {own} | FastDeploy's own |" in report
    folder = tmp_path / "logs" / "tiny_model"
    assert f"no MODEL: a random one of three layers, {folder}" in output
    # what its processes log of the plug-in is in the report
    (line,) = (line for line in result["log"] if "serves FastDeploy's DSA path" in line)
    assert f"| `{line}` | 1 |" in report


@pytest.mark.slow
def test_the_tiny_model_is_one(tmp_path: Path) -> None:
    """DSA's widths, all expected weights, and a best token that leads by more than rounding."""
    folder = write_tiny_model(tmp_path / "tiny")
    config = read_config(folder)
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim) == (512, 64, 128)
    assert config.num_attention_heads % 64 == 0 and config.index_topk == 2048
    with Checkpoint.open(folder) as checkpoint:
        validate(checkpoint, config)
        assert {checkpoint.info(name).dtype for name in checkpoint.names()} == {"BF16"}
    flags = dict(zip(FLAGS[::2], map(int, FLAGS[1::2]), strict=True))
    assert flags["--max-model-len"] <= flags["--max-num-batched-tokens"]
    with LLM(model=folder, max_num_seqs=1, max_model_len=256) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, min_tokens=8, logprobs=2)
        (answer,) = llm.generate([parity.prompts()[0]], params)
    first, second = zip(*(one.score.top[:2] for one in answer.logprobs), strict=True)
    leads = [a[1] - b[1] for a, b in zip(first, second, strict=True)]
    assert sorted(leads)[4] > parity.MARGIN


@pytest.mark.slow
def test_a_tree_that_is_not_served_gives_its_table_and_runs_nothing(tmp_path: Path) -> None:
    status, result, output = tool(tmp_path, tree=trees.BROKEN["missing_symbol"])
    assert status == 2, output
    report = (tmp_path / "report.md").read_text("utf-8")
    reason = "models/deepseek_v3.py has no Indexer"
    assert f"| models/deepseek_v3.py: Indexer | {reason} |" in report
    assert "| models/deepseek_v3.py: DeepseekV32DSAAttention | ok |" in report
    for name in ("smoke", "parity", "step_time"):
        assert not result[name]["passed"] and result[name]["error"].startswith("not run: ")
        assert f"## {name}: NOT passed\n\nnot run: fd_dsa would not serve: unsupported" in report


@pytest.mark.slow
def test_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    script = {"exit_with": 3, "say": "RuntimeError: no memory\n"}
    status, result, output = tool(tmp_path, "--only", "smoke", script=script)
    assert status == 1
    assert "the server ended with status 3: RuntimeError: no memory (all of it: " in output
    assert result["smoke"]["error"] in output and not result["passed"]


TOKENS = ["The", " north", " wall", " stands", "."]
# what a server with our path does wrong, and the check that finds it
GOOD: dict[str, Any] = {"tokens": TOKENS}
SERVERS = {
    "good": (GOOD, {}),
    "nearly equal": ({"tokens": ["The", " south"], "theirs": -0.2}, {}),
    "other tokens": (
        {"tokens": ["The", " south"], "theirs": -0.9},
        {"parity": "DIFFERENT"},
    ),
    "not among the candidates": ({"tokens": ["The", " east"]}, {"parity": "DIFFERENT"}),
    "empty answers": (
        {"tokens": [""]},
        {
            "smoke": "/v1/completions: the text is empty",
            "parity": "DIFFERENT",
            "step_time": "a stream had no token",
        },
    ),
    "a stream that breaks": (
        GOOD | {"done": False},
        {"smoke": "the stream ended without [DONE]", "step_time": "a stream of fd_dsa failed"},
    ),
    "another text when it is streamed": (
        GOOD | {"streamed": TOKENS[:-1]},
        {"smoke": "streamed 'T"},
    ),
    "errors": (
        GOOD | {"status": 500},
        {name: "500" for name in ("smoke", "parity", "step_time")},
    ),
}


def scripted(
    ours: bool, tokens: list[str], status: int = 200, done: bool = True, **more: Any
) -> Any:
    """A server's answers, by a script; FastDeploy's own path answers TOKENS."""

    def answer(request: httpx.Request) -> httpx.Response:
        body, said = json.loads(request.content), tokens if ours else TOKENS
        if ours and status != httpx.codes.OK:
            return httpx.Response(status, text="out of memory")
        if body.get("stream"):
            sent = more.get("streamed", said) if ours else said
            if body.get("min_tokens"):
                sent = sent * 8
            lines = [f"data: {json.dumps({'choices': [{'text': text}]})}\n\n" for text in sent]
            ends = ["data: [DONE]\n\n"] if done or not ours else []
            return httpx.Response(200, content=slowly([*lines, *ends]))
        choice: dict[str, Any] = {"text": "".join(said), "message": {"content": "".join(said)}}
        # the compared path's own opinion of our second token
        tops = [{token: 0.0, " south": more.get("theirs", -9.0)} for token in said]
        choice["logprobs"] = {"tokens": said, "top_logprobs": tops}
        return httpx.Response(200, json={"choices": [choice]})

    return answer


def slowly(lines: list[str]) -> Iterator[bytes]:
    """A stream that runs long enough to be there beside another."""
    for line in lines:
        time.sleep(0.005)
        yield line.encode()


@pytest.mark.parametrize("name", SERVERS)
def test_its_judgement(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Good servers pass every check; of a bad one each fault is named, and hides no other."""
    script, faults = SERVERS[name]
    found = {"error": "", "why": "w", "version": "1", "checks": [], "variables": {"A": "1"}}

    @contextmanager
    def serving(path: str, flags: Any, folder: Path, variables: Any) -> Iterator[Server]:
        assert variables["A"] == "1" and flags[0] == "model"
        full = {"tokens": TOKENS, "theirs": script.get("theirs", -9.0)} if path == UPSTREAM else {}
        transport = httpx.MockTransport(scripted(path == OURS, **{**script, **full}))
        with httpx.Client(transport=transport, base_url="http://x") as client:
            yield Server(path, "model", client)

    monkeypatch.setattr(tool_module, "require_fastdeploy", lambda: None)
    monkeypatch.setattr(tool_module, "which_path", lambda path: {**found, "live": path == OURS})
    monkeypatch.setattr(tool_module, "serving", serving)
    out = tmp_path / "result.json"
    files = ["--out", str(out), "--report", str(tmp_path / "r.md"), "--log-folder", str(tmp_path)]
    status = tool_module.main(["model", *files, "--rounds", "1", "--batches", "1,2"])
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    assert status == (1 if faults else 0)
    assert {n for n in ("smoke", "parity", "step_time") if not result[n]["passed"]} == set(faults)
    report = (tmp_path / "r.md").read_text("utf-8")
    assert report.startswith(f"# fastdeploy_check: {'NOT' if faults else 'all'} passed\n")
    for check, words in faults.items():
        part = report.partition(f"## {check}: NOT passed\n")[2].partition("\n## ")[0]
        assert words in part and words in said, part


def test_gaps_count_while_all_streams_run_and_all_rounds_make_one_ratio() -> None:
    first, second = [0.0, 1.0, 2.0, 3.0, 9.0], [1.5, 2.5, 3.5]
    assert step_time.overlapping_gaps_us([first, second]) == [1e6] * 3
    with pytest.raises(CheckFailed, match="did not run at the same time"):
        step_time.overlapping_gaps_us([[0.0, 1.0], [2.0, 3.0]])
    with pytest.raises(CheckFailed, match="no token"):
        step_time.overlapping_gaps_us([[0.0, 1.0], []])
    rounds = [
        (OURS, {1: [1.0, 2.0, 3.0]}),
        (UPSTREAM, {1: [4.0, 4.0, 4.0]}),
        (UPSTREAM, {1: [5.0, 5.0, 5.0]}),
        (OURS, {1: [3.0, 4.0, 5.0]}),
    ]
    (entry,) = step_time.report(rounds)
    assert entry["baseline"]["p50_of_rounds"] == [4.0, 5.0]
    assert entry["candidate"]["p50_of_rounds"] == [2.0, 4.0]
    assert entry["ratio_p50"] == pytest.approx(3.0 / 4.5, abs=1e-4)


def test_a_cut_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cut"
    assert cut([str(demo_model_path()), str(out), "--layers", "2"]) == 0
    assert read_config(out).num_hidden_layers == 2
    with Checkpoint.open(out) as part, Checkpoint.open(demo_model_path()) as whole:
        assert set(part.names()) < set(whole.names())
        assert not any(name.startswith("model.layers.2.") for name in part.names())
        for name in part.names():
            assert (part.raw(name) == whole.raw(name)).all(), name
    with LLM(model=out, max_num_seqs=1) as llm:
        assert llm.generate(["Hello"])[0].token_ids
    # it leaves what is there
    assert cut([str(demo_model_path()), str(tmp_path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert cut([str(tmp_path), str(tmp_path / "new")]) == 1


@pytest.mark.fastdeploy
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("check", tool_module.CHECKS)
def test_a_real_installation(check: str, tmp_path: Path) -> None:
    """With the model in FASTDEPLOY_CHECK_MODEL, else a tiny one; FASTDEPLOY_CHECK_FLAGS follow."""
    model = os.environ.get("FASTDEPLOY_CHECK_MODEL")
    out, report = tmp_path / "result.json", tmp_path / "report.md"
    argv = [*([model] if model else []), "--out", str(out), "--report", str(report)]
    flags = shlex.split(os.environ.get("FASTDEPLOY_CHECK_FLAGS", ""))
    assert tool_module.main([*argv, "--only", check, *flags]) == 0, out.read_text()

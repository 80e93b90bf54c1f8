"""The command on the demo model: modes really happen, exact ones agree, a folder is resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.matrix import command, running
from fd_dsa.accuracy.matrix.modes import INVARIANT, MODES
from fd_dsa.errors import FdDsaError

CHOSEN = "chunk-64,prefix-hits,preemption,fp8"
BY_NAME = {mode.name: mode for mode in MODES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of some modes."""
    out = tmp_path_factory.mktemp("matrix")
    arguments = ["matrix", "--quick", "--device", "cpu", "--modes", CHOSEN, "--out", str(out)]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def modes(folder: Path) -> dict[str, dict[str, Any]]:
    """Lines of matrix.json by mode."""
    data = json.loads((folder / "matrix.json").read_text("utf-8"))
    return {entry["mode"]: entry for entry in data["modes"]}


def test_exact_modes_agree_to_the_token(modes: dict[str, dict[str, Any]]) -> None:
    assert set(modes) == {"reference", *CHOSEN.split(",")}
    for name in ("chunk-64", "prefix-hits", "preemption"):
        assert modes[name]["verdict"] == "exact"
        assert modes[name]["agreement"]["equal"] == modes[name]["agreement"]["requests"] > 5
        # a chunk of another size rounds otherwise: that this is seen shows that it is looked at
        assert modes[name]["agreement"]["logit_difference"] < 1e-2


def test_each_mode_did_what_it_is_about(modes: dict[str, dict[str, Any]]) -> None:
    facts = {name: entry["facts"] for name, entry in modes.items()}
    assert facts["chunk-64"]["steps"] > facts["reference"]["steps"]
    assert facts["preemption"]["preemptions"] > 0 == facts["reference"]["preemptions"]
    assert facts["prefix-hits"]["prefix_hits"] > 64
    assert facts["reference"]["prefix_queries"] == 0
    assert modes["fp8"]["verdict"] == "deviation"
    assert modes["fp8"]["agreement"]["logit_difference"] > 1e-2


def test_scores_of_every_mode(modes: dict[str, dict[str, Any]]) -> None:
    for entry in modes.values():
        assert entry["ifeval_prompt_strict"]["total"] == 3
        assert entry["retrieval"]["total"] == 1
    measured = {name for name, entry in modes.items() if entry["perplexity"]}
    assert measured == {"reference", "chunk-64", "fp8"}
    assert abs(modes["chunk-64"]["perplexity"]["ratio"][0] - 1) < 1e-4


def test_files_of_the_report(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["matrix.json", "matrix.svg", "recordings", "report.md"]
    report = (folder / "report.md").read_text("utf-8")
    assert "3 of 3 modes that must agree to the token do" in report
    assert "![" in report and "(matrix.svg)" in report


def test_what_is_recorded_is_not_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a mode was run again")

    monkeypatch.setattr(command, "run_mode", refuse)
    arguments = ["matrix", "--quick", "--device", "cpu", "--modes", CHOSEN, "--out", str(folder)]
    assert main(arguments) == 0
    assert "modes that must agree to the token do" in capsys.readouterr().out


def test_answers_made_elsewhere_are_judged(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "recordings", copy / "recordings")
    # another machine: nothing may run, and its own settings do not count
    monkeypatch.setattr(command, "run_mode", None)
    monkeypatch.setattr(command, "settings_of", None)
    (copy / "recordings/fp8.npz").unlink()
    arguments = ["matrix", "--quick", "--judge", "--modes", CHOSEN, "--out", str(copy)]
    assert main(arguments) == 0
    here, there = (json.loads((one / "matrix.json").read_text("utf-8")) for one in (folder, copy))
    assert there["settings"] == here["settings"]
    for mine, given in zip(there["modes"], here["modes"], strict=True):
        if mine["mode"] == "fp8":
            assert mine["verdict"] == "skipped"
        else:
            assert mine["agreement"] == given["agreement"]
    capsys.readouterr()
    assert main(["matrix", "--judge", "--out", str(copy)]) == 2
    assert "reference.npz answers other requests than" in capsys.readouterr().err
    assert main(["matrix", "--judge", "--out", str(tmp_path / "none")]) == 2
    assert "reference.npz is no recording" in capsys.readouterr().err


def test_answers_alone_need_no_checkers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing in (command.scorer, command.plots):
        monkeypatch.setattr(missing, "ready" if missing is command.scorer else "require", None)
    out = tmp_path / "out"
    arguments = ["matrix", "--quick", "--device", "cpu", "--modes", "reference"]
    assert main([*arguments, "--answers-only", "--out", str(out)]) == 0
    # lines are as wide as the terminal
    assert "judge them with --judge" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["reference.npz"]


def test_recordings_of_other_settings_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "matrix.json").read_bytes()
    assert main(["matrix", "--device", "cpu", "--modes", "chunk-64", "--out", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert "was recorded with workload" in error and error.count("\n") == 0
    assert (folder / "matrix.json").read_bytes() == before


def test_a_damaged_recording_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings/reference.npz").write_bytes(b"PK\x03\x04 no")
    arguments = ["matrix", "--quick", "--device", "cpu", "--modes", "fp8", "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "reference.npz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "chunk-65"], "--modes: got 'chunk-65', allowed: reference"),
        (["--model", "/nowhere"], "--model: got '/nowhere'"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--out", "{file}"], "is a file; give a folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = [text.format(file=file) for text in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert main(["matrix", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mode_with_variables_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.update(options, command=command)
        return subprocess.CompletedProcess(command, 2, "", "log\nfd_dsa: error: no room\n")

    monkeypatch.setattr(running.subprocess, "run", process)
    with pytest.raises(FdDsaError, match="mode invariant-fp8: no room"):
        running.run_elsewhere(BY_NAME["invariant-fp8"], ("matrix", "--quick"))
    assert seen["command"][1:] == [
        "-m",
        "fd_dsa.accuracy",
        "matrix",
        "--quick",
        "--record",
        "invariant-fp8",
    ]
    assert seen["env"][INVARIANT] == "1"


def test_a_machine_that_cannot_keep_one_order_skips_those_modes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = f"{INVARIANT}: got 1, but on this machine a row of a product depends on"
    done = subprocess.CompletedProcess([], 2, "", f"fd_dsa: error: {said}\n")
    monkeypatch.setattr(running.subprocess, "run", lambda *_, **__: done)
    assert running.run_elsewhere(BY_NAME["invariant"], ()) == said

"""Lines of the doctor about FastDeploy: present or not, the path that would serve, and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fd_dsa import doctor
from fd_dsa.doctor import fastdeploy
from fd_dsa.doctor.fastdeploy import as_lines, examination, facts
from fd_dsa.fastdeploy_plugin.launch import choice
from fd_dsa.fastdeploy_plugin.launch.environment import ENTRY_POINT_GROUPS
from fd_dsa.fastdeploy_plugin.tree_checks import CHECKS
from tests.fakes import trees
from tests.fastdeploy_plugin.launcher import environment, plugin_folder

OURS = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "fd_dsa"}


def diagnose(
    folder: Path, *argv: str, status: int = 0, **more: Any
) -> subprocess.CompletedProcess[str]:
    """A doctor's process with the double installed."""
    env = environment(plugin_folder(folder / "site"), **{"env": {}, **more})
    # lines are not folded, whatever the terminal of the tests
    env["COLUMNS"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "fd_dsa.doctor", "--device", "cpu", *argv],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    return done


def paths(folder: Path, **more: Any) -> dict[str, Any]:
    """Return the path that would serve, by the way in which FastDeploy is started."""
    found = json.loads(diagnose(folder, "--json", **more).stdout)
    assert found["healthy"]
    assert set(found["fastdeploy"]["paths"]) == {"from_here", "with_engine_fastdeploy"}
    return found["fastdeploy"]["paths"]


@pytest.mark.slow
def test_an_installation_in_words(tmp_path: Path) -> None:
    """The launcher's environment is enough; the report says what a start from here would do."""
    text = diagnose(tmp_path, "--fastdeploy").stdout
    lines = text.partition("\ndevice ")[0].splitlines()[4:]
    assert lines[:2] == [
        "fastdeploy 0.0.0+fake",
        "           FD_ATTENTION_BACKEND unset, FD_PLUGINS unset, FD_DSA_DISABLE unset, "
        "ENABLE_V1_KVCACHE_MANAGER unset (some versions load no plug-in without FD_PLUGINS)",
    ]
    assert lines[2].strip() == (
        "started from here: FastDeploy's own path serves: FD_ATTENTION_BACKEND is unset, not "
        "DSA_ATTN"
    )
    assert lines[3].startswith("           --engine fastdeploy: fd_dsa serves: FastDeploy 0.0.0+fa")
    listed = [line.rsplit(maxsplit=1) for line in lines[4:][: len(CHECKS)]]
    assert [(name.strip(), mark) for name, mark in listed] == [(name, "ok") for name in CHECKS]
    assert text.endswith("fd_dsa serves in FastDeploy: see the lines below its version\n")


@pytest.mark.slow
def test_an_installation_as_json(tmp_path: Path) -> None:
    found = json.loads(diagnose(tmp_path, "--json", env=OURS).stdout)["fastdeploy"]
    assert found["installed"] and found["version"] == "0.0.0+fake"
    assert found["entry_points"] == list(ENTRY_POINT_GROUPS)
    assert found["missing_entry_points"] == []
    assert found["environment"] == {**OURS, "FD_DSA_DISABLE": None, trees.V1_VARIABLE: None}
    here, launched = found["paths"].values()
    assert here == launched and here["live"]
    assert here["own_path_variables"] == {trees.V1_VARIABLE: "1"}
    assert not {"checks", "version", "error"} & here.keys()
    assert not (tmp_path / "log").exists()


def test_asked_for_a_fastdeploy_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "fastdeploy_is_installed", lambda: False)
    assert doctor.main(["--fastdeploy"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fd_dsa: error: FastDeploy is not installed in this Python; install it ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_backend_that_the_launcher_refuses(tmp_path: Path) -> None:
    here, launched = paths(tmp_path, env={"FD_ATTENTION_BACKEND": "MLA_ATTN"}).values()
    assert not here["live"] and "is MLA_ATTN, not DSA_ATTN" in here["why"]
    assert not launched["live"] and "needs DSA_" in launched["why"]


@pytest.mark.slow
def test_a_check_that_fails_leaves_the_others_listed(tmp_path: Path) -> None:
    broken: dict[str, Any] = {"tree": trees.BROKEN["missing_symbol"], "status": 1}
    text = diagnose(tmp_path, "--fastdeploy", **broken).stdout
    (line,) = (x for x in text.splitlines() if x.strip().startswith("models/deepseek_v3.py: Index"))
    assert line.endswith("  models/deepseek_v3.py has no Indexer")
    assert "unsupported FastDeploy" in text
    assert "fd_dsa does NOT serve in FastDeploy" in text and "\nhealthy\n" in text


@pytest.mark.slow
def test_a_broken_installation_does_not_make_the_doctor_ill(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "fastdeploy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import os; os._exit(3)")
    for path in paths(tmp_path, path=[broken.parent]).values():
        assert not path["live"] and path["why"].startswith("FastDeploy cannot be imported: ")


@pytest.mark.parametrize("serves", [True, False])
def test_facts_and_lines(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point that is missing is named."""
    for name, value in (("installed", True), ("missing_entry_points", [ENTRY_POINT_GROUPS[1]])):
        target = "fastdeploy_is_installed" if name == "installed" else name
        monkeypatch.setattr(fastdeploy, target, lambda value=value: value)
    checks = [{"name": "x", "passed": False, "reason": "y"}]
    path = {"error": "", "version": "1", "live": serves, "why": "z"}
    found = facts({"from_here": path, "with_engine_fastdeploy": path | {"checks": checks}})
    assert found["serves"] is serves and found["checks"] == checks and found["version"] == "1"
    assert found["entry_points"] == [ENTRY_POINT_GROUPS[0]]
    lines = as_lines(found, with_tree=True)
    missing = f"fd_dsa has no entry point in {ENTRY_POINT_GROUPS[1]}; install it as a package"
    assert [lines[0], lines[1].strip()] == ["fastdeploy 1", missing]
    who = "fd_dsa serves" if serves else "FastDeploy's own path serves"
    assert lines[3].strip() == f"started from here: {who}: z"
    assert lines[-1].split() == ["x", "y"]


def test_a_probe_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> Any:
        raise OSError("no room for a process")

    monkeypatch.setattr(fastdeploy, "fastdeploy_is_installed", lambda: True)
    monkeypatch.setattr(fastdeploy, "probe", silent)
    with examination() as found:
        for path in found()["paths"].values():
            why = "FastDeploy could not be tried: no room for a process"
            assert path == {"live": False, "why": why}


def test_without_fastdeploy_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastdeploy, "fastdeploy_is_installed", lambda: False)
    with examination() as found:
        known = found()
    assert not known["installed"] and known["paths"] == {}
    assert as_lines(known) == ["fastdeploy not installed; only --engine fastdeploy needs it"]

"""Subjects of commits: the hook takes `package: Verb object` and says what is wrong with others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.commit_subject import MAX_LENGTH, VERBS, problem

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "subject",
    [
        "engine: Measure draft cost on a full batch",
        "chat: Commit to a call only at its name",
        "serve: Pass the client's id on",
        "docs: Describe the hook",
        "gpu_rig: Add a device",
        "build: Require shtab 1.9",
        "Merge branch 'main' into pages",
        'Revert "engine: Measure draft cost on a full batch"',
        "fixup! engine: Measure draft cost on a full batch",
        "engine: Add " + "x" * (MAX_LENGTH - len("engine: Add ")),
    ],
)
def test_good_subjects(subject: str) -> None:
    assert problem(subject) == ""


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("Measure draft cost", "must be `package: Verb object`"),
        ("", "must be `package: Verb object`"),
        ("engin: Measure draft cost", "did you mean 'engine'?"),
        ("issue 53: Measure draft cost", "no package or folder"),
        (
            "engine: what drafts cost is learned of a full batch",
            "no verb of tools",
        ),
        ("engine: The cost of drafts is measured", "no verb of tools"),
        ("engine: Faster drafts", "no verb of tools"),
        ("engine: Measured draft cost", "not in the imperative; write 'Measure'"),
        ("engine: Measuring draft cost", "not in the imperative; write 'Measure'"),
        ("engine: Measures draft cost", "not in the imperative; write 'Measure'"),
        ("engine: Dropped a draft", "not in the imperative; write 'Drop'"),
        ("engine: Retries a draft", "not in the imperative; write 'Retry'"),
        ("engine: measure draft cost", "must begin with a capital letter"),
        ("engine: Measure", "has no object"),
        ("engine: Measure draft cost.", "full stop"),
        ("engine: Measure " + "x" * MAX_LENGTH, f"{MAX_LENGTH} are allowed"),
    ],
)
def test_bad_subjects(subject: str, said: str) -> None:
    assert said in problem(subject)


def test_the_list_has_verbs_in_the_imperative() -> None:
    formed = {verb for verb in VERBS if re.search(r"(?:ed|ing|[^s]s)$", verb)}
    assert formed == {"Bring", "Embed", "Ping", "Speed"}


def _hook() -> dict[str, object]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    (hook,) = [hook for hook in config["repos"][0]["hooks"] if hook["id"] == "commit-subject"]
    assert {"pre-commit", "commit-msg"} == set(config["default_install_hook_types"])
    assert hook["stages"] == ["commit-msg"]
    return dict(hook)


@pytest.mark.parametrize(("subject", "status"), [("docs: Add a page", 0), ("Added a page", 1)])
def test_the_hook_reads_the_message(tmp_path: Path, subject: str, status: int) -> None:
    message = tmp_path / "COMMIT_EDITMSG"
    message.write_text(f"# a comment\n\n{subject}\n\nThe body may be long.\n")
    _, *arguments = str(_hook()["entry"]).split()
    command = [sys.executable, *arguments, str(message)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("commit subject: got 'Added a page'" in done.stderr) == bool(status)


def test_lint_checks_the_new_commits() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "tools/commit_subject.py --new" in makefile

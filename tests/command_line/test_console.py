"""The console script: its commands, their help, and completion in shells."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fd_dsa import __version__
from fd_dsa.cli import COMMANDS, main
from fd_dsa.commands import own_command
from tests.serve.processes import console, finish

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["version"], 0, f"fd_dsa {__version__}"),
        (["serve", "--version"], 0, f"fd_dsa {__version__}"),
        ([], 0, f"usage: {own_command()} "),
        (["dance"], 2, "unknown command 'dance', allowed: serve, chat, run-batch"),
        (["srve"], 2, "; did you mean serve?"),
        # words that Python shows with other quotes or with escapes
        (["a'b"], 2, 'unknown command "a\'b", allowed: serve, chat'),
        (["a\n\\'b\""], 2, "unknown command 'a\\n\\\\\\'b\"', allowed: serve, chat"),
        (["serve", "--enforce-eager=a'b"], 2, 'ignored explicit argument "a\'b"'),
        (
            ["chat", "--tempera", "1"],
            2,
            "unknown flag --tempera; did you mean --temperature?",
        ),
        (["accuracy", "compere"], 2, "unknown command 'compere', allowed: ifeval, score, compare"),
        (["accuracy", "selection", "--lenghts"], 2, "--lenghts; did you mean --lengths?"),
        (["doctor", "--jsn"], 2, "unknown flag --jsn; did you mean --json?"),
        (["chat", "--trust-remote-code"], 2, "--trust-remote-code; --help lists the flags"),
        # a mistyped flag is the error, not the argument that it hides
        (["--verison"], 2, "unknown flag --verison; did you mean --version?"),
        (["-V"], 2, "unknown flag -V; a command comes first: serve, chat, "),
        # the value of a flag before the command is no command
        (["--port", "8000"], 2, "unknown flag --port; a command comes first: serve, chat, "),
        (["--port=8000"], 2, "unknown flag --port; a command comes first: serve, chat, "),
        (["--port", "8000", "serve"], 2, "unknown flag --port; a command comes first: serve, "),
        (["accuracy", "--serve", "x"], 2, "--serve; a command comes first: ifeval, score, "),
        (["run-batch", "--input", "x"], 2, "unknown flag --input; did you mean --input-file?"),
        (["run-batch", "-ix"], 2, "are required: -o/--output-file; --help shows the usage"),
        (["accuracy", "score", "--out", "x"], 2, "are required: RUN; --help shows the usage"),
        (["serve", "--help=max-num"], 0, "--max-num-seqs N"),
        (["help", "serve"], 0, "--max-num-seqs N"),
        (["help", "accuracy", "score"], 0, "answers.jsonl"),
        (["help", "nope"], 2, "unknown command 'nope', allowed: serve,"),
        (["serve", "--zzz"], 2, "fd_dsa: error: unknown flag --zzz"),
    ],
)
def test_console_script(
    capsys: pytest.CaptureFixture[str], args: list[str], status: int, text: str
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(args) == status
    shown = capsys.readouterr()
    assert text in (shown.err if status else shown.out)


def test_the_package_is_the_console_script(tmp_path: Path) -> None:
    for module in ("fd_dsa", "fd_dsa.cli"):
        done = finish(tmp_path, [sys.executable, "-m", module, "version"], 0)
        assert done.stdout == f"fd_dsa {__version__}\n"


# runs a module as a program, and sends Ctrl-C during the import that it names
INTERRUPTED = """
import os, runpy, signal, sys
module, imported = sys.argv[1:3]
del sys.argv[1:3]
class Interrupts:
    def find_spec(name, *_):
        if name == imported:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts)
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize("module", ["", ".serve", ".doctor", ".accuracy"])
def test_ctrl_c_during_the_imports_has_no_stack_trace(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, f"fd_dsa{module}"]
    done = subprocess.run([*command, "fd_dsa.cli"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    if not module:
        command += ["fd_dsa.client.chat", "chat"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (130, "fd_dsa: error: interrupted\n")


def test_every_usage_shows_a_command_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {own_command(name)} ")


def test_help_of_a_topic_has_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for topic, shown, other in (
        ("cache", "--block-size", "--port"),
        ("--Max_Num", "--max-num-seqs", "--max-model-len"),
    ):
        with pytest.raises(SystemExit):
            main(["serve", f"--help={topic}"])
        out = capsys.readouterr().out
        assert shown in out and other not in out


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("yaml", ["serve"]),
        ("httpx", ["chat", "-q", "hi"]),
        ("numpy", ["bench"]),
        ("rich", ["bench", "--base-url", "http://127.0.0.1:9/v1"]),
        ("h11", ["chat", "-q", "hi", "--base-url", "http://127.0.0.1:9/v1"]),
        ("uvicorn", ["serve"]),
        ("paddle", ["doctor"]),
    ],
)
def test_a_required_package_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, words: list[str]
) -> None:
    broken = tmp_path / "stubs" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libx.so: no such file')\n")
    monkeypatch.setenv("PYTHONPATH", f"{broken.parent}:{ROOT}")
    *_, line = finish(tmp_path, console(*words), 2).stderr.splitlines()
    assert line.startswith(
        "fd_dsa: error: a required package cannot be imported (ImportError: libx.so: no such file)"
        f" by {sys.executable}; "
    )
    command = f"{sys.executable} -m pip install --force-reinstall {ROOT}"
    assert line.endswith(f"or install them here by {command}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_flags_and_choices(tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed: make test installs it")
    script = finish(tmp_path, console("completion", "bash"), 0).stdout
    cases = {
        "serv": "serve",
        "serve --max-num-s": "--max-num-seqs",
        "serve --engine e": "embedded",
        "accuracy selection --leng": "--lengths",
        "run-batch --inp": "--input-file",
        "chat --thinking of": "off",
        "accuracy retrieval --thinking of": "off",
        "doctor --plan mod": "models",
        "accuracy ifeval --out mod": "models",
        "accuracy ifeval --prompts pro": "prompts.jsonl",
        "accuracy score pro": "prompts.jsonl",
        "accuracy compare mod": "models",
    }
    (tmp_path / "models").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    for words, completed in cases.items():
        line = f"COMP_WORDS=(fd-dsa {words}); COMP_CWORD={len(words.split())}; _shtab_fd_dsa"
        shell = ["bash", "-c", f'{script}\n{line}; echo "${{COMPREPLY[@]}}"']
        assert finish(tmp_path, shell, 0).stdout == f"{completed}\n"


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh", "tcsh"])
def test_completion_scripts_are_for_the_plain_name(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed: make test installs it")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "fd-dsa" in script and "bin/fd-dsa" not in script
    assert "max-num-seqs" in script
    if shutil.which(shell) and shell != "tcsh":
        subprocess.run([shell, "-n"], input=script, text=True, check=True)

"""Commands of the pages and of a server's output can be pasted after `make serve`.

`make serve` makes .venv and does not activate it, so a page writes `.venv/bin/fd-dsa`. Tests of
tests/test_commands.py cover the commands in messages.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from fd_dsa.accuracy.cli import build_parser as accuracy_parser
from fd_dsa.cli import COMMANDS, build_parser
from fd_dsa.command_line.parser import split_flags
from fd_dsa.errors import FdDsaError
from fd_dsa.serve.flag_sources import parse_args
from tests.serve.processes import console, environment, finish, serving

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "fd_dsa/demo_model/README.md", ROOT / "tools/demo_training/README.md"),
]
# the commands of these are for the environment of FastDeploy, which the page activates
ACTIVATED = {"fastdeploy", "fastdeploy.zh"}
ACTIVATED_PARTS = dict.fromkeys(("troubleshooting", "troubleshooting.zh"), "FastDeploy")
BIN = ".venv/bin/"
# installed from Paddle's own index, or into an image
OTHER_PACKAGES = ("paddlepaddle-gpu", "fastdeploy-gpu", "playwright")
BEGINS = re.compile(r"(?:\w+=\S* )*(?:\.venv/bin/[\w.-]+|fd-dsa|python3?|pip|pytest|make|git)\s+\S")


class Printed(NamedTuple):
    """A command of a page."""

    page: Path
    line: str
    is_activated: bool


def _commands(page: Path) -> Iterator[Printed]:
    """Lines of the shell blocks of a page, and commands in its sentences and tables."""
    part = ""
    marks = r"(?ms)^#+ (.*?)$|^```(\w*)\n(.*?)^```|`([^`\n]+)`"
    for heading, language, block, inline in re.findall(marks, page.read_text("utf-8")):
        part = heading or part
        here = page.stem in ACTIVATED or ACTIVATED_PARTS.get(page.stem, "no part") in part
        if block and language in ("sh", "bash", ""):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        else:
            lines = [inline]
        for line in lines:
            for command in re.split(r" && ", line):
                if BEGINS.match(command):
                    yield Printed(page, command, here)


ALL = [command for page in PAGES for command in _commands(page)]


def _refusal(words: list[str], is_activated: bool) -> str:
    """Return why a command cannot be pasted, or ""."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *rest = words
    # one page is for both environments
    name = program.removeprefix(BIN)
    if program == name in ("fd-dsa", "python", "pip", "pytest") and not is_activated:
        return f"{name} is not on PATH after make serve"
    if name == "fd-dsa":
        return _refusal_of_flags(rest)
    if name in ("python", "python3", "python3.10") and rest[:1] == ["-m"]:
        if rest[1] == "pip":
            return _refusal_of_packages(rest[2:])
        known = rest[1].partition(".")[0] == "fastdeploy" or find_spec(rest[1]) is not None
        return "" if known else f"no module {rest[1]}"
    if name == "python" and not rest[0].startswith("-"):
        return "" if (ROOT / rest[0]).exists() else f"no file {rest[0]}"
    if name == "pip":
        return _refusal_of_packages(rest)
    if name == "make":
        return _refusal_of_targets(rest)
    if name == "git" and rest[0] == "clone":
        addresses = [word for word in rest[1:] if word.startswith("https://")]
        return "" if addresses else "git clone without an address"
    return ""


def _refusal_of_flags(words: list[str]) -> str:
    """Return the refusal of a command's parser, or ""."""
    command, *flags = words
    # the usage of a command
    flags = shlex.split(re.sub(r"\[.*\]|\.\.\.", "", shlex.join(flags)))
    own, _ = split_flags(flags)
    redirect = next((place for place, word in enumerate(own) if word == ">"), len(own))
    own = own[:redirect]
    try:
        if command == "serve":
            parse_args(flags)
        elif command == "accuracy":
            accuracy_parser(own[:1]).parse_args(own or ["--help"])
        elif command in COMMANDS:
            import_module(f"fd_dsa.{COMMANDS[command][0]}").build_parser().parse_args(own)
        else:
            build_parser().parse_args([command, *own])
    except FdDsaError as error:
        return str(error)
    except SystemExit:
        return ""
    return ""


def _refusal_of_packages(words: list[str]) -> str:
    """Return why a package of a pip command cannot be installed, or ""."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    known = {*re.findall(r'"([\w-]+)(?:\[\w+\])?[=<>~]', text), *OTHER_PACKAGES, "fd_dsa"}
    extras = set(re.findall(r"(?m)^(\w+) = \[", text))
    for before, word in pairwise(words):
        if word.startswith("-") or before in ("-i", "--extra-index-url", "--index-url"):
            continue
        name, _, extra = re.split(r"[=<>~]", word)[0].rstrip("]").partition("[")
        if name.startswith("."):
            if not (ROOT / name).exists() or not set(filter(None, extra.split(","))) <= extras:
                return f"{word} is not in the project"
        elif name not in known:
            return f"no package {name} in pyproject.toml"
    return ""


def _refusal_of_targets(words: list[str]) -> str:
    targets = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"))
    assert targets is not None
    unknown = [w for w in words if "=" not in w and w not in targets[1].split() and w != "-n"]
    return f"no target {unknown[0]}" if unknown else ""


def test_commands_of_the_pages_are_found() -> None:
    assert len(ALL) > 120
    programs = {command.line.split()[0] for command in ALL}
    assert {f"{BIN}fd-dsa", f"{BIN}python", f"{BIN}pip", "make", "git"} <= programs


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_a_page_can_be_pasted(page: Path) -> None:
    refused = []
    for command in ALL:
        if command.page == page:
            words = shlex.split(command.line, comments=True)
            why = _refusal(words, command.is_activated)
            refused += [f"{command.line}: {why}"] if why else []
    assert refused == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fd-dsa doctor", "not on PATH"),
        ("python -m fd_dsa.serve", "not on PATH"),
        ("X=1 pip install numpy", "not on PATH"),
        (".venv/bin/fd-dsa serve --prot 1", "did you mean --port?"),
        (".venv/bin/fd-dsa dotcor", "did you mean doctor?"),
        (".venv/bin/fd-dsa accuracy score --nothing x", "unknown flag --nothing"),
        (".venv/bin/pip install 'fd_dsa_extra[structured]'", "no package fd_dsa_extra"),
        (".venv/bin/pip install '.[structure]'", "not in the project"),
        (".venv/bin/python -m benchmarks.no_such", "no module benchmarks.no_such"),
        ("make server", "no target server"),
        ("git clone REPOSITORY_URL fd_dsa", "git clone without an address"),
    ],
)
def test_commands_that_cannot_be_pasted_are_found(line: str, said: str) -> None:
    assert said in _refusal(shlex.split(line), False)


def test_pages_have_the_address_of_the_project_or_none() -> None:
    """`urls.Repository` of pyproject.toml is the address in every page that needs one."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    addresses = re.findall(r'(?m)^Repository = "(https://\S+)"$', project)
    for name in ("README.md", "README.zh.md"):
        text = (ROOT / name).read_text("utf-8")
        assert re.findall(r"(?m)^git clone (\S+)", text) == addresses, name
    advisory = re.findall(
        r"\((https://\S+)/security/advisories/new\)", (ROOT / "SECURITY.md").read_text("utf-8")
    )
    assert advisory == addresses


def _run(line: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Return a line with `.venv/bin` as the environment of this Python."""
    line = re.sub(r"(^|\s)\.venv/bin/", rf"\1{Path(sys.executable).parent}/", line)
    env = {**environment(), "PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_modules_of_the_pages_know_their_flags() -> None:
    """`python -m benchmarks.x --y`: its help has the flag."""
    flags: dict[str, set[str]] = {}
    for command in ALL:
        words = shlex.split(command.line, comments=True)
        while re.match(r"\w+=", words[0]):
            words = words[1:]
        ours = r"(benchmarks|tests|tools)\b"
        if words[0] == f"{BIN}python" and len(words) > 2 and re.match(ours, words[2]):
            own, _ = split_flags(words[3:])
            flags.setdefault(words[2], set()).update(w for w in own if w.startswith("-"))
    assert len(flags) > 20
    for module, named in flags.items():
        if named:
            shown = _run(f"{BIN}python -m {module} --help", ROOT)
            assert shown.returncode == 0, shown.stderr
            assert named <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.stdout)), module


@pytest.mark.slow
def test_the_log_of_a_start_has_a_line_for_each_fact(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        shown, log = server.ready, server.ends()
    # the time of the start is one of them
    assert len(re.findall(r"\bready\b", shown + log)) == 1
    assert re.search(r"\[5/5\] ready    in \d+\.\d s\n", log)
    messages = [line.split(" ", 2)[2] for line in log.splitlines()]
    facts = [re.sub(r"[\d.]+", "0", text.partition(": ")[2] or text) for text in messages]
    assert len(facts) == len(set(facts)), log
    (operators,) = (text for text in messages if " on cpu: " in text)
    assert {"topk", "sparse_mla", "indexer_logits"} <= set(re.split(r"[ ,:]+", operators))


@pytest.mark.slow
def test_commands_of_errors_run(tmp_path: Path) -> None:
    """The cure of a start that fails, pasted into the same shell."""
    error = finish(tmp_path, console("serve", "org/name"), 2).stderr
    cure = error.partition("if that is a model of a hub: ")[2].strip()
    # no network is needed to see that the command and its flag are known
    done = _run(f"{cure} --dry-run --no-such-flag", tmp_path)
    assert done.stderr == "fd_dsa: error: unknown flag --no-such-flag; --help lists the flags\n"

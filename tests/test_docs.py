"""The documentation agrees with the code: flags, commands, messages, links."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import doctest
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_dsa.config import EngineConfig
from fd_dsa.models.registry import FAMILIES
from fd_dsa.serve.flags import DEFAULTS, build_parser
from tests._layout import ROOMS

ROOT = Path(__file__).resolve().parent.parent
FLAGS_PAGE = (ROOT / "docs/flags.md").read_text("utf-8")
ERRORS_PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
DOCUMENTED = "http://127.0.0.1:8000"
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CHINESE = [page for page in PAGES if page.name.endswith(".zh.md")]


def _documented() -> dict[str, list[str]]:
    """Rows of the tables of docs/flags.md: flag -> its cells."""
    ours = FLAGS_PAGE.partition("## Flags of other servers")[0]
    rows = re.findall(r"^\| `(--[a-z-]+)[^`]*` \|(.*)\|$", ours, flags=re.MULTILINE)
    return {flag: [cell.strip() for cell in cells.split("|")] for flag, cells in rows}


def _flags() -> dict[str, argparse.Action]:
    """Long flags of the server's parser, `--help` and `--version` left out."""
    actions = {flag: a for a in build_parser()._actions for flag in a.option_strings}
    others = ("--help", "--version")
    return {f: a for f, a in actions.items() if f.startswith("--") and f not in others}


def test_every_flag_is_documented_and_nothing_else() -> None:
    assert sorted(_documented()) == sorted(_flags())


def test_documented_defaults_are_the_real_ones() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(EngineConfig)} | DEFAULTS
    for flag, action in _flags().items():
        default = defaults.get(action.dest)
        if default in (None, ()) or isinstance(default, bool):
            # resolved from the model, the device or the memory, or a switch: told in words
            continue
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"`{shown}`" in _documented()[flag][0], flag


@pytest.mark.parametrize("page", ["quickstart.md", "quickstart.zh.md", "models.md"])
def test_pages_about_model_folders_name_every_family(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert {name for name in FAMILIES if f"`{name}`" not in text} == set()


def test_every_field_of_the_configuration_has_a_flag() -> None:
    fields = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(EngineConfig)}
    assert fields <= _flags().keys()


def test_every_page_is_in_the_sidebar() -> None:
    named = re.findall(r'"([^" ]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8"))
    pages = [*PAGES, *ROOT.glob("[CS]*.md")]
    assert sorted(named) == sorted(page.relative_to(ROOT).as_posix() for page in pages)


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("[CS]*.md")], ids=lambda path: path.stem)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    """The builder checks links to pages, not those to pictures and other files."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    files = [link.partition("#")[0] for link in links if not link.startswith("#")]
    assert [file for file in files if not (page.parent / file).exists()] == []


def _messages() -> str:
    """Every text of the package with … for each value put into it, and the Makefile's texts."""
    texts = []
    for path in (ROOT / "fd_dsa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return "\n".join([*texts, re.sub(r'"\s*\\\n\s*"', " ", makefile)])


def test_every_error_in_troubleshooting_exists() -> None:
    documented = re.findall(r"^\| `([^`]+)` \|", ERRORS_PAGE, flags=re.MULTILINE)
    messages = _messages()
    assert len(documented) > 15
    assert [text for text in documented if text not in messages] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_interactive_examples(page: Path) -> None:
    results = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert results.failed == 0


def _examples(language: str) -> list[str]:
    """Code blocks of one language on the English pages; test_integrations.py has those of one."""
    pattern = rf"^```{language}\n(.*?)^```"
    others = [page for page in PAGES if page not in CHINESE and page.stem != "integrations"]
    texts = [page.read_text("utf-8") for page in others]
    return [block for text in texts for block in re.findall(pattern, text, re.M | re.S)]


def _run(command: list[str]) -> str:
    """Output of a command that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("source", [s for s in _examples("python") if "base_url" not in s])
def test_python_examples_run(source: str) -> None:
    assert _run([sys.executable, "-c", source]).strip()


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """URL of a server on the demo model."""
    command = [sys.executable, "-m", "fd_dsa.serve", "--port", "0", "--shutdown-timeout", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        ready = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert ready is not None
        yield ready[0]
        process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("source", [s for s in _examples("sh") if s.startswith("curl")])
def test_curl_examples_run(source: str, server_url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = source.replace("curl", "curl --silent --fail").replace(DOCUMENTED, server_url)
    answer = _run(["bash", "-c", command])
    # of completions, of responses, of messages
    assert any(f'"{name}":' in answer for name in ("finish_reason", "status", "stop_reason"))


@pytest.mark.slow
@pytest.mark.parametrize("source", [s for s in _examples("python") if "base_url" in s])
def test_client_examples_run(source: str, server_url: str) -> None:
    assert _run([sys.executable, "-c", source.replace(DOCUMENTED, server_url)]).strip()


def test_the_architecture_page_lists_the_packages_in_their_order() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    request, _, packages = page.partition("## Packages")
    rows = re.findall(r"^\| `(\w+)` \|", packages, flags=re.MULTILINE)
    assert rows == list(ROOMS), "one row for each of ROOMS in tests/_layout.py, in its order"
    steps = re.findall(r"^\| \d+ \| `(\w+)` \|", request, flags=re.MULTILINE)
    assert len(steps) > 8 and set(steps) <= set(ROOMS)
    assert len(page.splitlines()) <= 80


@pytest.mark.parametrize("name", ["architecture", "design"])
def test_files_and_classes_that_a_page_names_exist(name: str) -> None:
    page = (ROOT / f"docs/{name}.md").read_text("utf-8")
    words = set(re.findall(r"`(\w[\w/.]+)`", page))
    files = sorted(word for word in words if "/" in word)
    folders = ROOT, ROOT / "fd_dsa"
    assert [f for f in files if not any((folder / f).exists() for folder in folders)] == []
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "fd_dsa").rglob("*.py"))
    defined = set(re.findall(r"^ *(?:class|(?:async )?def) (\w+)", code, flags=re.MULTILINE))
    classes = {word for word in words if re.match(r"[A-Z]+[a-z]\w+(\.\w+)?$", word)}
    named = {part for word in classes for part in word.split(".")}
    # Paddle's own class
    assert sorted(named - defined - {"CUDAGraph"}) == []
    assert len(files) + len(classes) > 8


def test_the_files_and_tests_that_the_seeds_name_exist() -> None:
    rows = (ROOT / "docs/seeds.md").read_text("utf-8").split("|---|")[-1].splitlines()[1:]
    assert len(rows) > 40
    named = 0
    for row in rows:
        _, source, asked, place, shown, _, _ = (cell.strip() for cell in row.split("|"))
        assert source and asked and place and shown, row
        for name in re.findall(r"`([\w./]+/[\w./]+(?:::\w+)?)`", f"{place} {shown}"):
            path, _, test = name.partition("::")
            file = ROOT / path
            assert file.exists(), name
            assert not test or f"def {test}(" in file.read_text("utf-8"), name
            named += 1
    assert named > 80

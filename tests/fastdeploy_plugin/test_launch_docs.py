"""docs/fastdeploy.md says what the launcher does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fd_dsa import environment
from fd_dsa.fastdeploy_plugin.launch.environment import server_environment
from fd_dsa.fastdeploy_plugin.launch.flags import MAPPED, NO_COUNTERPART, PassedFlags, translate
from fd_dsa.serve.flag_sources import parse_args
from tools.fastdeploy_check.__main__ import CHECKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/fastdeploy.md").read_text("utf-8")


def rows(heading: str) -> dict[str, str]:
    """Rows of the table below a heading: the first cell, in quotes -> the other cells."""
    part = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", part, flags=re.MULTILINE))


def commands() -> list[str]:
    """Lines of shell on the page."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_every_flag_is_there_with_its_counterpart() -> None:
    documented = rows("Flags")
    names = {f"--{name.replace('_', '-')}": name for name in (*MAPPED, *NO_COUNTERPART)}
    assert set(documented) == set(names)
    for flag, cell in documented.items():
        counterpart = MAPPED.get(names[flag])
        assert cell.startswith(f"`{counterpart}`" if counterpart else "none"), flag


def test_every_variable_is_there() -> None:
    files = (ROOT / "fd_dsa/environment.py", ROOT / "fd_dsa/ops/providers.py")
    ours = {name for file in files for name in re.findall(r'"(FD_DSA_[A-Z_]+)"', file.read_text())}
    documented = set(rows("Environment"))
    assert ours <= documented
    assert {"FD_ATTENTION_BACKEND", "FD_PLUGINS", "FD_DISABLE_CHUNKED_PREFILL"} <= documented
    assert environment.DEFAULT_OVERLAP_MAX_TOKENS > 0


def test_the_three_lines_are_what_the_launcher_does() -> None:
    exports = [line.removeprefix("export ") for line in commands() if line.startswith("export ")]
    set_by_launcher = server_environment({})[0]
    assert set(exports) == {f"{name}={value}" for name, value in set_by_launcher.items()}
    assert len(exports) == 4 and PAGE.count("```sh\nexport ") == 2


@pytest.mark.parametrize("line", [x for x in commands() if "serve " in x or "_check " in x])
def test_command_lines_are_accepted(line: str) -> None:
    words = shlex.split(line)
    start = words.index("serve") if "serve" in words else words.index("tools.fastdeploy_check")
    argv = words[start + 1 :]
    if "--only" in argv:
        place = argv.index("--only")
        assert argv[place + 1] in CHECKS
        del argv[place : place + 2]
    args = parse_args(argv)
    passed = PassedFlags.read(args.passed)
    assert translate(args, passed)[-2:] == ["--block-size", "64"]


def test_the_tools_checks_are_those_of_the_page() -> None:
    assert tuple(rows("Compare")) == CHECKS

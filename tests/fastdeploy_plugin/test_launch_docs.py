"""docs/fastdeploy.md says what the launcher and the plug-in do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fd_dsa.fastdeploy_plugin.launch.environment import server_environment
from fd_dsa.fastdeploy_plugin.launch.start import SHARED, passed_values
from fd_dsa.serve.flag_sources import parse_args
from tools.fastdeploy_check.__main__ import CHECKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/fastdeploy.md").read_text("utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]


def part(heading: str) -> str:
    """Text below a heading."""
    return PAGE.partition(f" {heading}\n")[2].partition("\n## ")[0]


def rows(heading: str) -> list[str]:
    """First cells of the table below a heading, in quotes."""
    return re.findall(r"^\| `([^`]+)` \|", part(heading), flags=re.MULTILINE)


def test_flags_variables_and_checks_are_those_of_the_code() -> None:
    named = re.findall(r"`--([a-z-]+)`", part("Flags").partition(" Any other flag")[0])
    assert sorted(named) == sorted(name.replace("_", "-") for name in SHARED)
    files = (ROOT / "fd_dsa/environment.py", ROOT / "fd_dsa/ops/providers.py")
    ours = {name for file in files for name in re.findall(r'"(FD_DSA_[A-Z_]+)"', file.read_text())}
    assert ours | {"ENABLE_V1_KVCACHE_MANAGER", *server_environment({})[0]} <= {
        *rows("Environment")
    }
    assert tuple(rows("Compare")) == CHECKS


def test_the_three_lines_are_what_the_launcher_does() -> None:
    exports = [line.removeprefix("export ") for line in COMMANDS if line.startswith("export ")]
    assert exports == [f"{name}={value}" for name, value in server_environment({})[0].items()]


@pytest.mark.parametrize("line", [x for x in COMMANDS if "serve " in x or "_check " in x])
def test_command_lines_are_accepted(line: str) -> None:
    words = shlex.split(line)
    start = words.index("serve") if "serve" in words else words.index("tools.fastdeploy_check")
    args = parse_args(words[start + 1 :])
    assert args.given <= {*SHARED, "engine", "dry_run"} and passed_values(args.passed) == {}

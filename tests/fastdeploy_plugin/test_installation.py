"""A real installation of FastDeploy: the plug-in is found, and tools/fastdeploy_check passes.

`FASTDEPLOY_CHECK_MODEL` names the folder of a model, without which the tool makes a tiny one, and
`FASTDEPLOY_CHECK_FLAGS` has further arguments of the tool, such as `--tensor-parallel-size 8 --
--quantization block_wise_fp8`.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from tools.fastdeploy_check.__main__ import CHECKS, main
from tools.fastdeploy_check.servers import PATHS, which_path

pytestmark = [pytest.mark.fastdeploy, pytest.mark.timeout(4 * 3600)]


@pytest.mark.parametrize("path", PATHS)
def test_the_plugin_is_live_exactly_where_it_should_be(path: str) -> None:
    found = which_path(path)
    assert found["version"] and not found["error"]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes(check: str, tmp_path: Path) -> None:
    model = os.environ.get("FASTDEPLOY_CHECK_MODEL")
    out, report = tmp_path / "result.json", tmp_path / "report.md"
    argv = [*([model] if model else []), "--out", str(out), "--report", str(report)]
    flags = shlex.split(os.environ.get("FASTDEPLOY_CHECK_FLAGS", ""))
    status = main([*argv, "--only", check, *flags])
    assert status == 0, out.read_text()
    assert json.loads(out.read_text())["passed"]

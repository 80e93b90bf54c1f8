"""`python -m fd_dsa.serve` with FastDeploy's double installed: the whole way, as a user goes it."""

from __future__ import annotations

import re
from pathlib import Path

import openai
import pytest

from fd_dsa import __version__
from tests.fakes import trees
from tests.fastdeploy_plugin.launcher import launcher

pytestmark = pytest.mark.slow


def test_a_server_for_the_openai_client(tmp_path: Path) -> None:
    with launcher(tmp_path, "--port", "0", whole=True) as live:
        ready = live.ready_line()
        assert ready.startswith(f"fd_dsa {__version__} serves model with FastDeploy 0.0.0+fake on ")
        url = re.search(r"http://[\d.:]+", ready)
        assert url is not None
        with openai.OpenAI(base_url=f"{url[0]}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(model="model", prompt="x", max_tokens=2)
            assert answer.choices[0].text == "a b"
        live.process.terminate()
        status, _, log = live.finish()
    assert status == 0
    assert "INFO fd_dsa serves its DSA path: FastDeploy 0.0.0+fake, derived from" in log
    assert "INFO starting FastDeploy 0.0.0+fake: " in log
    # of the client that asks for the health
    assert "HTTP Request" not in log


@pytest.mark.parametrize(
    ("tree", "env", "why"),
    [
        (trees.BROKEN["before_7367"], {}, "unsupported FastDeploy tree ("),
        (trees.BROKEN["missing_symbol"], {}, "unsupported FastDeploy tree (models/deepseek_v3.py"),
        (trees.DEVELOP, {"FD_DSA_DISABLE": "1"}, "FD_DSA_DISABLE turns the plug-in off"),
    ],
)
def test_fastdeploys_own_path_is_told(
    tmp_path: Path, tree: trees.Tree, env: dict[str, str], why: str
) -> None:
    with launcher(tmp_path, whole=True, tree=tree, env=env) as live:
        live.ready_line()
        live.process.terminate()
        status, _, log = live.finish()
    assert status == 0
    said = "WARNING FastDeploy serves by its own DSA path, not by fd_dsa: "
    assert any(said in line and why in line for line in log.splitlines()), log
    assert ("FD_DSA_DISABLE is set: FastDeploy serves" in log) == bool(env)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('no driver\\nmore of it')", "RuntimeError: no driver"),
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
        ("print('libcuda is gone'); import os; os._exit(7)", "status 7: libcuda is gone"),
    ],
)
def test_a_fastdeploy_that_cannot_be_imported(tmp_path: Path, source: str, why: str) -> None:
    broken = tmp_path / "broken" / "fastdeploy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(source)
    with launcher(tmp_path, whole=True, path=[broken.parent]) as live:
        status, out, log = live.finish()
    assert (status, out) == (2, "")
    line = log.splitlines()[-1]
    assert line.startswith("fd_dsa: error: --engine fastdeploy: FastDeploy is installed and cannot")
    assert why in line and "--engine embedded, which works without it" in line
    assert not live.dump_file.exists()


def test_auto_takes_fastdeploy_for_several_devices(tmp_path: Path) -> None:
    with launcher(tmp_path, "-tp", "2", engine="auto") as live:
        live.ready_line()
        argv = live.dump()["argv"]
        assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
        live.process.terminate()
        log = live.finish()[2]
    assert " INFO engine fastdeploy: --tensor-parallel-size is 2\n" in log


def test_auto_is_embedded_where_one_device_is_enough(tmp_path: Path) -> None:
    with launcher(tmp_path, "--port", "0", model=False, engine="auto") as live:
        assert live.process.stdout is not None
        ready = live.process.stdout.readline()
        assert ready.startswith(f"fd_dsa {__version__} serves demo_model on http://127.0.0.1:")
        live.process.stdout.readline()
        live.process.terminate()
        status, _, log = live.finish()
    assert status == 0
    assert " INFO engine embedded: one device is enough: weights 74.9 MiB in float32" in log
    assert "imported: []" in log and not live.dump_file.exists()


def test_what_fastdeploy_cannot_serve_is_told(tmp_path: Path) -> None:
    names = ("--served-model-name", "a", "--served-model-name", "b")
    one = "--served-model-name: got 2 names, --served-model-name of FastDeploy takes one"
    needed = "--model: got none, --engine fastdeploy needs the folder"
    for flags, model, line in ((names, True, one), ((), False, needed)):
        with launcher(tmp_path, *flags, model=model) as live:
            status, _, log = live.finish()
        assert status == 2 and line in log

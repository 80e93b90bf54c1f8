"""`python -m fd_dsa.serve` with FastDeploy's double installed: the whole way, as a user goes it."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import openai
import pytest

from fd_dsa import __version__
from tests.fakes import trees
from tests.fastdeploy_plugin.launcher import Launcher, launcher

pytestmark = pytest.mark.slow


def url_of(live: Launcher) -> str:
    """Address in the first line."""
    found = re.search(r" on (http://[\d.:]+)\n", live.banner())
    assert found is not None
    return found[1]


def test_a_server_for_the_openai_client(tmp_path: Path) -> None:
    env = {"FD_PLUGINS": "other , ", "FD_LOG_DIR": "there", "all_proxy": "http://127.0.0.1:9"}
    own = ("-tp", "2", "--api-key", "secret", "--", "--quantization", "block_wise_fp8", "--x=y z")
    with launcher(tmp_path, *own, env=env) as live:
        shown = live.banner()
        first = f"fd_dsa {__version__} starts model with FastDeploy 0.0.0+fake on "
        assert shown.startswith(first)
        url = shown.removeprefix(first).partition("\n")[0]
        assert f"{url}/health answers 200 when it is ready.\nSet FD_DSA_API_KEY to a key" in shown
        assert "secret" not in shown
        assert max(map(len, shown.splitlines())) <= 80
        dump = live.wait(url)
        # the launcher has become the server
        assert dump["pid"] == live.process.pid
        place = ["--model", str(tmp_path / "model"), "--served-model-name", "model"]
        place += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
        shared = ["--tensor-parallel-size", "2", "--api-key", "secret"]
        assert dump["argv"] == [*place, *shared, "--quantization", "block_wise_fp8", "--x=y z"]
        assert dump["env"]["FD_PLUGINS"] == "other,fd_dsa" and dump["env"]["FD_LOG_DIR"] == "there"
        assert dump["env"]["FD_ATTENTION_BACKEND"] == "DSA_ATTN"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(model="model", prompt="x", max_tokens=2)
            assert answer.choices[0].text == "a b"
        live.process.terminate()
        status, _, log = live.finish()
    assert status == -signal.SIGTERM
    assert "INFO fd_dsa serves its DSA path: FastDeploy 0.0.0+fake, derived from" in log
    assert "INFO starting FastDeploy: " in log and "--api-key '***'" in log and "secret" not in log


def test_the_status_is_fastdeploys(tmp_path: Path) -> None:
    with launcher(tmp_path, script={"exit_with": 3, "say": "RuntimeError: no memory\n"}) as live:
        status, _, log = live.finish()
    assert status == 3 and log.endswith("RuntimeError: no memory\n")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launcher(tmp_path, "--port", str(port)) as live:
            status, _, log = live.finish()
    assert status == 2 and not live.dump_file.exists()
    assert f"fd_dsa: error: 127.0.0.1:{port}: address already in use by process" in log


@pytest.mark.parametrize(
    ("tree", "env", "why"),
    [
        (trees.BROKEN["missing_symbol"], {}, "unsupported FastDeploy tree (models/deepseek_v3.py"),
        (trees.DEVELOP, {"FD_DSA_DISABLE": "1"}, "FD_DSA_DISABLE turns the plug-in off"),
    ],
)
def test_fastdeploys_own_path_is_told(
    tmp_path: Path, tree: trees.Tree, env: dict[str, str], why: str
) -> None:
    with launcher(tmp_path, tree=tree, env=env) as live:
        live.wait(url_of(live))
        live.process.terminate()
        log = live.finish()[2]
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
    with launcher(tmp_path, path=[broken.parent]) as live:
        status, out, log = live.finish()
    assert (status, out) == (2, "")
    line = log.splitlines()[-1]
    assert line.startswith("fd_dsa: error: --engine fastdeploy: FastDeploy is installed and cannot")
    assert why in line and "--engine embedded, which works without it" in line
    assert not live.dump_file.exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["-tp", "2", "--dry-run"], "engine embedded: no flag asks for FastDeploy"),
        (
            ["--data-parallel-size", "2", "--dry-run"],
            "engine fastdeploy: --data-parallel-size is 2",
        ),
    ],
)
def test_auto(tmp_path: Path, argv: list[str], line: str) -> None:
    model = "--data-parallel-size" in argv
    with launcher(tmp_path, *argv, model=model, engine="auto") as live:
        status, out, log = live.finish()
    assert status == 0 and f" INFO {line}\n" in log
    begin = "FD_ATTENTION_BACKEND=DSA_ATTN FD_PLUGINS=fd_dsa "
    assert out.startswith(begin) is model and not live.dump_file.exists()

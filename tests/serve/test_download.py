"""`--download` from a server that speaks a hub's API, and what goes wrong there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.errors import ConfigError
from fd_dsa.serve.cli import main
from tests.serve.hub import Hub, hub_of
from tests.serve.processes import TIMEOUT_S, environment, error_line, started, wait_until

MIB = 1 << 20


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with the demo model, of whose files one is large."""
    with hub_of(demo_model_path()) as running:
        del running.files["mtp.safetensors"]
        yield running


def hub_variables(folder: Path, url: str) -> dict[str, str]:
    """Variables of a download from a hub into `folder`/cache."""
    home = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "cache")}
    return {**home, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}


def serve(
    folder: Path, url: str, *flags: str, name: str = "org/model", disk_mib: int = 0
) -> subprocess.CompletedProcess[str]:
    """The server's plan for a model of a hub; its cache may be a disk of its own."""
    home = folder / "cache"
    home.mkdir(exist_ok=True)
    line = [sys.executable, "-m", "fd_dsa.serve", name, "--dry-run", "--device", "cpu", *flags]
    if disk_mib:
        mount = f'mount -t tmpfs -o size={disk_mib}m none "$HF_HOME" && exec "$0" "$@"'
        line = ["unshare", "--mount", "sh", "-c", mount, *line]
    return subprocess.run(
        line,
        cwd=folder,
        env={**environment(), **hub_variables(folder, url)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.slow
def test_a_file_whose_connection_breaks_goes_on_and_is_kept(tmp_path: Path, hub: Hub) -> None:
    hub.cuts = [12 * MIB]
    done = serve(tmp_path, hub.url, "--download")
    if done.returncode:
        # before 1.0 huggingface_hub goes on in the next command alone
        assert "the same command continues" in done.stderr
        done = serve(tmp_path, hub.url, "--download")
    assert done.returncode == 0, done.stderr
    plan = yaml.safe_load(done.stdout)
    assert plan["served_model_name"] == ["org/model"]
    # chunks of 10 MiB were kept, or all bytes
    assert hub.ranges in ([0, 10 * MIB], [0, 12 * MIB])
    again = serve(tmp_path, "http://127.0.0.1:9", "--download")
    assert yaml.safe_load(again.stdout)["memory"]["weight_bytes"] == plan["memory"]["weight_bytes"]


@pytest.mark.slow
def test_a_wrong_hash_is_refused_and_the_file_removed(tmp_path: Path, hub: Hub) -> None:
    hub.damaged = True
    line = error_line(serve(tmp_path, hub.url, "--download"))
    assert line.startswith("--download: model.safetensors: the hash of its bytes is ")
    assert list(tmp_path.rglob("model.safetensors")) == []
    hub.damaged = False
    assert serve(tmp_path, hub.url, "--download").returncode == 0


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, hub: Hub) -> None:
    tried = serve(tmp_path, hub.url, "--version", disk_mib=20)
    if tried.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {tried.stderr}")
    line = error_line(serve(tmp_path, hub.url, "--download", disk_mib=20))
    assert "org/model: needs 37.7 MiB more in " in line and "MiB free; make room, or set" in line
    assert hub.ranges == []
    # another process fills it in the meantime
    hub.listed = 5
    done = serve(tmp_path, hub.url, "--download", disk_mib=20)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no space left on device; the same command continues" in line


def test_no_network_and_no_model(tmp_path: Path, hub: Hub) -> None:
    for url, name, text in (
        ("http://127.0.0.1:9", "org/model", "http://127.0.0.1:9 cannot be reached, and there"),
        (hub.url, "org/none", "org/none: the hub has no such model, or not for you; set HF_TOKEN"),
    ):
        line = error_line(serve(tmp_path, url, "--download", name=name))
        assert line.startswith("--download: ") and text in line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"headers": {"ETag": '"../../../../x"'}},
            "ETag: got '../../../../x'; must be a SHA-1 or ",
        ),
        ({"patch": {"sha": "../../../x"}}, "the hub's sha: got '../../../x'; must be a commit, 40"),
        *(
            pytest.param(change, text, marks=pytest.mark.slow)
            for change, text in (
                ({"is_endless": True}, "the hub lists files on more than 100 pages; HF_ENDPOINT"),
                ({"headers": {"ETag": "W/*"}}, "ETag: got '*'; must be a SHA-1 or SHA-256 in hex"),
                ({"headers": {"X-Linked-Etag": "/etc/x"}}, "the hub's ETag: got '/etc/x'; must be"),
                (
                    {"headers": {"X-Repo-Commit": "../x"}},
                    "X-Repo-Commit: got '../x'; must be a com",
                ),
                ({"patch": {"lfs": {"oid": "../x"}}}, "the hub's oid: got '../x'; must be a SHA-1"),
                ({"patch": {"oid": 5}}, "the hub's oid: got 5; must be a SHA-1 or SHA-256 in hex"),
                (
                    {"patch": {"path": "../x.json"}},
                    "the hub's path: got '../x.json'; must be a path",
                ),
            )
        ),
    ],
)
def test_metadata_that_names_no_file_of_the_cache(
    tmp_path: Path, hub: Hub, change: dict[str, Any], text: str
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    line = error_line(serve(tmp_path, hub.url, "--download"))
    assert line.startswith("--download: ") and text in line
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_signal_ends_a_download_at_once(tmp_path: Path, hub: Hub) -> None:
    hub.silence_s = 8.0
    flags = ("org/model", "--dry-run", "--download")
    with started(tmp_path, *flags, env=hub_variables(tmp_path, hub.url)) as server:
        wait_until(lambda: hub.asked > 0, TIMEOUT_S)
        sent = time.monotonic()
        log = server.ends(128 + signal.SIGTERM)
        assert time.monotonic() - sent < 2.0
    assert log.splitlines()[-1].startswith("fd_dsa: error: interrupted; the same command continues")


@pytest.mark.slow
def test_a_silent_hub(tmp_path: Path, hub: Hub) -> None:
    hub.silence_s = 1000.0
    line = error_line(serve(tmp_path, hub.url, "--download"))
    assert "cannot be reached, and there is no earlier download" in line


def test_another_family_is_told_before_its_weights_come(tmp_path: Path, hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"model_type": "llama"}).encode()
    line = error_line(serve(tmp_path, hub.url, "--download"))
    assert (
        "model_type: got 'llama', allowed: 'deepseek_v32', 'glm_moe_dsa', 'deepseek_v4'; " in line
    )
    assert line.endswith(
        "are served by FastDeploy (also through --engine fastdeploy), vLLM or SGLang"
    )
    assert hub.ranges == []


def with_unknown_field(hub: Hub) -> None:
    """Give the hub's config.json a field that fd_dsa does not know."""
    fields = json.loads(hub.files["config.json"]) | {"index_kpool": 4}
    hub.files["config.json"] = json.dumps(fields).encode()


def test_an_unknown_field_is_told_before_its_weights_come(tmp_path: Path, hub: Hub) -> None:
    with_unknown_field(hub)
    line = error_line(serve(tmp_path, hub.url, "--download"))
    assert "config.json: index_kpool: got 4, allowed: fields that fd_dsa knows" in line
    assert hub.ranges == []


@pytest.mark.slow
def test_an_unknown_field_is_accepted_with_one_warning(tmp_path: Path, hub: Hub) -> None:
    with_unknown_field(hub)
    done = serve(tmp_path, hub.url, "--download", "--allow-unknown-config-fields")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["served_model_name"] == ["org/model"]
    assert done.stderr.count("unknown fields of config.json, ignored: index_kpool") == 1


def test_a_name_without_the_flag_says_how_to_download_it(tmp_path: Path) -> None:
    hint = r"the folder that huggingface_hub.snapshot_download\('org/model'\) returns$"
    with pytest.raises(ConfigError, match=hint):
        EngineConfig(model="org/model")
    with pytest.raises(ConfigError, match=r"give an existing folder$"):
        EngineConfig(model=str(tmp_path / "none"))


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_or_a_broken_link_is_no_name_of_a_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_link: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "org" / "config.json"
    path.parent.mkdir()
    path.symlink_to("none") if is_link else path.write_text("{}")
    assert main(["org/config.json", "--engine", "embedded"]) == 2
    assert capsys.readouterr().err.endswith("with config.json; give an existing folder\n")

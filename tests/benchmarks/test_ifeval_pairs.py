"""The sides of the IFEval pairs: layers read what they made again; the page shows the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import ifeval_pairs
from benchmarks.workers import form_serve
from fd_dsa.attention.backend import DSAAttentionBackend
from fd_dsa.step import StepMetadataBuilder
from tests.benchmarks.results import ENV, shown


def test_each_layer_reads_metadata_that_it_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(
        DSAAttentionBackend, "write", lambda self, *_: read.append(self.attention_metadata)
    )
    form_serve.read_again_in_every_layer()
    builder = StepMetadataBuilder(2, 8, 2, 4, device="numpy")
    lengths = [np.array(x, np.int32) for x in ((3, 0), (0, 5), (3, 1))]
    arrays = (*lengths, np.array([[1, -1], [2, 3]], np.int32))
    backend: Any = SimpleNamespace(builder=builder)
    backend.attention_metadata = first = builder.build(*arrays)
    step = SimpleNamespace(fd_dsa_step=first)
    slots = first.slot_mapping.copy()
    for layer_id in range(3):
        # what the first layer had is spoiled: others do not read it
        if layer_id:
            first.slot_mapping[:] = -7
        DSAAttentionBackend.write(backend, None, SimpleNamespace(layer_id=layer_id), step)  # type: ignore[call-arg]
    assert read[0] is first and first not in read[1:]
    assert all(np.array_equal(made.slot_mapping, slots) for made in read[1:])


def _compared(worse: int) -> dict[str, Any]:
    """Return what `accuracy compare` writes of one metric."""
    side = {"passed": 300, "total": 541, "value": 55.45, "low": 51.2, "high": 59.6}
    metric = {"before": side, "after": side, "worse": worse, "better": 0, "p": 1.0}
    return {
        "verdict": ["No change: no prompt changed its strict result."],
        "prompts": {"common": 541},
        "answers": {"same": 500},
        "metrics": {"Prompt-level-strict-accuracy": metric},
        "flips": [],
        "settings": ["left out"],
    }


@pytest.mark.parametrize(("flags", "pairs"), [((), 1), (("--rig",), 2)])
def test_pairs_and_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], pairs: int
) -> None:
    sides: list[str] = []
    scored: list[object] = []

    @contextmanager
    def serve(side: str, *_: object) -> Iterator[str]:
        sides.append(side)
        yield "http://localhost"

    def run(command: str, *arguments: object) -> None:
        if command == "score":
            scored.append(arguments[0])
        if command == "compare":
            out = Path(str(arguments[-1]))
            out.mkdir(parents=True, exist_ok=True)
            (out / "compare.json").write_text(json.dumps(_compared(0)))

    gpu_env = ENV | {"paddlepaddle": "3.3.1"}
    monkeypatch.setattr(ifeval_pairs, "ROOT", tmp_path)
    monkeypatch.setattr(ifeval_pairs, "_server", serve)
    monkeypatch.setattr(ifeval_pairs, "_accuracy", run)
    monkeypatch.setattr(ifeval_pairs, "environment", lambda: gpu_env)
    # the two halves run on two machines
    out = ["--out", str(tmp_path), *flags]
    assert ifeval_pairs.main([*out, "--answers-only"]) == 0
    assert sides == [side for pair in ifeval_pairs.PAIRS[:pairs] for side in pair]
    assert not scored and not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(ifeval_pairs, "environment", lambda: {"cpu": "of the other machine"})
    assert ifeval_pairs.main([*out, "--score-only"]) == 0
    assert len(sides) == len(scored) == 2 * pairs
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["env"] == gpu_env
    text = shown(tmp_path, result)
    row = "| every layer → once per step | Prompt-level-strict-accuracy | 300/541 = 55.45 "
    assert row in text and "every layer → once per step: No change" in text
    # the head, and for each pair a row and a verdict
    assert text.count(" → ") == 1 + 2 * pairs


def test_answers_of_two_machines_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    @contextmanager
    def serve(side: str, *_: object) -> Iterator[str]:
        served.append(side)
        yield "http://localhost"

    def interrupted(command: str, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ifeval_pairs, "_server", serve)
    monkeypatch.setattr(ifeval_pairs, "_accuracy", interrupted)
    monkeypatch.setattr(ifeval_pairs, "environment", lambda: ENV)
    # an interrupted run notes its machine, and goes on there only
    with pytest.raises(KeyboardInterrupt):
        ifeval_pairs.answer("once per step", tmp_path, False, None)
    with pytest.raises(KeyboardInterrupt):
        ifeval_pairs.answer("once per step", tmp_path, False, None)
    for field in ("gpu", "commit"):
        other = ENV | {field: "another"}
        monkeypatch.setattr(ifeval_pairs, "environment", lambda other=other: other)
        with pytest.raises(SystemExit, match=f"{field}: .* there, another here"):
            ifeval_pairs.answer("once per step", tmp_path, False, None)
    assert len(served) == 2


def test_sides_of_two_machines_are_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ifeval_pairs, "ROOT", tmp_path)
    for index, side in enumerate(ifeval_pairs.PAIRS[0]):
        folder = tmp_path / "build/ifeval_pairs_cpu/all" / side.replace(" ", "_")
        folder.mkdir(parents=True)
        env = ENV | {"cpu": f"machine {index}"}
        (folder / ifeval_pairs.ENVIRONMENT_FILE).write_text(json.dumps(env))
    with pytest.raises(SystemExit, match="cpu: machine 1 there, machine 0 here"):
        ifeval_pairs.main(["--score-only", "--out", str(tmp_path)])

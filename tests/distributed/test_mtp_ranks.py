"""Drafts of an MTP layer that is split over two ranks equal the drafts of one rank."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("paddle")

from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.errors import RankError
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.loader import load_weights
from fd_dsa.models.mtp_layer import add_mtp_layer
from fd_dsa.models.registry import config_from_dict, create_model, read_config
from fd_dsa.models.sources import MTP_EMBEDDING, MTP_HEAD
from fd_dsa.models.weights import HostWeights
from fd_dsa.runner import ModelRunner
from fd_dsa.runner.ranks import DriverRunner, WorkerRunner
from fd_dsa.runner.step import Step
from tests.engine.mtp_engine import NUM_BLOCKS, answers_of, dear_layer, make_runner
from tests.models.folders import f32, write_folder
from tests.runner.following import all_of
from tests.runner.tiny import GLM, V32, random_tensors

MTP = {"num_nextn_predict_layers": 1, "vocab_size": 52}
# tables of the layer, with a split head; the model's split head; a head that two ranks cannot split
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "own-tables": (V32 | MTP, (MTP_EMBEDDING, MTP_HEAD)),
    "glm-shared": (GLM | MTP, ()),
    "uneven": (V32 | MTP | {"vocab_size": 51}, (MTP_HEAD,)),
}


class Watched(ModelRunner):
    """Runner that records its batch at each step, and the logits of each call of the layer."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.seen: list[str] = []
        self.batches: list[dict[str, object]] = []

    def initialize_forward_meta(self, *given: Any) -> Step:
        self.batches.append(all_of(self.input_batch))
        return super().initialize_forward_meta(*given)

    def predict_more(
        self, next_ids: np.ndarray, tokens: Sequence[int], follows: Sequence[int] = ()
    ) -> np.ndarray:
        logits = super().predict_more(next_ids, tokens, follows)
        assert logits.shape == (len(tokens), self.vocab_size)
        self.seen.append(hashlib.sha256(np.ascontiguousarray(logits)).hexdigest())
        return logits


class WatchedDriver(Watched, DriverRunner):
    """Runner of rank 0."""


class WatchedWorker(Watched, WorkerRunner):
    """Runner of rank 1."""


class OtherRank:
    """Ranks of a DriverRunner: one thread of this process."""

    def __init__(self, group: HostGroup) -> None:
        self._group = group

    @contextmanager
    def step(self, message: bytes | None) -> Iterator[None]:
        if message is not None:
            self._group.send(message)
        yield


def load(folder: Path, group: Group | None = None) -> Any:
    """Load this rank's part of the model in a folder, with its layer."""
    with Checkpoint.open(folder) as checkpoint:
        config = add_mtp_layer(checkpoint, cast(ModelConfig, read_config(folder)))
        weights = HostWeights(group)
        model = create_model(config.split(group.size if group else 1), weights)
        load_weights(checkpoint, config, weights.loaders, group=group)
        weights.finish()
    return model


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder of a checkpoint with an MTP layer."""
    fields, own = CASES[request.param]
    config = config_from_dict(fields).with_mtp_layer(*own)
    tensors = {name: f32(array) for name, array in random_tensors(config, 2).items()}
    return write_folder(tmp_path / "model", fields, tensors)


def told(found: tuple[dict[Any, Any], Any, Any]) -> tuple[Any, ...]:
    """Return outputs, drafts by output and position, and counters of an engine."""
    ends, engine, drafter = found
    outputs = {name: (one.token_ids, one.finish_reason) for name, one in ends.items()}
    drafts = {
        (request.state.request_id, request.state.index): one
        for request, one in getattr(drafter, "proposed", {}).items()
    }
    stats = dataclasses.asdict(engine.stats())
    return outputs, drafts, {key: value for key, value in stats.items() if type(value) is int}


def on_two_ranks(folder: Path, costs: DraftCosts | None) -> tuple[Any, list[Any]]:
    """Return the results of `answers_of` for two ranks, and the runners of both."""
    shared = Shared.create(2)
    groups = [HostGroup(rank, shared) for rank in range(2)]
    models = [load(folder, group) for group in groups]
    kinds = WatchedDriver, WatchedWorker
    runners = [
        make_runner(model, NUM_BLOCKS, kind) for model, kind in zip(models, kinds, strict=True)
    ]
    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(runners[1].serve, groups[1].receive)
        try:
            runners[0].lead(OtherRank(groups[0]))
            found = answers_of(runners[0], "mtp", costs=costs)
        finally:
            groups[0].send(b"")
            # an empty message ends the loop of the worker
            assert isinstance(serving.exception(timeout=60), EOFError)
            groups[0].close()
    return found, runners


def in_quick_pairs() -> list[Any]:
    """Cases with each way to draft. The way that a case shares with the next one is slow."""
    ways = {"always": None, "while it pays": dear_layer(3)}
    return [
        pytest.param(case, costs, id=f"{case}-{way}", marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, case in enumerate(CASES)
        for j, (way, costs) in enumerate(ways.items())
    ]


@pytest.mark.parametrize(("folder", "costs"), in_quick_pairs(), indirect=["folder"])
def test_drafts_are_those_of_one_rank_and_equal_on_both(
    folder: Path, costs: DraftCosts | None
) -> None:
    plain, *_ = told(answers_of(make_runner(load(folder), NUM_BLOCKS), None))
    one = told(answers_of(make_runner(load(folder), NUM_BLOCKS), "mtp", costs=costs))
    found, (driver, worker) = on_two_ranks(folder, costs)
    outputs, drafts, stats = told(found)
    assert outputs == plain
    # the counters include accepted drafts
    assert (outputs, drafts, stats) == one
    assert stats["num_preemptions"] and stats["num_accepted_tokens"]
    assert found[1].stats().prefix_cache_hits and sum(map(len, drafts.values())) > 40
    # equal bits of logits give equal drafts, because a sample is a function of its logits
    assert driver.seen == worker.seen and len(worker.seen) > 40
    assert driver.batches == worker.batches and len(worker.batches) > 40


class FailingDriver(DriverRunner):
    """Driver whose layer fails because a rank has ended."""

    def predict_more(self, *given: Any) -> np.ndarray:
        raise RankError("rank 1 has ended")


def test_a_rank_that_ends_in_a_draft_ends_the_step(folder: Path) -> None:
    with pytest.raises(RankError, match="rank 1 has ended"):
        answers_of(make_runner(load(folder), NUM_BLOCKS, FailingDriver), "mtp")

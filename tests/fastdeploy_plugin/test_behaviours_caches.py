"""Caches that come and go: profile runs, sleep, new weights, keys from another node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fakes.driver import Job
from tests.fakes.trees import TREES
from tests.fastdeploy_plugin.engines import ours, prompt
from tests.fastdeploy_plugin.watching import answers, small_engine, watch_steps

GRAPHS = {"use_cudagraph": True, "cudagraph_capture_sizes": [4, 2, 1]}
SERVED = [
    pytest.param("pr7367", GRAPHS, id="pr7367-graphs"),
    pytest.param("develop", GRAPHS, id="develop-graphs"),
]


def two_jobs() -> list[Any]:
    return [Job(prompt(70), 5, chunk=40), Job(prompt(9, 1), 7)]


@pytest.mark.parametrize(
    ("tree", "graphs", "steps"),
    [
        # FastDeploy keeps the graphs when the caches alone sleep, so that is for eager steps
        ("develop", {}, "kv_cache"),
        ("pr7367", GRAPHS, "kv_cache,weight"),
        ("develop", GRAPHS, "kv_cache weight"),
    ],
)
def test_what_sleeps_wakes_up_as_it_was(tree: str, graphs: Any, steps: str) -> None:
    """Caches alone, and weights with them, in one call or in two, which begin with the caches.

    Caches that were freed read as NaN, weights have no memory until they are loaded again; there
    is another number of blocks afterwards.
    """
    with ours(TREES[tree]):
        engine = small_engine(20, **graphs)
        expected = engine.generate(two_jobs())
        old = list(engine.runner.share_inputs["caches"])
        engine.runner.sleep(tags=",".join(steps.split()))
        assert all((cache.numpy() == 0xFF).all() for cache in old)
        engine.runner.num_gpu_blocks = 21
        for tags in steps.split():
            engine.runner.wakeup(tags=tags)
        new = engine.runner.share_inputs["caches"]
        assert [cache.shape[0] for cache in new] == [21] * len(old)
        assert engine.generate(two_jobs()) == expected
        assert all((cache.numpy() == 0xFF).all() for cache in old)


@pytest.fixture
def other_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Turns what runners read of a checkpoint into another model; gives the switch."""

    def switch() -> None:
        from fastdeploy.worker import gpu_model_runner

        original = gpu_model_runner.read_checkpoint

        def read(folder: Any) -> Iterator[tuple[str, np.ndarray]]:
            for name, array in original(folder):
                # what our layers copy, split or fuse, and what they read as it is
                if "kv_a_layernorm" in name or "k_norm" in name:
                    array = array * 0.7 + 0.1
                if "kv_b_proj" in name or "indexer.wk" in name:
                    array = array[:, ::-1]
                yield name, array

        monkeypatch.setattr(gpu_model_runner, "read_checkpoint", read)

    yield switch


@pytest.mark.parametrize(("tree", "graphs"), SERVED)
def test_new_weights_count_from_the_next_step_on(
    tree: str, graphs: Any, other_weights: Any
) -> None:
    with ours(TREES[tree]):
        # past the selection, so that the indexer's weights decide too
        small = {"index_topk": 16, **graphs}
        engine = small_engine(**small)
        before = engine.generate(two_jobs())
        other_weights()
        engine.runner.clear_parameters()
        engine.runner.update_parameters()
        after = engine.generate(two_jobs())
        assert after == small_engine(**small).generate(two_jobs())
        assert after != before


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_decode_node_goes_on_with_keys_of_a_prefill_node(drafts: int) -> None:
    """Disaggregation: the first step of the second node is a decode row over foreign keys."""
    tokens = prompt(100)
    speculative = {"method": "ngram", "num_speculative_tokens": drafts} if drafts else {}
    with ours():
        expected = answers(Job(tokens, 6))[0]
        first = small_engine(20)
        source = Job(tokens, 2)
        waiting = [source]
        first.step(waiting)
        blocks, token = list(source.blocks), list(source.output)
        second = small_engine(24, **speculative)
        watch = watch_steps(second)

        def fetch(to: list[int]) -> None:
            from fastdeploy._arrays import writable

            both = (one.runner.share_inputs["caches"] for one in (first, second))
            for theirs, own in zip(*both, strict=True):
                with writable(own) as values:
                    values[to[: len(blocks)]] = theirs.numpy()[blocks]

        output = second.generate([Job(tokens, 6, fetch=fetch, output=token)])
    assert output == [expected]
    assert not any(step.lengths[0].any() for step in watch.steps)
    assert watch.steps[0].lengths[1:].tolist() == [[100], [1]]
    assert watch.trespasses == []

"""FastDeploy's double with its tensors on the device, our plug-in in it: answers and costs.

The forms without a GPU interpret the kernels, so there the model has two layers and answers are
two tokens; on a GPU it is the whole demo model with all that a scheduler does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.fastdeploy_plugin.launch.environment import missing_entry_points
from tests.fakes.trees import OURS_ENV, TREES, installed
from tests.fastdeploy_plugin.demo_prompts import demo_prompts
from tests.fastdeploy_plugin.test_end_to_end import MODES, NUM_BLOCKS, SIZES, jobs_of, oracle
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_adapter_steps import (
    LAYER_KERNELS,
    STEP_KERNELS,
    interpreted_launches,
)
from tests.gpu_rig.transfers import counted_transfers

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

FEW_LAYERS = 2
# the double computes in float32, for which attention has no kernel on tensor cores
FLOAT32_KERNELS = LAYER_KERNELS - {"attend_kernel"} | {"sparse_mla_kernel"}
SMALL = {
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "total_block_num": 6,
    # tokens beyond it are scored
    "index_topk": 4,
    "num_hidden_layers": FEW_LAYERS,
    "cudagraph_capture_sizes": [2],
}
# what no part of ours may add to; allocations and GEMM kernels are the dense layers'
COSTS = ("h2d", "d2h", "d2d", "memsets", "stream_syncs", "device_syncs", "event_syncs")


@contextmanager
def engine_on(place: str, tree: str, num_blocks: int = 6, **overrides: Any) -> Iterator[Any]:
    """An engine whose tensors are on a place."""
    missing = missing_entry_points()
    assert not missing, f"no entry point of {', '.join(missing)}: pip install --no-deps -e ."
    with installed(TREES[tree], OURS_ENV, place=place):
        from tests.fakes.driver import Engine

        yield Engine(demo_model_path(), num_blocks, **overrides)


def small_jobs() -> list[Any]:
    """Two rows of a few tokens, one of which goes on longer."""
    from tests.fakes.driver import Job

    prompts = demo_prompts()
    first, second = prompts["fact"].token_ids[:7], prompts["sum"].token_ids[:4]
    return [Job(first, 2, chunk=5), Job(second, 4)]


def leads_of(engine: Any) -> list[float]:
    """Collect the lead of each row's best logit over the second, from now on."""
    found: list[float] = []
    compute = engine.runner.model.compute_logits

    def compute_logits(hidden: Any, *rest: Any) -> Any:
        logits = compute(hidden, *rest)
        best = np.sort(logits.numpy(), axis=1)[:, -2:]
        found.extend((best[:, 1] - best[:, 0]).tolist())
        return logits

    engine.runner.model.compute_logits = compute_logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["pr7367", "develop"])
def test_answers_are_those_of_the_cpu(rig: Rig, tree: str) -> None:
    """Chunks beside decode rows, then decode steps as graphs, one of them padded."""
    if rig.is_real:
        pytest.skip("a GPU answers the long prompts")
    graphs = {**SMALL, "use_cudagraph": True}
    with engine_on("cpu", tree, **SMALL) as engine:
        leads = leads_of(engine)
        expected = engine.generate(small_jobs())
    assert min(leads) > 0.01
    with engine_on(rig.device, tree, **graphs) as engine:
        assert engine.generate(small_jobs()) == expected
        assert engine.runner.model.model.graph_opt_backend.cudagraphs.num_replays


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tree", ["pr7367", "develop"])
def test_answers_are_those_of_hugging_face(real_rig: Rig, tree: str, mode: str) -> None:
    prompts = demo_prompts()
    wanted = [one.token_ids + one.answer for one in prompts.values()]
    overlap = {"enable_overlap_schedule": TREES[tree].overlap_schedule}
    sizes = {**SIZES, **overlap, **MODES[mode].overrides}
    with engine_on(real_rig.device, tree, NUM_BLOCKS, **sizes) as engine:
        names, jobs = jobs_of(prompts, oracle(wanted, 4) if mode == "drafts" else None)
        answers = dict(zip(names, engine.generate(jobs), strict=True))
    assert answers == {name: prompts[name].answer for name in names}


class Costs:
    """Copies and waits of our parts: all of them, less those of FastDeploy's dense layers inside.

    Operators without a kernel of the plug-in are errors in our parts; in the dense layers they go
    through the host.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.found: Counter[str] = Counter()

    def _counted(self, function: Callable[..., Any], is_ours: bool) -> Callable[..., Any]:
        """The function, counted where it is ours, and taken off where it is FastDeploy's."""
        flag, sign = "FLAGS_enable_api_kernel_fallback", 1 if is_ours else -1

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, flags = Counter(self._rig.counters()), paddle.get_flags([flag])
            paddle.set_flags({flag: not is_ours})
            with counted_transfers() as transfers:
                result = function(*args, **kwargs)
            paddle.set_flags(flags)
            for name, count in self._rig.counters().items():
                self.found[name] += sign * (count - before[name])
            if is_ours:
                self.found.update(transfers)
            return result

        return counted

    def watch(self, engine: Any) -> None:
        """Count the metadata of a step and the attention of every layer."""
        backend = engine.runner.attn_backends[0]
        backend.init_attention_metadata = self._counted(backend.init_attention_metadata, True)
        for layer in engine.runner.model.model.layers:
            attention = layer.self_attn
            for name, inner in attention.named_sublayers():
                if list(inner.parameters(include_sublayers=False)) and name != "kv_b_proj":
                    inner.forward = self._counted(inner.forward, False)
            attention.forward = self._counted(attention.forward, True)

    def take(self) -> dict[str, int]:
        """Copies and waits since the last call."""
        found = {name: n for name, n in self.found.items() if n and name.startswith(COSTS)}
        self.found.clear()
        return found


def test_steps_copy_nothing_and_wait_for_nothing_in_our_parts(rig: Rig) -> None:
    """A prompt, one beside a decode row, decode rows: 0 a step and 0 a layer, one launch of each.

    Positions, slots and windows are one launch a step whatever the number of layers.
    """
    with engine_on(rig.device, "develop", **SMALL, enable_overlap_schedule=False) as engine:
        costs = Costs(rig)
        costs.watch(engine)
        waiting, has_windows = small_jobs(), []
        while waiting or any(engine.rows):
            with interpreted_launches() as launches:
                engine.step(waiting)
            assert costs.take() == {}
            has_windows.append(engine.runner.forward_meta.indexer_attn_mask_offsets is not None)
            if not rig.is_real:
                assert {launches.pop(name) for name in STEP_KERNELS} == {1}
                found = {name: launches[name] for name in FLOAT32_KERNELS}
                assert found == dict.fromkeys(FLOAT32_KERNELS, FEW_LAYERS)
    # a decode step has no windows
    assert has_windows == [True, True, False, False, False]

"""Our hooks before FastDeploy's runner: hints, positions, caches of bytes, weights made again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.backend import PluginBackend
from fd_dsa.fastdeploy_plugin.runner import FastDeployRunnerMixin
from fd_dsa.fastdeploy_plugin.take_over import derive
from tests.fakes.driver import Engine, Job
from tests.fakes.trees import OURS_ENV, TREES, UPSTREAM_ENV, V1_VARIABLE, installed
from tests.fastdeploy_plugin.watching import watch_steps


def engine(**overrides: Any) -> Engine:
    """FastDeploy's worker on the demo model, warmed up."""
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 128, "max_num_seqs": 2}
    return Engine(demo_model_path(), 16, **{**sizes, **overrides})


def test_the_runner_says_whether_a_step_has_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[bool | None] = []
    original = PluginBackend.set_step_hints

    def set_step_hints(backend: Any, has_prefill: bool | None) -> None:
        hints.append(has_prefill)
        original(backend, has_prefill)

    monkeypatch.setattr(PluginBackend, "set_step_hints", set_step_hints)
    with installed(TREES["develop"], OURS_ENV):
        made = engine(enable_overlap_schedule=False)
        # the profile run: one pass over prompts, then decoding
        assert hints[0] is True and set(hints[1:]) == {False}
        hints.clear()
        watch = watch_steps(made)
        jobs = [Job(list(range(1000, 1070)), 5, chunk=32), Job(list(range(500, 511)), 3)]
        jobs[1].start_at = 4
        made.generate(jobs)
    assert hints == [step.lengths[0].any() for step in watch.steps]
    assert set(hints) == {True, False}


def test_a_dummy_run_begins_with_prompts_whatever_the_flag_says() -> None:
    class Runner:
        def exist_prefill(self) -> bool:
            return False

        def _dummy_run(self, passes: int, fails: bool = False) -> Any:
            if fails:
                raise RuntimeError("out of memory")
            return [self.step_hints() for _ in range(passes)]  # type: ignore[attr-defined]

    runner = derive(FastDeployRunnerMixin, Runner)()
    assert runner._dummy_run(3) == [True, False, False]
    with pytest.raises(RuntimeError, match="out of memory"):
        runner._dummy_run(1, fails=True)
    # outside of a dummy run only the flag counts
    assert runner.step_hints() is False
    del Runner.exist_prefill
    assert runner.step_hints() is None


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("v1", [None, "1"])
def test_caches_are_bytes_in_every_tree(name: str, v1: str | None) -> None:
    """FastDeploy's own V0 loop makes them of the model's dtype from #8060 on, unlike V1's."""
    v1 = v1 if TREES[name].v1_cache_manager else None
    dtypes = []
    for env in (UPSTREAM_ENV, OURS_ENV):
        with installed(TREES[name], {**env, V1_VARIABLE: v1}):
            from fastdeploy.config import fd_config
            from fastdeploy.worker.gpu_worker import GpuWorker

            worker = GpuWorker(fd_config(demo_model_path(), max_model_len=256))
            worker.init_device()
            runner = worker.model_runner
            runner.initialize_kv_cache(profile=True)
            dtypes.append({str(one.dtype) for one in runner.share_inputs["caches"]})
            # also after an error, the model's own dtype is back
            assert runner.model_config.dtype == "float32"
    is_wrong = TREES[name].sliding_windows and v1 is None
    assert dtypes == [{"paddle.float32" if is_wrong else "paddle.uint8"}, {"paddle.uint8"}]


@pytest.mark.parametrize("made", [["float32"] * 12, ["uint8"] * 24], ids=["dtype", "scales"])
def test_other_caches_end_the_start_with_a_line(made: list[str]) -> None:
    """As of a tree that takes their dtype from elsewhere, or with a quantized KV cache."""
    with installed(TREES["develop"], OURS_ENV):
        runner = engine().runner
        upstream = type(runner).__bases__[1]
        caches = [paddle.zeros([1], dtype) for dtype in made]
        upstream.initialize_kv_cache = lambda self: self.share_inputs.update({"caches": caches})
        with pytest.raises(ConfigError, match=f"^caches: FastDeploy has made {len(made)} of "):
            runner.initialize_kv_cache()
        assert runner.model_config.dtype == "float32"


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_layers_share_a_backend_with_positions_of_the_runners_dtype(dtype: str) -> None:
    """FastDeploy makes a backend for each layer, and would make positions of its own."""
    with installed(replace(TREES["develop"], position_dtype=dtype), OURS_ENV):
        made = engine()
        runner, backends = made.runner, made.runner.attn_backends
        assert len(backends) == made.config.model_config.num_hidden_layers > 1
        assert len(set(map(id, backends))) == 1
        assert str(runner.forward_meta.position_ids.dtype) == f"paddle.{dtype}"
        made, positions = runner.forward_meta.slot_mapping, runner.forward_meta.position_ids
        runner._compute_position_ids_and_slot_mapping()
        assert runner.forward_meta.slot_mapping is made
        assert runner.forward_meta.position_ids is positions


def test_a_backend_without_our_runner_ends_the_start_with_a_line() -> None:
    """As of a worker that has kept FastDeploy's class."""
    with installed(TREES["develop"], OURS_ENV):
        from fastdeploy.worker import gpu_worker
        from fastdeploy.worker.gpu_model_runner import GPUModelRunner

        gpu_worker.ModelRunner = GPUModelRunner
        with pytest.raises(ConfigError, match=r"^model runner: FastDeploy runs one without fd_dsa"):
            engine()


def test_fastdeploys_own_layers_with_our_backend_end_the_start_with_a_line() -> None:
    """As of a model that another plug-in registers: its indexer selects other slots."""
    with installed(TREES["develop"], OURS_ENV):
        from fastdeploy.model_executor.models import ModelRegistry, deepseek_v3
        from fastdeploy.worker import gpu_worker  # noqa: F401

        ModelRegistry.register_model_class(deepseek_v3.DeepseekV32ForCausalLM)
        deepseek_v3.Indexer.forward = lambda self, meta, hidden, qr, rotary_emb: paddle.zeros(
            [hidden.shape[0], 4], "int32"
        )
        with pytest.raises(ConfigError, match=r"^attention layer: FastDeploy's own calls fd_dsa's"):
            engine()

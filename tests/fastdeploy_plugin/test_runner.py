"""Our hooks before FastDeploy's runner: hints, fields, caches and weights that are made again."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.backend import PluginBackend
from fd_dsa.fastdeploy_plugin.runner import FastDeployRunnerMixin, make_runner_class
from fd_dsa.fastdeploy_plugin.take_over import is_ours
from fd_dsa.fastdeploy_plugin.tree_checks import RUNNER_METHODS, UnsupportedTree
from tests.fakes.driver import Engine, Job
from tests.fakes.trees import OURS_ENV, TREES, V1_VARIABLE, installed, plugin_distribution
from tests.fastdeploy_plugin.names import RUNNER
from tests.fastdeploy_plugin.watching import watch_steps

SERVED = ["pr7367", "develop"]
# every token that follows leads by 0.3: a batch of other rows moves a logit by 0.003
PROMPTS = [list(range(1000, 1070)), list(range(500, 511))]


class Bare:
    """A runner with the methods that our hooks cannot do without, and nothing else."""

    attn_backends: Any = ()

    def initialize_forward_meta(self) -> None: ...

    def _initialize_attn_backend(self) -> None: ...

    def _compute_position_ids_and_slot_mapping(self) -> None: ...

    def initialize_kv_cache(self, profile: bool = False) -> None: ...


def engine(**overrides: Any) -> Engine:
    """FastDeploy's worker on the demo model, warmed up."""
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 128, "max_num_seqs": 2}
    return Engine(demo_model_path(), 16, **{**sizes, **overrides})


def jobs() -> list[Job]:
    """A prompt in chunks, and one that joins while the first decodes."""
    return [Job(PROMPTS[0], 5, chunk=32), Job(PROMPTS[1], 3, start_at=4)]


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
        made.generate(jobs())
    assert hints == [step.lengths[0].any() for step in watch.steps]
    assert set(hints) == {True, False}


def test_a_dummy_run_begins_with_prompts_whatever_the_flag_says() -> None:
    class Runner(Bare):
        def __init__(self) -> None:
            self.seen: list[bool | None] = []

        def exist_prefill(self) -> bool:
            return False

        def _dummy_run(self, passes: int, fails: bool = False) -> str:
            self.seen = [self.step_hints() for _ in range(passes)]  # type: ignore[attr-defined]
            if fails:
                raise RuntimeError("out of memory")
            return "what it returns"

    runner = make_runner_class(Runner)()
    assert runner._dummy_run(3) == "what it returns"
    assert runner.seen == [True, False, False]
    with pytest.raises(RuntimeError, match="out of memory"):
        runner._dummy_run(1, fails=True)
    # outside of a dummy run the flag alone counts
    assert runner.step_hints() is False
    del Runner.exist_prefill
    assert runner.step_hints() is None


def test_without_a_step_of_ours_positions_are_fastdeploys() -> None:
    """With one they are not made again, in no kind of step: see `test_behaviours_graphs.py`."""
    with installed(TREES["develop"], OURS_ENV):
        from fastdeploy import _counters

        runner = engine().runner
        for step, launches in ((runner.forward_meta.fd_dsa_step, 0), (None, 1)):
            _counters.clear()
            runner.forward_meta.fd_dsa_step = step
            runner._compute_position_ids_and_slot_mapping()
            names = [event.name for event in _counters.events("launch")]
            assert names.count("get_position_ids_and_mask_encoder_batch") == launches


def test_new_caches_let_the_step_go() -> None:
    with installed(TREES["develop"], OURS_ENV):
        runner = engine().runner
        backend, meta = runner.dsa_backend(), runner.forward_meta
        for method in ("initialize_kv_cache", "clear_cache"):
            backend.init_attention_metadata(SimpleNamespace(**vars(meta)))
            getattr(runner, method)()
            assert backend._built_for is None
            assert backend.core._built_for is None


def test_caches_that_are_no_bytes_are_refused_when_they_are_made() -> None:
    """Without the V1 manager #8060 makes them of the model's dtype; half would be read as codes."""
    reason = r"made them of float32.*ENABLE_V1_KVCACHE_MANAGER=1"
    env = {**OURS_ENV, V1_VARIABLE: "0"}
    with installed(TREES["develop"], env), pytest.raises(ConfigError, match=reason):
        engine()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_layers_share_a_backend_with_positions_of_the_runners_dtype(dtype: str) -> None:
    """FastDeploy makes a backend for each layer."""
    with installed(replace(TREES["develop"], position_dtype=dtype), OURS_ENV):
        made = engine()
        runner, backends = made.runner, made.runner.attn_backends
        assert len(backends) == made.config.model_config.num_hidden_layers > 1
        assert len(set(map(id, backends))) == 1
        buffer = runner.share_inputs["position_ids_buffer"]
        assert runner.forward_meta.position_ids.dtype == buffer.dtype
        assert str(buffer.dtype) == f"paddle.{dtype}"


def test_hooks_are_there_for_methods_that_the_tree_has() -> None:
    class Runner(Bare):
        def clear_cache(self, profile: bool = False) -> str:
            """Its own words."""
            return f"cleared, {profile}"

    made = make_runner_class(Runner)
    assert made.__name__ == "Runner"
    assert not any(hasattr(made, name) for name in ("_dummy_run", "wakeup", "update_weights"))
    assert made().clear_cache(profile=True) == "cleared, True"
    assert made.clear_cache.__doc__ == "Its own words."
    for lacking in RUNNER_METHODS:
        methods = {name: lambda self: None for name in RUNNER_METHODS if name != lacking}
        with pytest.raises(UnsupportedTree, match=f"^Lacking has no {lacking}$"):
            make_runner_class(type("Lacking", (), methods))


@pytest.mark.parametrize(
    "backends", [[], None, [None], [object()]], ids=["empty", "none", "a none", "foreign"]
)
def test_a_runner_with_another_backend_is_left_alone(backends: Any) -> None:
    class Runner(Bare):
        def __init__(self, *, backends: Any) -> None:
            self.attn_backends = backends
            self.calls: list[str] = []

        def initialize_forward_meta(self, is_dummy_or_profile_run: bool = False) -> str:
            self.calls.append(f"meta {is_dummy_or_profile_run}")
            self.forward_meta = SimpleNamespace()
            return "its own"

        def _prepare_inputs(self, *args: Any) -> tuple[int, Any]:
            self.initialize_forward_meta(True)
            return len(args), None

        def update_parameters(self, pid: int) -> int:
            self.calls.append("update")
            return pid

    runner = make_runner_class(Runner)(backends=backends)
    assert isinstance(runner, FastDeployRunnerMixin)
    assert runner._prepare_inputs(1, 2) == (2, None)
    assert runner.initialize_forward_meta() == "its own"
    assert runner.update_parameters(7) == 7
    assert vars(runner.forward_meta) == {}
    assert runner.calls == ["meta True", "meta False", "update"]


@pytest.mark.parametrize("name", SERVED)
def test_the_backend_alone_gives_the_same_tokens(name: str, tmp_path: Any) -> None:
    """FastDeploy falls back to its own runner when there are two plug-ins for it."""
    (tmp_path / "other_runner.py").write_text("def runner():\n    raise RuntimeError\n")
    plugin_distribution(tmp_path, "other", runner="other_runner:runner")
    with installed(TREES[name], OURS_ENV):
        expected = engine().generate(jobs())
    both = {**OURS_ENV, "FD_PLUGINS": "fd_dsa,other"}
    with installed(TREES[name], both, path=[tmp_path]):
        made = engine()
        assert type(made.runner) is import_module(RUNNER).GPUModelRunner
        assert is_ours(type(made.runner.attn_backends[0]))
        assert made.generate(jobs()) == expected

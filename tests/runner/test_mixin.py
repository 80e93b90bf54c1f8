"""The hook of both runners: metadata once a step, and nothing where there is no DSA backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig, StepHints
from fd_dsa.errors import MissingStepError
from fd_dsa.runner import DSAModelRunnerMixin


def make_backend() -> DSAAttentionBackend:
    layout = CacheLayout("float32", 16, 6, 2, 4)
    return DSAAttentionBackend(DSABackendConfig(2, 3, 8, 0.5, layout, 4, 32, 3, num_blocks=12))


class BaseRunner:
    """A runner like FastDeploy's: its hook makes a new `forward_meta` and may call the backends."""

    def __init__(self, backends: Any, calls_backends: bool = False, **fields: Any) -> None:
        if backends is not SimpleNamespace:
            self.attn_backends = backends
        self.calls_backends, self.fields, self.calls = calls_backends, fields, []

    def initialize_forward_meta(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append((args, kwargs))
        given = {
            "seq_lens_encoder": np.array([4, 0], np.int32),
            "seq_lens_decoder": np.array([17, 9], np.int32),
            "seq_lens_this_time": np.array([4, 1], np.int32),
            "block_tables": np.array([[5, 2, -1], [7, -1, -1]], np.int32),
        }
        self.forward_meta = SimpleNamespace(**(given | self.fields))
        if self.calls_backends:
            for backend in self.attn_backends:
                backend.init_attention_metadata(self.forward_meta)
        return "what the runner returns"


class Runner(DSAModelRunnerMixin, BaseRunner):
    """With the mixin before it."""


class PaddingRunner(Runner):
    """Knows its step and pads it to 8 tokens."""

    def step_hints(self) -> StepHints:
        return StepHints(5, 4, 21, 8)


class Foreign:
    """Another backend; touching it fails."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.mark.parametrize(
    "backends",
    [[], None, (), [None], [Foreign()], [Foreign(), make_backend()], SimpleNamespace],
    ids=["empty", "none", "tuple", "none inside", "foreign", "foreign first", "absent"],
)
def test_without_a_dsa_backend_the_step_is_untouched(backends: Any) -> None:
    plain, runner = BaseRunner(backends), Runner(backends)
    plain.initialize_forward_meta(True, is_dummy=False)
    assert runner.initialize_forward_meta(True, is_dummy=False) == "what the runner returns"
    assert runner.calls == [((True,), {"is_dummy": False})]
    assert vars(runner.forward_meta).keys() == vars(plain.forward_meta).keys()
    assert runner.dsa_backend() is None


@pytest.mark.parametrize("calls_backends", [False, True], ids=["hook only", "runner builds too"])
@pytest.mark.parametrize(("kind", "padding"), [(Runner, []), (PaddingRunner, [-1] * 3)])
def test_metadata_is_made_once_with_the_runners_hints(
    kind: type, padding: list[int], calls_backends: bool
) -> None:
    backend = make_backend()
    runner = kind([backend], calls_backends)
    for steps in (1, 2, 3):
        assert runner.initialize_forward_meta() == "what the runner returns"
        assert backend.builder.num_builds == steps
        slots = runner.forward_meta.slot_mapping.numpy().tolist()
        assert slots == [33, 34, 35, 36, 121, *padding]
        assert runner.forward_meta.fd_dsa_step is backend.attention_metadata
        assert runner.forward_meta.fd_dsa_step.num_prefill_tokens == 4


@pytest.mark.parametrize(
    "name", ["seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables"]
)
def test_a_field_that_the_runner_left_unset(name: str) -> None:
    runner = Runner([make_backend()], **{name: None})
    with pytest.raises(MissingStepError, match=rf"{name} is None.*initialize_forward_meta"):
        runner.initialize_forward_meta()
    assert "fd_dsa_step" not in vars(runner.forward_meta)


def test_a_failed_step_leaves_no_hints_behind() -> None:
    backend = make_backend()
    failing = PaddingRunner([backend], seq_lens_decoder=np.array([17, -1], np.int32))
    with pytest.raises(ValueError, match="row 1 is -1"):
        failing.initialize_forward_meta()
    runner = Runner([backend])
    runner.initialize_forward_meta()
    assert len(runner.forward_meta.slot_mapping) == 5

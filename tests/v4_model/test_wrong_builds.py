"""Faults in the model and its caches change the logits by far more than the tolerance of parity.

Each fault replaces a piece of a function's source. Those that only show with few Sinkhorn
iterations and large epsilons are put into the model of that case.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from fd_dsa.models.deepseek_v4.attention import V4Attention
from fd_dsa.models.deepseek_v4.compressor import Compressor
from fd_dsa.models.deepseek_v4.hyper import HyperConnection
from fd_dsa.models.deepseek_v4.model import DeepseekV4ForCausalLM
from fd_dsa.models.deepseek_v4.moe import V4Gate, V4MoE
from fd_dsa.models.deepseek_v4.rotation import Rotation
from fd_dsa.ops.logits import host_scores
from fd_dsa.v4_attention.backend import V4AttentionBackend
from fd_dsa.v4_attention.pooling import PoolingPlan, RecordPlan
from fd_dsa.v4_attention.step import V4Step
from tests.v4_model.cases import CASES
from tests.v4_model.ours import load_model, make_runner, prompt_logits
from tests.v4_model.test_parity import check, golden

# chunks begin inside a block and at one's start
LENGTH, CHUNK = 65, 24
# changes of logits around 4; parity holds to 1e-4
LEAST = 0.1

_ROPE = "-self._rope_dim :"
_ROTATE_HALVES = (
    "x = heads[:, :, -self._rope_dim :]; half = x.shape[2] // 2; "
    "y = np.stack((x[:, :, :half], x[:, :, half:]), 3).reshape(x.shape); "
    "rotate(y, angles.forward); x[:, :, :half], x[:, :, half:] = y[:, :, 0::2], y[:, :, 1::2]"
)
FAULTS: dict[str, tuple[str, Any, str, str, str]] = {
    "query's first channels rotated": ("mixed", V4Attention, "queries", _ROPE, ": self._rope_dim"),
    "pairs half a head apart": (
        *("mixed", V4Attention, "queries"),
        *("rotate(heads[:, :, -self._rope_dim :], angles.forward)", _ROTATE_HALVES),
    ),
    "no relu in the indexer": (
        *("mixed", host_scores, "weighted_scores"),
        *("np.clip(dots, 0.0, np.inf, out=dots)", "pass"),
    ),
    "entry rotated at its last position": (
        *("mixed", Compressor, "entries"),
        *("at(positions)", "at(positions + self._ratio - 1)"),
    ),
    "entry rotated at the group before": (
        *("mixed", Compressor, "entries"),
        *("at(positions)", "at(positions - self._ratio)"),
    ),
    "output not rotated back": (
        *("mixed", V4Attention, "forward"),
        *("angles.backward", "(angles.forward * 0 + 1)"),
    ),
    "main frequencies in all layers": (
        *("mixed", DeepseekV4ForCausalLM, "__call__"),
        *("angles[is_window]", "angles[True]"),
    ),
    "output rotated back by main frequencies": (
        *("mixed", DeepseekV4ForCausalLM, "__call__", "angles[is_window]"),
        "Angles(angles[is_window].forward, angles[True].backward)",
    ),
    "cos and sin scaled by mscale": (
        *("yarn", Rotation, "at"),
        *("return turns", "return turns * np.float32(1.139)"),
    ),
    "no sinks": ("mixed", V4AttentionBackend, "attend", "layer.sinks", "layer.sinks - 1e4"),
    "streams mixed by the transpose": (
        *("mixed", HyperConnection, "read"),
        *("mixture[:, :, :n] =", "mixture[:, :, :n].transpose(0, 2, 1)[...] ="),
    ),
    "rows before columns": (
        *("epsilons", HyperConnection, "_doubly_stochastic"),
        *("*(1, 0)", "*(0, 1)"),
    ),
    "one iteration fewer": (
        *("epsilons", HyperConnection, "_doubly_stochastic"),
        *("self._iterations - 1", "self._iterations - 2"),
    ),
    "no epsilon in Sinkhorn": (
        *("epsilons", HyperConnection, "_doubly_stochastic"),
        *("adder.dot", "(adder * (adder == 1)).dot"),
    ),
    "no epsilon of the streams read": (
        *("epsilons", HyperConnection, "read"),
        *("gates[:, :n] += self._eps", "pass"),
    ),
    "halves of sources swapped": (
        *("mixed", PoolingPlan, "__init__"),
        *("to(number // ratio", "to((pool // ratio - 1) - number // ratio"),
    ),
    "absent sources are zeros": ("mixed", PoolingPlan, "pooled", "= -np.inf", "= 0.0"),
    "one weight a source": (
        *("mixed", PoolingPlan, "pooled"),
        *("np.exp(gates, out=gates)", "gates[:] = np.exp(gates.mean(axis=2, keepdims=True))"),
    ),
    "gates without their place": (
        *("mixed", Compressor, "add_gates"),
        *("positions % self._ratio", "positions * 0"),
    ),
    "CSA entries seen one token late": (
        *("mixed", V4Step, "visible"),
        *("csa_visible[: self.num_tokens]", "positions[: self.num_tokens] // 4"),
    ),
    "HCA entries seen one token late": (
        *("mixed", V4Step, "_hca_visible"),
        *("np.diff(self._out.hca_indptr[: self.num_tokens + 1])", "self.positions // 16"),
    ),
    "window one shorter": (
        *("mixed", V4Step, "_row_tiles"),
        *("position - window)", "position - window + 1)"),
    ),
    "query heads not normed": ("mixed", V4Attention, "queries", "rows /= length", "length"),
    "indexer's query not rotated": (
        *("mixed", V4Attention, "index_queries"),
        *("query[:, :, -self._rope_dim :]", "query[:, :, -self._rope_dim :].copy()"),
    ),
    "indexer's query by main frequencies": (
        *("mixed", V4AttentionBackend, "forward", "projected, rotation)"),
        "projected, rotation._replace(forward="
        "np.exp(1j * forward_meta.position_ids[:, None, None] * 1e4 ** -(np.arange(4) / 4))"
        ".astype(np.complex64)))",
    ),
    "indexer chooses the lowest": (
        *("mixed", V4AttentionBackend, "select"),
        *("select_positions(scores, visible", "select_positions(-scores, visible"),
    ),
    "heads dealt to groups in turn": (
        *("mixed", V4Attention, "forward"),
        *(
            "attended.reshape(len(attended), self._groups, -1)",
            "attended.reshape(len(attended), -1, self._groups, self._width).transpose(0, 2, 1, 3)"
            ".reshape(len(attended), self._groups, -1)",
        ),
    ),
    "gate clamped from below": (
        *("mixed", V4MoE, "_activated"),
        *("-np.inf, self._limit", "-self._limit, self._limit"),
    ),
    "up not clamped from below": (
        *("mixed", V4MoE, "_activated"),
        *("-self._limit, self._limit", "-np.inf, self._limit"),
    ),
    "bias counts for the weights": (
        *("mixed", V4Gate, "forward"),
        *("best(scores +", "best(scores := scores +"),
    ),
    "weights not scaled": ("mixed", V4Gate, "forward", "weights * self._scaling", "weights"),
    "a repeated expert counts once": (
        *("repeated-experts", V4MoE, "forward"),
        *("= experts, weights", "= experts, weights * (np.diff(experts, prepend=-1) > 0)"),
    ),
    "no state is kept": ("mixed", PoolingPlan, "keep", "= sources[self._kept]", "= 0"),
    "nothing is restored at a block's start": (
        *("mixed", RecordPlan, "restore"),
        *("pools.records[self._restored_from]", "0"),
    ),
}


def put_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: str, after: str) -> None:
    """Replace a piece of a method's source."""
    held = inspect.getattr_static(owner, name)
    function = getattr(held, "func", getattr(held, "__func__", held))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(before) >= 1, f"{name} has no {before!r}"
    namespace = vars(sys.modules[getattr(owner, "__module__", owner.__name__)])
    made: dict[str, Any] = {}
    exec(source.replace(before, after), namespace, made)
    changed = made[name]
    if hasattr(changed, "__set_name__"):
        changed.__set_name__(owner, name)
    monkeypatch.setattr(owner, name, changed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The models of the cases that faults are put into."""
    names = dict.fromkeys(fault[0] for fault in FAULTS.values())
    return {n: load_model(CASES[n].write(tmp_path_factory.mktemp(n))) for n in names}


def logits_of(model: Any, name: str) -> np.ndarray:
    """Logits of a prompt in chunks."""
    case = CASES[name]
    (found,) = prompt_logits(make_runner(model, 16), [case.prompt(LENGTH)], CHUNK)
    return found


def test_without_a_fault(models: dict[str, Any]) -> None:
    for name, model in models.items():
        check(logits_of(model, name), golden(name), LENGTH)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *change = FAULTS[fault]
    put_in(monkeypatch, *change)
    with np.errstate(all="ignore"):
        found = logits_of(models[name], name)
    positions, logits = golden(name)[LENGTH]
    difference = np.abs(found[positions] - logits).max()
    assert not difference < LEAST, f"differs by {difference:.1e}"


@pytest.mark.parametrize("norm", ["a stream", "all streams"])
def test_norm_of_the_streams(
    norm: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams are normed together: each one alone gives other logits."""
    from fd_dsa.models.deepseek_v4 import hyper

    def by_stream(streams: np.ndarray, fn: Any, scale: np.ndarray, epsilon: float) -> np.ndarray:
        mean = np.square(streams).mean(axis=2, keepdims=True)
        normed = (streams / np.sqrt(mean + epsilon)).reshape(len(streams), -1)
        return fn.matmul(normed) * scale / np.sqrt(np.float32(normed.shape[1]))

    if norm == "a stream":
        monkeypatch.setattr(hyper, "_mixes", by_stream)
    positions, logits = golden("mixed")[LENGTH]
    difference = np.abs(logits_of(models["mixed"], "mixed")[positions] - logits).max()
    assert (difference > LEAST) == (norm == "a stream")

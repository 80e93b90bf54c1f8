"""The same requests through FastDeploy's own DSA path and through ours, both in the double.

    with upstream(): engine = make_engine()
    with ours(): engine = make_engine()

What the layers choose and what a step costs is recorded in the same way on both sides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.config import demo_model_path
from tests.fakes.trees import (
    DEVELOP,
    OURS_ENV,
    UPSTREAM_ENV,
    Tree,
    installed,
    plugin_distribution,
)

BLOCK_SIZE = 64
NUM_LAYERS = 6
# without the overlap schedule a call of the worker is a step, and none comes after the last token
SMALL = {
    "max_model_len": 256,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 4,
    "enable_overlap_schedule": False,
}
PLUGIN = "fd_dsa.fastdeploy_plugin"


@contextmanager
def upstream(tree: Tree = DEVELOP, *, any_heads: bool = True) -> Iterator[None]:
    """FastDeploy's own path; its kernels take the demo model's few heads, unless they may not."""
    with installed(tree, UPSTREAM_ENV):
        import deep_gemm
        import flash_mla

        deep_gemm.any_heads = flash_mla.any_heads = any_heads
        yield


@contextmanager
def ours(tree: Tree = DEVELOP, **env: str) -> Iterator[None]:
    """Our path, found through its entry points."""
    with tempfile.TemporaryDirectory() as folder:
        targets = {"register": f"{PLUGIN}:register", "runner": f"{PLUGIN}:model_runner"}
        path = plugin_distribution(Path(folder), "fd_dsa", **targets)
        with installed(tree, {**OURS_ENV, **env}, path=[path]):
            yield


SIDES = {"upstream": upstream, "ours": ours}


def make_engine(num_gpu_blocks: int = 24, **overrides: Any) -> Any:
    """An engine with the demo model; the events of its start are forgotten."""
    from tests.fakes.driver import Engine

    engine = Engine(demo_model_path(), num_gpu_blocks, **{**SMALL, **overrides})
    from fastdeploy import _counters

    _counters.clear()
    return engine


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of the demo model."""
    return np.random.default_rng(seed).integers(10, 4000, num_tokens).tolist()


def generate(*jobs: Any, **overrides: Any) -> list[list[int]]:
    """Greedy tokens of jobs in an engine of their own."""
    return make_engine(**overrides).generate(jobs)


@dataclass
class Choice:
    """What an indexer gave for a step.

    Attributes:
        step, layer: counted from 0.
        indices: int32 [num_tokens, topk].
        address: of the tensor that held them.
        tables: block tables of the step.
        keys: the layer's indexer cache after it.
    """

    step: int
    layer: int
    indices: np.ndarray
    address: int
    tables: np.ndarray
    keys: np.ndarray
    hidden: np.ndarray

    def chosen(self, token: int) -> list[int]:
        """What a token attends to, ascending."""
        return sorted(int(i) for i in self.indices[token] if i >= 0)


@dataclass
class Record:
    """Choices of the layers, in the order they were made."""

    choices: list[Choice] = field(default_factory=list)

    def of(self, step: int, layer: int = 0) -> Choice:
        """The choice of a layer in a step."""
        (found,) = (c for c in self.choices if (c.step, c.layer) == (step, layer))
        return found


def record_choices(engine: Any) -> Record:
    """Every result of every indexer from now on."""
    from fastdeploy._arrays import host

    record = Record()

    def keep(indexer: Any, inputs: tuple[Any, ...], result: Any) -> None:
        meta, hidden = inputs[:2]
        record.choices.append(
            Choice(
                step=len([c for c in record.choices if c.layer == indexer.layer_id]),
                layer=indexer.layer_id,
                indices=host(result).copy(),
                address=result.data_ptr(),
                tables=host(meta.block_tables).copy(),
                keys=host(meta.caches[2 * indexer.layer_id + 1]).copy(),
                hidden=host(hidden).copy(),
            )
        )

    for layer in engine.runner.model.model.layers:
        layer.self_attn.indexer.register_forward_post_hook(keep)
    return record


def slots_of(table: np.ndarray, num_keys: int) -> list[int]:
    """Cache slots of a row's first keys, ascending."""
    positions = np.arange(num_keys)
    slots = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return sorted(slots.tolist())


def launches(name: str = "") -> dict[int, int]:
    """Launches of FastDeploy's operators whose names begin so, by step."""
    from fastdeploy import _counters

    found: dict[int, int] = {}
    for event in _counters.events("launch"):
        if event.name.startswith(name):
            found[event.step] = found.get(event.step, 0) + 1
    return found


def in_layers(kind: str, name: str | None = None) -> list[Any]:
    """Events within layers of the DSA path; the double's other layers are not looked at."""
    from fastdeploy import _counters

    modules = ("fd_dsa", "fastdeploy.model_executor.models.indexer_forward", "flash_mla")
    modules += ("fastdeploy.model_executor.layers.attention", "deep_gemm")
    return [
        event
        for event in _counters.events(kind, name)
        if event.layer is not None and event.module.startswith(modules)
    ]

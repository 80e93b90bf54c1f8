"""A look at every step of the double's runner: what was launched, and what it wrote.

    engine = small_engine()
    watch = watch_steps(engine)
    engine.generate(jobs)
    watch.steps[3].launched

The caches are compared as bytes before and after the model: a step may write the slots of its own
tokens and no others, whatever was launched beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
import pytest

from tests.fastdeploy_plugin.engines import make_engine

LATENT, INDEX, BLOCK_SIZE = 656, 132, 64
READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy")
READS += ("tolist",)
CREATIONS = ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like")
CREATIONS += ("to_tensor", "zeros", "zeros_like")


def small_engine(num_gpu_blocks: int = 24, **overrides: Any) -> Any:
    """An engine with the first two layers of the demo model, for steps rather than answers."""
    return make_engine(num_gpu_blocks, **{"num_hidden_layers": 2, **overrides})


def answers(*jobs: Any, **overrides: Any) -> list[list[int]]:
    """Greedy tokens of jobs, in order, in an engine of their own, eagerly."""
    engine = small_engine(**overrides)
    return [engine.generate([job])[0] for job in jobs]


@dataclass(frozen=True)
class Step:
    """One call of the model.

    Attributes:
        launched, tokens: what the step was launched for, and what its rows hold.
        lengths: int32 [3, rows]: encoder, decoder, this_time.
        tables: int32 [rows or more, M]; block tables.
        forward_meta: of the step.
        position_ids, slot_mapping: its fields, as they were.
        with_graph: whether it ran as a graph.
    """

    launched: int
    tokens: int
    lengths: np.ndarray
    tables: np.ndarray
    forward_meta: Any
    position_ids: np.ndarray
    slot_mapping: np.ndarray
    with_graph: bool


@dataclass
class Watch:
    """All steps so far, and slots of a layer that a step has written without right."""

    steps: list[Step] = field(default_factory=list)
    trespasses: list[tuple[int, int, list[int]]] = field(default_factory=list)

    def kinds(self) -> set[str]:
        """Return the kinds of steps that ran."""
        found = set()
        for step in self.steps:
            encoder, decoder, now = step.lengths
            found |= {
                name
                for name, is_so in {
                    "prefill": encoder.any() and (encoder == now).all(),
                    "decode": not encoder.any(),
                    "mixed": (encoder > 0).any() and ((encoder == 0) & (now > 0)).any(),
                    "later chunk": ((encoder > 0) & (decoder > 0)).any(),
                    "idle row between others": len(now) > 1 and (now[:-1] == 0).any(),
                    "drafts": ((encoder == 0) & (now > 1)).any(),
                    "surplus": step.launched > step.tokens,
                    "graph": step.with_graph,
                }.items()
                if is_so
            }
        return found


@contextmanager
def own_costs(engine: Any) -> Iterator[list[tuple[str, bool]]]:
    """Reads of tensors by Python, and tensors that it makes, which fd_dsa's code causes.

    On a GPU a read is a wait. Yields a list of (name, in a layer), in order.
    """
    found: list[tuple[str, bool]] = []
    inside = [False]
    hooks = []
    for layer in engine.runner.model.model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)))
        hooks.append(layer.register_forward_post_hook(lambda *_: inside.__setitem__(0, False)))

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("fd_dsa"):
                found.append((name, inside[0]))
            return original(*args, **kwargs)

        return function

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((paddle.Tensor, READS), (paddle, CREATIONS)):
            for name in names:
                patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield found
    for hook in hooks:
        hook.remove()


def watch_steps(engine: Any) -> Watch:
    """Every call of the engine's model from now on."""
    from fastdeploy._arrays import host

    runner, watch, before = engine.runner, Watch(), []

    def replays() -> int:
        return sum(runner.model.model.graph_opt_backend.cudagraphs.num_replays.values())

    def look(model: Any, inputs: tuple[Any, ...]) -> None:
        before[:] = [
            [host(cache).copy() for cache in runner.share_inputs["caches"]],
            _step_lengths(runner),
            host(runner.share_inputs["block_tables"]).copy(),
            replays(),
        ]

    def compare(model: Any, inputs: tuple[Any, ...], result: Any) -> None:
        caches, lengths, tables, replayed = before
        meta = runner.forward_meta
        slots = _slots(lengths, tables)
        for index, (old, cache) in enumerate(zip(caches, meta.caches, strict=True)):
            wrong = set(_changed_slots(old, host(cache))) - slots
            if wrong:
                watch.trespasses.append((len(watch.steps), index // 2, sorted(wrong)))
        watch.steps.append(
            Step(
                launched=meta.ids_remove_padding.shape[0],
                tokens=int(lengths[2].sum()),
                lengths=lengths,
                tables=tables,
                forward_meta=meta,
                position_ids=host(meta.position_ids).copy(),
                slot_mapping=host(meta.slot_mapping).copy(),
                with_graph=replays() > replayed,
            )
        )

    # in trees that call the model with keywords, hooks get no positional inputs
    runner.model.register_forward_pre_hook(look)
    runner.model.register_forward_post_hook(compare)
    return watch


def _step_lengths(runner: Any) -> np.ndarray:
    """int32 [3, rows]: encoder, decoder, this_time of the running rows."""
    from fastdeploy._arrays import host

    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
    encoder, decoder, now = (host(runner.share_inputs[name]).reshape(-1) for name in names)
    return np.stack([encoder[: len(now)], decoder[: len(now)], now]).copy()


def _slots(lengths: np.ndarray, tables: np.ndarray) -> set[int]:
    """Slots of the step's own tokens."""
    _, decoder, now = lengths
    found = set()
    for row, (start, count) in enumerate(zip(decoder, now, strict=True)):
        positions = start + np.arange(count)
        blocks = tables[row, positions // BLOCK_SIZE].astype(np.int64)
        found |= set((blocks * BLOCK_SIZE + positions % BLOCK_SIZE).tolist())
    return found


def _changed_slots(old: np.ndarray, new: np.ndarray) -> list[int]:
    """Slots of a latent cache [N, 1, 64, 656] or an indexer cache [N, 64, 132] that differ."""
    if old.shape[-1] == LATENT:
        differ = (old != new).any(axis=-1)
    else:
        # all codes of a block come before its scales, four bytes a token
        split = BLOCK_SIZE * (INDEX - 4)
        changed = (old != new).reshape(len(old), -1)
        codes = changed[:, :split].reshape(len(old), BLOCK_SIZE, -1).any(axis=-1)
        scales = changed[:, split:].reshape(len(old), BLOCK_SIZE, -1).any(axis=-1)
        differ = codes | scales
    return np.flatnonzero(differ.reshape(-1)).tolist()

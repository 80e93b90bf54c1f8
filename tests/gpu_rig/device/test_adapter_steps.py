"""Steps as an adapter to FastDeploy makes them: what they launch, wait for and allocate, in graphs.

Lengths and tables are tensors of the device, counts are upper bounds, the metadata is made before
the layers and outside of their graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.attention import StepHints
from fd_dsa.triton_runtime import interpreter
from tests.attention.bfloat16_case import Bfloat16Step, Bfloat16World, Rows
from tests.gpu_rig import Rig
from tests.kernel_memory import open_memory
from tests.strategies import make_batch

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

MIXED = [(5, 0, 5), (0, 0, 0), (0, 70, 1), (2, 63, 2)]
DECODE = [(0, 70, 2), (0, 0, 0), (0, 3, 2), (0, 64, 2)]
STEPS = pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
LAYER_KERNELS = {
    "write_caches_kernel",
    "prepare_query_kernel",
    "tile_kernel",
    "topk_kernel",
    "prepare_mla_query_kernel",
    "attend_kernel",
}
# once a step, whatever the number of layers
STEP_KERNELS = ("step_metadata_kernel", "tile_schedule_kernel")


def make_world(rows: Rows) -> Bfloat16World:
    """A world of a few heads on the device."""
    return Bfloat16World(open_memory("rig"), make_batch(rows, 64), heads=4)


@contextmanager
def interpreted_launches() -> Iterator[Counter[str]]:
    """Launches by kernel, in a process that interprets them."""
    counts: Counter[str] = Counter()
    original = interpreter.run

    def counting(launched: Any, *args: Any) -> None:
        # the step's kernel has a form for steps without prompts and one for all others
        counts[re.sub("^(decode|mixed)_", "", launched.__name__)] += 1
        original(launched, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "run", counting)
        yield counts


class Layers:
    """A step of several layers, which share the caches and inputs of one."""

    def __init__(self, world: Bfloat16World) -> None:
        self.world, self.step = world, Bfloat16Step(world, world.rows)
        self.inputs = [world.m.put(array) for array in world.inputs(world.rows)]
        self.given, self.hints = self.step.given(), world.hints(world.rows)

    def build(self) -> None:
        """The metadata, for a new object of the runner."""
        self.step.meta = SimpleNamespace(caches=self.world.caches)
        self.step.build(self.hints, self.inputs)

    def run(self, num_layers: int) -> None:
        """The metadata and the layers."""
        self.build()
        for _ in range(num_layers):
            self.step.layer(self.step.meta, self.given)


@pytest.mark.own_process
@STEPS
def test_metadata_launches_do_not_grow_with_the_layers(rig: Rig, rows: Rows) -> None:
    layers = Layers(make_world(rows))
    # kernels are compiled, and views made, outside of a capture
    layers.run(1)
    builder = layers.world.backend.builder
    before = builder.num_builds
    for number, num_layers in enumerate((0, 1, 3), start=1):
        if rig.is_real:
            with rig.capture() as captured:
                layers.run(num_layers)
            launches = captured.num_nodes
        else:
            with interpreted_launches() as counts:
                layers.run(num_layers)
            launches = counts.total()
            # a graph does not say which kernels it has
            assert {counts.pop(name) for name in STEP_KERNELS} == {1}
            assert counts == dict.fromkeys(LAYER_KERNELS, num_layers) if num_layers else not counts
        assert launches == len(STEP_KERNELS) + num_layers * len(LAYER_KERNELS)
        assert builder.num_builds == before + number


@STEPS
def test_a_step_copies_nothing_waits_for_nothing_and_takes_no_memory(rig: Rig, rows: Rows) -> None:
    layers = Layers(make_world(rows))
    layers.run(1)
    with rig.strict(), rig.counting() as counted:
        layers.run(2)
    assert counted.delta == {}


@pytest.mark.own_process
def test_a_graph_of_the_layers_follows_steps_that_are_made_outside_of_it(rig: Rig) -> None:
    world = make_world([(0, 70, 4), (0, 0, 0), (0, 3, 5), (0, 64, 4)])
    captured = Bfloat16Step(world, DECODE, padding=0)
    size = captured.num_tokens
    inputs = [world.m.put(array) for array in world.inputs(DECODE)]
    given = captured.given()
    captured.build(world.hints(DECODE, padding=0), inputs)
    captured.layer(captured.meta, given)
    captured.check()
    replay = None
    if rig.is_real:
        with rig.strict(), rig.capture() as capture:
            captured.layer(captured.meta, given)
        replay = capture.replay
    # fewer tokens than captured, rows that come and go, all tokens again, none
    for rows in (
        [(0, 71, 1), (0, 0, 0), (0, 5, 2), (0, 66, 1)],
        [(0, 0, 0), (0, 0, 0), (0, 6, 1), (0, 0, 0)],
        [(0, 72, 2), (0, 0, 0), (0, 6, 2), (0, 66, 2)],
        [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0)],
    ):
        step = Bfloat16Step(world, rows, padding=size - sum(new for _, _, new in rows))
        for tensor, array in zip(inputs, world.inputs(rows), strict=True):
            tensor.copy_(world.m.put(array), False)
        for name, fresh in step.given().items():
            if name not in ("kv_a", "index_k"):
                given[name].copy_(fresh, False)
        # without a graph the layers take the padded size from the metadata instead
        padded = None if rig.is_real else size
        hints = StepHints(step.num_tokens, 0, 128, padded)
        with rig.strict(), rig.counting() as counted:
            step.build(hints, inputs)
            if replay is None:
                captured.layer(step.meta, given)
            else:
                replay()
        assert counted.delta == {}
        step.results = captured.results
        step.check()

"""Two ranks whose model is on a device: the runner's graphs and draws, and the queued steps.

The ranks are threads of one process, as the plug-in has one device. They take turns, since Triton's
interpreter is one for a process; sums and gathered logits go through the host.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import SamplingParams
from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.loader import rank_parts
from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.weights import HostWeights
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.runner.ranks import DriverRunner, WorkerRunner
from fd_dsa.startup.capture import capture_graphs
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import byte_tokenizer, run_all
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import stand_in
from tests.runner.tiny import V32, random_tensors, stored

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow]

NUM_BLOCKS, BLOCK_SIZE, MAX_LEN, ROWS = 24, 16, 48, 4
CONFIG = config_from_dict(V32 | {"num_hidden_layers": 2, "vocab_size": 300})


class Turns(HostGroup):
    """A rank that lets others run while it waits."""

    turn = threading.Lock()

    def wait_eventfd(self, fd: int) -> None:
        self.turn.release()
        try:
            super().wait_eventfd(fd)
        finally:
            self.turn.acquire()


class ThroughHost(Group):
    """A group whose tensors are on the device."""

    def __init__(self, host: HostGroup) -> None:
        self._host, self.rank, self.size = host, host.rank, host.size

    def all_reduce(self, tensor: Any) -> Any:
        total = self._host.all_reduce(tensor.numpy())
        tensor.copy_(paddle.to_tensor(total, place=tensor.place), False)
        return tensor

    def all_gather(self, tensor: Any) -> Any:
        return paddle.to_tensor(self._host.all_gather(tensor.numpy()), place=tensor.place)

    def barrier(self) -> None:
        self._host.barrier()

    def close(self) -> None:
        """Nothing is held."""


class Ranks:
    """The other rank, as DriverRunner sends to it."""

    def __init__(self, group: HostGroup) -> None:
        self._group, self.num_messages = group, 0

    @contextmanager
    def step(self, message: bytes | None) -> Iterator[None]:
        if message is not None:
            self.num_messages += 1
            self._group.send(message)
        yield


def make_runner(kind: type[Any], weights: Any, device: str, group: Group | None = None) -> Any:
    size = group.size if group else 1
    model = create_model(CONFIG.split(size), weights)
    part_of, _ = rank_parts(CONFIG, group)
    for name, array in random_tensors(CONFIG).items():
        model.loaders[name](part_of(name, stored(name, array)))
    weights.finish()
    batch = InputBatch(ROWS, 32, MAX_LEN // BLOCK_SIZE, BLOCK_SIZE)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    return kind(model, batch, layout, NUM_BLOCKS, device, max_drafts=2)


def on_device(kind: type[Any], group: HostGroup, rig: Rig, sizes: tuple[int, ...]) -> Any:
    """A rank's runner, warm and with graphs where sizes are given."""
    there = ThroughHost(group)
    weights = DeviceWeights("float32", paddle_allocator(rig.device), group=there)
    runner = make_runner(kind, weights, rig.device, there)
    if sizes:
        capture_graphs(runner, sizes, stand_in)
        assert runner.captured_sizes == sizes
    return runner


def answers(runner: Any, known: list[Any] | None = None) -> list[tuple[list[int], str | None]]:
    """Tokens and finish reasons of requests that are drawn on the device, and on the host.

    Args:
        runner: of the engine.
        known: what they will be, of which drafts are made.
    """
    spec_decoder = None
    if known:
        tokens = {(str(number), 0): one for number, (one, _) in enumerate(known)}
        spec_decoder = SpecDecoder(KnowingDrafter(tokens, 0.7, 250), 2)
    engine = LLMEngine(
        runner,
        byte_tokenizer(),
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_LEN,
        eos_token_ids=[1],
        spec_decoder=spec_decoder,
    )
    prompts = np.random.default_rng(4).integers(2, 250, (5, 18)).tolist()
    rules = {"repetition_penalty": 1.3, "logit_bias": {9: 3.0}}
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 7, "top_k": 20}, rules]
    kinds.append({"structured_outputs": StructuredOutputsParams(choice=["abc", "dcb"])})
    kinds.append({"logprobs": 1})
    for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        params = SamplingParams(**{"temperature": 0, "max_tokens": 5, **kind})
        engine.add_request(str(number), prompt[: 6 + 3 * number], params)
    done = run_all(engine)
    assert (engine.stats().num_accepted_tokens > 0) == bool(known)
    last = [done[str(number)][-1] for number in range(len(prompts))]
    return [(output.token_ids, output.finish_reason) for output in last]


@pytest.mark.parametrize(
    ("sizes", "has_drafts"),
    [((1, 4), False), ((), True)],
    ids=["graphs", "drafts"],
)
def test_tokens_of_two_ranks_are_those_of_a_cpu(
    rig: Rig, sizes: tuple[int, ...], has_drafts: bool
) -> None:
    if rig.is_real:
        pytest.skip("its ranks are processes: tests of the collectives on GPUs have them")
    shared = Shared.create(2)
    first, second = Turns(0, shared), Turns(1, shared)
    failures: list[BaseException] = []

    def follow() -> None:
        with Turns.turn:
            paddle.set_device(rig.device)
            try:
                on_device(WorkerRunner, second, rig, sizes).serve(second.receive)
            except BaseException as error:
                failures.append(error)

    # a failure of this thread leaves it waiting
    follower = threading.Thread(target=follow, daemon=True)
    with Turns.turn:
        expected = answers(make_runner(ModelRunner, HostWeights(), "cpu"))
        follower.start()
        runner = on_device(DriverRunner, first, rig, sizes)
        ranks = Ranks(first)
        runner.lead(ranks)
        assert answers(runner, expected if has_drafts else None) == expected
        assert ranks.num_messages > 8 and runner.counters.mask_offsets_skipped > 2
        first.send(b"")
    follower.join(60)
    assert [type(error) for error in failures] == [EOFError]
    first.close()

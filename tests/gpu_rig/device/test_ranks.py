"""Two ranks whose model is on a device: the runner's graphs and draws, and the queued steps.

The ranks are threads of one process, as the plug-in has one device. They take turns, since Triton's
interpreter is one for a process; sums and gathered logits go through the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import SamplingParams
from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter
from fd_dsa.engine.speculation import Drafter, SpecDecoder
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.loader import rank_parts
from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.sources import MTP_HEAD
from fd_dsa.models.weights import HostWeights
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.runner.input_batch import SamplingInputs, StepInputs
from fd_dsa.runner.ranks import DriverRunner, WorkerRunner
from fd_dsa.startup.capture import capture_graphs
from fd_dsa.startup.measure import measure_step_table
from fd_dsa.startup.warm_up import warm_up_kernels
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import byte_tokenizer, run_all
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import stand_in
from tests.runner.dsa import dsa_runner
from tests.runner.following import all_of
from tests.runner.tiny import V32, random_tensors, stored

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow]

NUM_BLOCKS, BLOCK_SIZE, MAX_LEN, ROWS = 24, 16, 48, 4
# steps of 25 to 32 tokens with prompts are eager
PROMPT_SIZES = 8, 24
FIELDS = V32 | {"num_hidden_layers": 2, "vocab_size": 300, "num_nextn_predict_layers": 1}
PLAIN, MOST = config_from_dict(FIELDS), 2
# the MTP layer has a head of its own, which the ranks split
WITH_LAYER = PLAIN.with_mtp_layer(MTP_HEAD)


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
        self.num_divided = self.num_exchanged = self.num_scattered = 0

    def all_reduce(self, tensor: Any) -> Any:
        # NumPy has no bfloat16
        total = self._host.all_reduce(tensor.astype("float32").numpy())
        tensor.copy_(paddle.to_tensor(total, place=tensor.place).astype(tensor.dtype), False)
        return tensor

    def reduce_scatter(self, tensor: Any) -> Any:
        self.num_scattered += 1
        return super().reduce_scatter(tensor)

    def all_gather(self, tensor: Any) -> Any:
        return paddle.to_tensor(self._host.all_gather(tensor.numpy()), place=tensor.place)

    def all_gather_rows(self, rows: Any, bounds: Sequence[int]) -> None:
        self.num_divided += 1
        found = rows.numpy()
        self._host.all_gather_rows(found, bounds)
        rows.copy_(paddle.to_tensor(found, place=rows.place), False)

    def exchange_rows(
        self, source: Any, source_bounds: Sequence[int], target: Any, target_bounds: Sequence[int]
    ) -> None:
        self.num_exchanged += 1
        rows, found = source.numpy(), target.numpy()
        # equal for all ranks, and at least as many as a step has
        padded = np.zeros((self.size, 32, rows.shape[1]), rows.dtype)
        for place, (begin, end) in zip(padded, pairwise(source_bounds), strict=True):
            place[: end - begin] = rows[begin:end]
        given = self._host.all_gather(padded)[:, self.rank]
        for place, (begin, end) in zip(given, pairwise(target_bounds), strict=True):
            found[begin:end] = place[: end - begin]
        target.copy_(paddle.to_tensor(found, place=target.place), False)

    def barrier(self) -> None:
        self._host.barrier()

    def close(self) -> None:
        """Nothing is held."""


class Watched(ModelRunner):
    """Runner that records its batch and graph at each step, and the drafts of its layer."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.drafts: list[list[int]] = []
        self.batches: list[dict[str, object]] = []

    def stage(self, sampled: np.ndarray, sampling: SamplingInputs) -> StepInputs:
        self.batches.append(all_of(self.input_batch) | {"graph": self.graph_key})
        return super().stage(sampled, sampling)

    def draft(self, num_requests: int, count: int) -> None:
        super().draft(num_requests, count)
        tokens, buffer = self.read_drafts().result(), self.token_buffer
        for depth in range(count):
            begin = buffer.draft(depth, 0)
            self.drafts.append(tokens[begin : begin + num_requests].tolist())


class Driver(Watched, DriverRunner):
    """Runner of rank 0."""


class Worker(Watched, WorkerRunner):
    """Runner of rank 1."""


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


def make_runner(
    kind: type[Any], weights: Any, device: str, config: ModelConfig, group: Group | None = None
) -> Any:
    size = group.size if group else 1
    model = create_model(config.split(size), weights)
    part_of, _ = rank_parts(config, group)
    for name, array in random_tensors(config).items():
        weights.loaders[name](part_of(name, stored(name, array)))
    weights.finish()
    batch = InputBatch(ROWS, 32, MAX_LEN // BLOCK_SIZE, BLOCK_SIZE)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    sizes = model, batch, layout, NUM_BLOCKS, device
    return dsa_runner(*sizes, max_drafts=MOST, kind=kind)


def on_device(
    kind: type[Any], group: HostGroup, rig: Rig, sizes: tuple[int, ...], config: ModelConfig
) -> Any:
    """A rank's runner, warm and with graphs where sizes are given."""
    there = ThroughHost(group)
    weights = DeviceWeights("float32", paddle_allocator(rig.device), group=there)
    runner = make_runner(kind, weights, rig.device, config, there)
    if sizes:
        capture_graphs(runner, sizes, stand_in, PROMPT_SIZES)
        assert runner.graphs and runner.graphs.sizes == sizes
        assert tuple(runner.graphs.prompts) == PROMPT_SIZES
    return runner


class Followed:
    """The thread of rank 1, which starts with the object.

    Attributes:
        failures: what ended it.
        workers: its runner.
    """

    def __init__(self, rig: Rig, group: Turns, make: Callable[[], Worker]) -> None:
        self.failures: list[BaseException] = []
        self.workers: list[Worker] = []
        self._work = rig.device, group, make
        # a failure of this thread leaves it waiting
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        device, group, make = self._work
        with Turns.turn:
            paddle.set_device(device)
            try:
                self.workers.append(make())
                self.workers[0].serve(group.receive)
            except BaseException as error:
                self.failures.append(error)

    def join(self) -> None:
        """Wait for the end, which an empty message brings."""
        self._thread.join(60)
        assert [type(error) for error in self.failures] == [EOFError]


def engine_of(
    runner: Any, spec_decoder: SpecDecoder | None, num_blocks: int = NUM_BLOCKS
) -> LLMEngine:
    """Make an engine on the runner of rank 0."""
    return LLMEngine(
        runner,
        byte_tokenizer(),
        num_blocks=num_blocks,
        max_model_len=MAX_LEN,
        eos_token_ids=[1],
        spec_decoder=spec_decoder,
    )


def answers(runner: Any, drafter: Drafter | None = None) -> list[tuple[list[int], str | None]]:
    """Tokens and finish reasons of requests that are drawn on the device, and on the host."""
    engine = engine_of(runner, SpecDecoder(drafter, MOST) if drafter else None)
    prompts = np.random.default_rng(4).integers(2, 250, (5, 18)).tolist()
    rules = {"repetition_penalty": 1.3, "logit_bias": {9: 3.0}}
    # only three tokens are likely, so a random layer has accepted drafts
    few = {"logit_bias": {2: 50.0, 3: 50.0, 4: 50.0}, "temperature": 0.9, "max_tokens": 12}
    kinds: list[dict[str, Any]] = [few, {"temperature": 0.9, "seed": 7, "top_k": 20}, rules]
    kinds.append({"structured_outputs": StructuredOutputsParams(choice=["abc", "dcb"])})
    kinds.append({"logprobs": 1})
    for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        params = SamplingParams(**{"temperature": 0, "max_tokens": 5, **kind})
        engine.add_request(str(number), prompt[: 6 + 3 * number], params)
    done = run_all(engine)
    assert (engine.stats().num_accepted_tokens > 0) == bool(drafter)
    last = [done[str(number)][-1] for number in range(len(prompts))]
    return [(output.token_ids, output.finish_reason) for output in last]


@pytest.mark.parametrize(
    ("sizes", "method", "exchanged"),
    [((1, 4), None, 8), ((), "known", 0), ((), "mtp", 8), ((4,), "mtp", 0)],
    ids=["graphs", "drafts", "by tokens", "layer"],
)
def test_tokens_of_two_ranks_are_those_of_a_cpu(
    rig: Rig,
    sizes: tuple[int, ...],
    method: str | None,
    exchanged: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rig.is_real:
        pytest.skip("its ranks are processes: tests of the collectives on GPUs have them")
    # prompts past the selection are divided
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "2")
    # their attention is divided by tokens
    monkeypatch.setenv("FD_DSA_EXCHANGED_MIN_TOKENS", str(exchanged))
    shared = Shared.create(2)
    first, second = Turns(0, shared), Turns(1, shared)
    config = WITH_LAYER if method == "mtp" else PLAIN

    with Turns.turn:
        expected = answers(make_runner(ModelRunner, HostWeights(), "cpu", config))
        other = Followed(rig, second, lambda: on_device(Worker, second, rig, sizes, config))
        runner = on_device(Driver, first, rig, sizes, config)
        ranks = Ranks(first)
        runner.lead(ranks)
        runner.set_parameters(0, RowParameters())
        # measured steps run on all ranks, and leave nothing behind
        table = measure_step_table(runner, MAX_LEN, sizes=(8, 15))
        assert table is not None and 0 < table.short[0] <= table.short[1]
        assert ranks.num_messages > 12
        group = runner.model.group
        by_tokens = exchanged > 0 and not sizes
        assert bool(group.num_exchanged) == by_tokens
        group.num_divided = group.num_exchanged = 0
        drafter: Drafter | None = DeviceMtpDrafter(runner) if method == "mtp" else None
        if method == "known":
            tokens = {(str(number), 0): one for number, (one, _) in enumerate(expected)}
            drafter = KnowingDrafter(tokens, 0.7, 250)
        assert answers(runner, drafter) == expected
        # steps from graphs are not divided, and larger ones have no row past the selection
        assert (group.num_divided > 2) == (not sizes)
        assert (group.num_exchanged > 2) == by_tokens
        replayed = runner.counters.graph_steps
        assert bool(sizes) == (replayed["prefill"] + replayed["mixed"] > 1)
        assert sum(runner.counters.eager_steps.values()) > 0
        assert ranks.num_messages > 20 and runner.counters.mask_offsets_skipped > 2
        first.send(b"")
    other.join()
    (worker,) = other.workers
    assert worker.batches == runner.batches and len(runner.batches) > 6
    assert worker.drafts == runner.drafts and bool(runner.drafts) == (method == "mtp")
    first.close()


def test_the_warm_up_divides_attention_by_tokens(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first long prompt would wait for kernels of the heads of all ranks."""
    if rig.is_real:
        pytest.skip("its ranks are processes")
    monkeypatch.setenv("FD_DSA_EXCHANGED_MIN_TOKENS", "24")
    shared = Shared.create(2)
    first, second = Turns(0, shared), Turns(1, shared)

    def warm(kind: type[Any], group: Turns) -> Any:
        runner = on_device(kind, group, rig, (), PLAIN)
        warm_up_kernels(runner)
        return runner

    with Turns.turn:
        other = Followed(rig, second, lambda: warm(Worker, second))
        runner = warm(Driver, first)
        first.send(b"")
    other.join()
    # there and back in two layers, in steps of 24 tokens or more
    assert runner.model.group.num_exchanged >= 4
    first.close()

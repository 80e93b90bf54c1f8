"""Selection and attention on a device against those of the CPU, on all memories."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the CPU's products are Paddle's")

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.ops.arrays import as_numpy
from tests.attention.harness import FP8, NO_CHANGE, Sizes, Step, Windows, World, world_of
from tests.kernel_memory import KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.strategies import make_batch

PADDING = 2
# first chunks below and past the selection of 8, a later chunk, decode with drafts, idle rows
ROWS = [(2, 0, 2), (0, 0, 0), (0, 40, 1), (10, 0, 10), (3, 23, 3), (0, 6, 3)]
SHORT_ROWS = [(3, 0, 3), (0, 6, 1), (0, 0, 0), (2, 2, 2)]
NUM_TOKENS = PADDING + sum(new for _, _, new in ROWS)


class OnDevice:
    """A step of a world, run on the CPU, and the same step's tensors in another memory."""

    def __init__(
        self, m: KernelMemory, sizes: Sizes, rows: list[Any], windows: Windows = NO_CHANGE
    ) -> None:
        from fd_dsa.attention.device import DeviceAttention

        self.memory, self.rows = m, rows
        padded = PADDING + sum(new for _, _, new in rows)
        batch = make_batch(rows, sizes.block_size, num_padded_tokens=padded)
        self.world: World = world_of(batch, sizes)
        self.cpu: Step = self.world.run(rows, PADDING, windows)
        config = self.world.backend.config
        self.attention = DeviceAttention(config, m.poisoned)
        meta = self.world.backend.attention_metadata
        arrays = {field.name: getattr(meta, field.name) for field in fields(meta)}
        self.step: Any = SimpleNamespace(
            **{
                name: m.put(as_numpy(value)) if hasattr(value, "shape") else value
                for name, value in arrays.items()
            }
        )
        self.attention.begin_step(self.step)

    def select(self, layer: int = 0) -> Any:
        """Slots of a layer, as a tensor."""
        q = as_numpy(self.world.packed(layer, self.rows, PADDING, "index_q"))
        if self.world.sizes.dtype == FP8:
            q = np.searchsorted(E4M3_VALUES[:127], np.abs(q)) | np.where(q < 0, 0x80, 0)
            q = q.astype(np.uint8)
        weights = as_numpy(self.world.packed(layer, self.rows, PADDING, "weights"))
        cache = self._cache(2 * layer + 1)
        return self.attention.select(self.step, self.memory.put(q), self.memory.put(weights), cache)

    def attend(self, selection: Any, layer: int = 0) -> np.ndarray:
        """Outputs of a layer."""
        q = self.memory.put(as_numpy(self.world.packed(layer, self.rows, PADDING, "q")))
        out = self.attention.attend(self.step, q, self._cache(2 * layer), selection)
        return self.memory.get(out)

    def _cache(self, index: int) -> Any:
        return self.memory.put(as_numpy(self.world.caches[index]))

    def check(self, layer: int = 0) -> None:
        """Slots exactly, outputs within rounding."""
        selection = self.select(layer)
        found, wanted = self.memory.get(selection), self.cpu.slots[layer]
        width = wanted.shape[1]
        np.testing.assert_array_equal(found[:, :width], wanted)
        assert (found[:, width:] == -1).all()
        outputs = self.attend(selection, layer)
        np.testing.assert_allclose(outputs, self.cpu.outputs[layer], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", FP8])
def test_a_mixed_step(kernel_memory: KernelMemory, dtype: str) -> None:
    OnDevice(kernel_memory, Sizes(8, 64 if dtype == FP8 else 16, dtype), ROWS).check()


@pytest.mark.parametrize("topk", [1, 30])
def test_selections_of_other_sizes(kernel_memory: KernelMemory, topk: int) -> None:
    OnDevice(kernel_memory, Sizes(topk), ROWS).check()


@pytest.mark.parametrize("logits_bytes", [1, 4 * 48 * 5])
def test_scores_in_chunks_of_tokens(
    kernel_memory: KernelMemory, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_dsa.attention.device_memory.LOGITS_BYTES", logits_bytes)
    case = OnDevice(kernel_memory, Sizes(8), ROWS)
    rows = []
    import fd_dsa.attention.device_scores as module

    original = module.score_pages

    def recording(*args: Any, **kwargs: Any) -> None:
        rows.append(args[4].shape[0])
        original(*args, **kwargs)

    monkeypatch.setattr(module, "score_pages", recording)
    case.check()
    assert sum(rows) == NUM_TOKENS
    # the longest row, 41 keys, takes 48 columns: three blocks are all that a table holds
    assert max(rows) == max(1, logits_bytes // 4 // 48)


def test_short_rows_are_not_scored_and_share_a_selection(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OnDevice(kernel_memory, Sizes(8, layers=2), SHORT_ROWS)
    monkeypatch.setattr("fd_dsa.attention.device_scores.score_pages", None)
    case.check(0)
    first = case.select(0)
    assert case.select(1) is first
    case.check(1)
    case.attention.begin_step(case.step)
    assert case.select(0) is not None
    case.check(0)


def test_a_capture_after_a_warm_up_has_the_shared_selection_in_it(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that run again in one step launch what they launched the first time."""
    import fd_dsa.attention.device as module

    launches = []

    def counted(kind: str, allocate: Any) -> Any:
        select_slots = slot_selector(kind, allocate)
        return lambda *a, **k: (launches.append(1), select_slots(*a, **k))

    slot_selector = module.slot_selector
    monkeypatch.setattr(module, "slot_selector", counted)
    case = OnDevice(kernel_memory, Sizes(8), SHORT_ROWS)
    caches = [case._cache(1), case._cache(1), case._cache(1)]
    for run in (1, 2):
        found = [case.attention.select(case.step, None, None, cache) for cache in caches]
        assert found[1] is found[0] and found[2] is found[0]
        assert len(launches) == run


def test_every_layer_and_step_has_the_same_buffers(kernel_memory: KernelMemory) -> None:
    case = OnDevice(kernel_memory, Sizes(8, layers=2), ROWS)
    addresses = {case.select(layer).data_ptr() for layer in (0, 1)}
    case.attention.begin_step(case.step)
    addresses.add(case.select(0).data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("logits_bytes", [1, 1000, 4 * 640_000])
@pytest.mark.parametrize("index_heads", [3, 16, 64])
def test_workspace_is_the_size_of_the_buffers(
    kernel_memory: KernelMemory,
    monkeypatch: pytest.MonkeyPatch,
    logits_bytes: int,
    index_heads: int,
) -> None:
    from fd_dsa.attention.device import DeviceAttention
    from fd_dsa.attention.device_memory import workspace_bytes
    from fd_dsa.device.transfers import transfers_for
    from fd_dsa.triton_runtime.driver import GpuTraits

    transfers = transfers_for(kernel_memory.poisoned((1,), "float32"))
    # the interpreter is one processor
    gpu = GpuTraits(transfers.traits.capability, 132, 227 << 10)
    monkeypatch.setattr(type(transfers), "traits", gpu)
    monkeypatch.setattr("fd_dsa.attention.device_memory.LOGITS_BYTES", logits_bytes)
    monkeypatch.setenv("FD_DSA_EXCHANGED_MIN_TOKENS", "9")
    widths = {"float32": 4, "bfloat16": 2, "int32": 4, "uint8": 1}
    layout = CacheLayout("float32", 16, 6, 2, 4)
    sizes = DSABackendConfig(2, index_heads, 8, 0.4, layout, 4, 100, 10, tokens_per_row=2)
    # keys and values of dense prompts are allocated in each layer
    dense = replace(on_tensor_cores(sizes), head_widths=(4, 6))
    found = []
    for config in (sizes, on_tensor_cores(sizes), dense, replace(dense, exchange_ranks=3)):
        taken: list[int] = []

        def allocate(shape: tuple[int, ...], dtype: str, taken: list[int] = taken) -> Any:
            taken.append(int(np.prod(shape)) * widths[dtype])
            return kernel_memory.poisoned(shape, dtype)

        group: Any = SimpleNamespace(size=3, rank=1, gathers_rows=True)
        DeviceAttention(config, allocate, group if config.exchange_ranks > 1 else None)
        found.append(workspace_bytes(config, gpu) - sum(taken))
    assert found[:2] == [0, 0] and found[3] == found[2]


def on_tensor_cores(config: Any) -> Any:
    """A configuration whose scores and attention tensor cores can make, on Hopper."""
    layout = CacheLayout(FP8, 64, 512, 64, 128)
    return replace(config, cache_layout=layout, dtype="bfloat16", max_blocks_per_seq=2)


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("serves", [True, False])
def test_what_serves_is_told_once_and_remembered(
    kernel_memory: KernelMemory,
    serves: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from fd_dsa.attention import device
    from fd_dsa.attention.device_scores import PageScores, TileScores
    from fd_dsa.device.transfers import transfers_for
    from fd_dsa.ops import providers
    from fd_dsa.ops.mla.tensor_core import TensorCoreAttention

    config = OnDevice(kernel_memory, Sizes(8), SHORT_ROWS).world.backend.config
    # the interpreter's tensors are on a CPU, for which the table lists no kernel
    monkeypatch.setattr(device, "kernel_kind", lambda tensor: "gpu")
    providers.drop_selections()
    if serves:
        config = on_tensor_cores(config)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        made = [device.DeviceAttention(config, kernel_memory.poisoned) for _ in range(2)]
    # codes for the cache's format
    assert str(made[0].query_buffers(4)[0].dtype).endswith("uint8" if serves else "float32")
    capability = transfers_for(kernel_memory.poisoned((1,), "float32")).traits.capability
    on_hopper = serves and capability == 90
    assert all(type(x.scores.kernels) is (TileScores if serves else PageScores) for x in made)
    assert all(isinstance(x.tensor_core_attention, TensorCoreAttention) == on_hopper for x in made)
    said = [r.getMessage() for r in caplog.records if "ndexer_logits on gpu" in r.getMessage()]
    if serves:
        assert len(said) == 1 and "triton_tensor_core (a device, a" in said[0]
        choice = providers.table()["indexer_logits"]["gpu"]
        assert (choice.provider, choice.rejected) == ("triton_tensor_core", {})
    else:
        reason = "the cache is float32, it reads fp8_ds_mla and bfloat16"
        assert len(said) == 1 and said[0].startswith("indexer_logits on gpu: triton (a device, ")
        assert said[0].endswith(f"kernel; not triton_tensor_core: {reason})")
        assert providers.table()["sparse_mla"]["gpu"].provider == "triton"
        assert providers.table()["indexer_logits"]["gpu"].rejected == {"triton_tensor_core": reason}


@pytest.mark.parametrize("dtype", ["float32", FP8])
def test_a_schedule_is_made_once_in_a_step_that_is_scored(
    kernel_memory: KernelMemory, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fd_dsa.ops.logits.tile_schedule import TileSchedule

    made, fill = [], TileSchedule.fill
    monkeypatch.setattr(TileSchedule, "fill", lambda *a, **k: (made.append(1), fill(*a, **k)))
    sizes = Sizes(8, 64 if dtype == FP8 else 16, dtype, layers=2)
    case = OnDevice(kernel_memory, sizes, ROWS)
    assert len(made) == (dtype == FP8)
    for layer in (0, 1):
        case.select(layer)
    assert len(made) == (dtype == FP8)
    short = OnDevice(kernel_memory, sizes, SHORT_ROWS)
    short.select()
    assert len(made) == (dtype == FP8)
    # a graph that reads the schedule is replayed in any step
    monkeypatch.setattr(short.attention.scores.kernels, "is_captured", True)
    short.attention.begin_step(short.step)
    assert len(made) == 2 * (dtype == FP8)

"""Experts that a device holds in four bits: values, parts of ranks, bytes, refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the weights are Paddle's tensors")

from fd_dsa.distributed import Group
from fd_dsa.errors import CheckpointError, KernelUnavailable
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.four_bit_check import difference
from fd_dsa.models.four_bit_experts import four_bit_experts
from fd_dsa.models.four_bits import FourBits
from fd_dsa.models.loader import load_weights
from fd_dsa.models.moe import routed_on_device
from fd_dsa.models.registry import create_model, open_checkpoint, read_config
from fd_dsa.models.sources import RandomTensor, SourceTensor
from fd_dsa.ops import four_bit_gemm
from fd_dsa.ops.device_matrix import DeviceMatrix, FourBitExperts
from fd_dsa.ops.expert_pairs import Choice
from fd_dsa.startup.memory import weight_bytes
from fd_dsa.tensor import FourBitWeight
from tests.kernel_memory import KernelMemory
from tests.models.folders import Stored
from tests.models.four_bits import FORMATS, write, write_pair, write_unpacked
from tests.ops import block_fp8
from tests.ops.four_bit_case import FORMS, Form, values_on_device
from tests.v4_model.quantised import E2M1, loaded, stored_tensors

pytestmark = pytest.mark.triton

EXPERTS = "model.layers.1.mlp.experts."
# with columns in act-order no group has neighbours
HELD = [name for name in FORMATS if "act-order" not in name]


class Device:
    """The model of a folder, or a rank's part of it, in a memory. FP8 matrices are bfloat16.

    Attributes:
        num_bytes: what all weights take.
    """

    def __init__(
        self, m: KernelMemory, folder: Path, rank: int = 0, size: int = 1, *, dummy: bool = False
    ) -> None:
        self.m, self.num_bytes = m, 0
        group = cast(Group, SimpleNamespace(rank=rank, size=size)) if size > 1 else None
        whole = read_config(folder)
        self.config = whole if size == 1 else whole.split(size)
        with open_checkpoint(whole, folder) as checkpoint:
            self.form = four_bit_experts(None if dummy else checkpoint, whole, size)
            self.weights = DeviceWeights(
                "bfloat16", self._allocate, group=group, four_bits=self.form
            )
            self.model = create_model(self.config, self.weights)
            # a table that is no weight
            self.num_bytes -= 4 * int(np.prod(self.model.cos_sin.shape))
            if dummy:
                self._draw(f"{EXPERTS}1.")
            else:
                load_weights(checkpoint, whole, self.weights.loaders, group=group)
            self.weights.finish()

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        tensor = self.m.poisoned(shape, dtype)
        self.num_bytes += tensor.element_size() * int(np.prod(shape))
        return tensor

    def _draw(self, prefix: str) -> None:
        """Fill the tensors with a prefix with random numbers, as for all of a model."""
        for name, tensor in expected_tensors(self.config).items():
            if name.startswith(prefix):
                self.weights.loaders[name](RandomTensor(name, tensor.shape, 0))

    @property
    def experts(self) -> tuple[Any, Any]:
        """gate_up and down of the second layer."""
        return self.model.layers[1].mlp.experts

    def matrix(self, expert: int, part: str) -> np.ndarray:
        """float64 [out, in] of one matrix."""
        stack = self.experts[part == "down"]
        assert isinstance(stack, FourBitExperts)
        return values_on_device(self.m, stack.weight)[expert, int(part == "up")]


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 1) for name in HELD), *((name, 2) for name in HELD[::3]), (HELD[-1], 2)],
)
def test_values_and_bytes(
    paddle_memory: KernelMemory, name: str, size: int, tmp_path: Path
) -> None:
    """A cut inside of groups of down gives a rank smaller groups."""
    packed, twin = write_pair(tmp_path, FORMATS[name])
    device, wanted = Device(paddle_memory, packed, size - 1, size), loaded(twin)
    assert weight_bytes(device.config, "bfloat16", four_bits=device.form) == device.num_bytes
    for expert in (0, 3):
        for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
            values = wanted[f"{EXPERTS}{expert}.{part}_proj.weight"]
            part_of_rank = np.split(values, size, axis)[size - 1]
            found = device.matrix(expert, part)
            np.testing.assert_allclose(found, part_of_rank, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["nvfp4 of modelopt", "awq"])
def test_sums_of_ranks_add_up(paddle_memory: KernelMemory, name: str, tmp_path: Path) -> None:
    """A rank's columns of gate and up, and its inputs of down."""
    m, (folder, _) = paddle_memory, write_pair(tmp_path, FORMATS[name])
    rng = np.random.default_rng(0)
    x = block_fp8.put(m, rng.standard_normal((9, 256)), "bfloat16")
    shared = block_fp8.put(m, np.zeros((9, 256)), "bfloat16")
    ids = np.sort([rng.permutation(4)[:2] for _ in range(9)], axis=1).astype(np.int32)
    choice = Choice(m.put(ids), m.put(rng.random((9, 2)).astype(np.float32)))
    whole, *parts = (
        block_fp8.get(m, routed_on_device(x, shared, choice, Device(m, folder, *rank).experts))
        for rank in ((0, 1), (0, 2), (1, 2))
    )
    np.testing.assert_allclose(sum(parts), whole, rtol=0, atol=2**-7 * np.abs(whole).max())


def form_of(folder: Path, size: int = 1) -> FourBits | None:
    """The layout of a folder's experts."""
    config = read_config(folder)
    with open_checkpoint(config, folder) as checkpoint:
        return four_bit_experts(checkpoint, config, size)


@pytest.mark.parametrize(
    ("name", "size", "kind", "group"),
    [
        ("nvfp4 of modelopt", 1, "e4m3", 16),
        *(("awq", size, "int4", 128 // size) for size in (1, 2, 4)),
        ("gptq, whole rows", 1, "int4", 128),
        ("gptq, symmetric", 2, "int4", 64),
        ("w4afp8", 1, "int4", 128),
        ("int4 of compressed-tensors, zero points, groups of 32", 2, "int4", 32),
    ],
)
def test_layouts(name: str, size: int, kind: str, group: int, tmp_path: Path) -> None:
    found = form_of(write_pair(tmp_path, FORMATS[name])[0], size)
    assert found is not None
    assert (found.kind, found.group) == (kind, group)


def test_other_matrices_are_dequantised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, paddle_memory: KernelMemory
) -> None:
    """ModelOpt's folder packs attention, dense MLPs and the shared expert too."""
    for name, count, cause in (
        ("nvfp4 of modelopt", 20, "dequantised"),
        ("gptq, act-order", 32, "dequantised, as columns in act-order have no groups"),
    ):
        caplog.clear()
        folder, _ = write_pair(tmp_path / name, FORMATS[name])
        with caplog.at_level(logging.INFO, "fd_dsa.models.four_bit_experts"):
            device = Device(paddle_memory, folder)
        [line] = caplog.messages
        assert line.endswith(f": a device holds {count} matrices {cause}")
        assert isinstance(device.experts[0], DeviceMatrix) == ("act-order" in name)


def test_a_layer_with_one_other_expert_is_dequantised(tmp_path: Path) -> None:
    kind = FORMATS["gptq, symmetric"]
    folder, twin = write_pair(tmp_path, kind)
    write_unpacked(folder, twin, kind, f"{EXPERTS}3.up_proj")
    assert form_of(folder) is None


def test_scales_of_two_types_are_held(paddle_memory: KernelMemory, tmp_path: Path) -> None:
    kind, name = FORMATS["awq"], f"{EXPERTS}3.up_proj.scales"
    folder, twin = write_pair(tmp_path, kind)
    tensors = stored_tensors(folder)
    shape = tensors[name].shape
    wide = np.frombuffer(tensors[name].data, "<f2").astype(np.float32)
    tensors[name] = Stored("F32", shape, wide.tobytes())
    device = Device(paddle_memory, write(folder, tensors, kind))
    wanted = loaded(twin)
    for part in ("up", "down"):
        values = wanted[f"{EXPERTS}3.{part}_proj.weight"]
        np.testing.assert_allclose(device.matrix(3, part), values, rtol=1e-6)


def test_scales_of_nvfp4_that_are_not_positive(paddle_memory: KernelMemory, tmp_path: Path) -> None:
    """A device has only positive scales: signs are those of codes, and 0 makes codes 0."""
    kind, name = FORMATS["nvfp4 of modelopt"], f"{EXPERTS}3.up_proj.weight_scale"
    folder, _ = write_pair(tmp_path, kind)
    tensors = stored_tensors(folder)
    codes = np.frombuffer(tensors[name].data, np.uint8).copy()
    # both zeros, a negative number, the smallest denormal one and the largest number
    codes[:6] = 0x00, 0x80, 0xB9, 0x01, 0x81, 0x7E
    tensors[name] = Stored(tensors[name].dtype, tensors[name].shape, codes.tobytes())
    write(folder, tensors, kind)
    values = loaded(folder)[f"{EXPERTS}3.up_proj.weight"]
    assert not values[0, :32].any() and values[0, 32:96].any()
    found = Device(paddle_memory, folder).matrix(3, "up")
    np.testing.assert_allclose(found, values, rtol=1e-6, atol=0)


def test_groups_out_of_order_are_refused(paddle_memory: KernelMemory, tmp_path: Path) -> None:
    """The file has columns in act-order, and config.json says that it has none."""
    kind, name = FORMATS["gptq, symmetric"], f"{EXPERTS}3.up_proj.g_idx"
    folder, _ = write_pair(tmp_path, kind)
    tensors = stored_tensors(folder)
    groups = np.frombuffer(tensors[name].data, "<i4").copy()
    groups[[5, 200]] = groups[[200, 5]]
    tensors[name] = Stored("I32", groups.shape, groups.tobytes())
    write(folder, tensors, kind)
    text = r"up_proj.g_idx': got 1 at \[5\], allowed: groups of neighbours without desc_act in"
    with pytest.raises(CheckpointError, match=text):
        Device(paddle_memory, folder)


@pytest.mark.parametrize("name", ["nvfp4 of modelopt", "awq", "w4afp8"])
def test_random_weights(paddle_memory: KernelMemory, name: str, tmp_path: Path) -> None:
    """The values are as large as other random weights, and no column has a mean of its own."""
    device = Device(paddle_memory, write_pair(tmp_path, FORMATS[name])[0], dummy=True)
    for part, width in (("gate", 256), ("down", 128)):
        values = device.matrix(1, part)
        deviation = width**-0.5
        np.testing.assert_allclose(values.std(), deviation, rtol=0.03)
        assert len(np.unique(values)) == 15
        assert abs(values.mean()) < 4 * deviation / values.size**0.5
        assert np.abs(values.mean(axis=0)).max() < 5 * deviation / len(values) ** 0.5


def mxfp4_arrays(codes: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    """Codes, scales, factor and peaks of the matrix of a file on a device."""
    source = SimpleNamespace(repack=lambda: (codes, scales, None, 1.0), cut=None, packing=None)
    found = FourBits(frozenset(), "e8m0", 32).arrays(cast(SourceTensor, source))
    return [one for one in found if one is not None]


def mxfp4_scales(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Scales on a device, in the order of the file."""
    found = mxfp4_arrays(codes, scales)[1]
    return found.transpose(1, 0, 2).reshape(len(found[0]), -1)[:, : scales.shape[1]]


@pytest.mark.parametrize("width", [32, 96, 160, 256])
def test_values_of_mxfp4(paddle_memory: KernelMemory, width: int) -> None:
    """Each code and scale is at its place."""
    m, rng = paddle_memory, np.random.default_rng(width)
    codes = rng.integers(0, 256, (40, width // 2), np.uint8)
    scales = rng.integers(100, 127, (40, width // 32), np.uint8)
    arrays = (m.put(one[None, None]) for one in mxfp4_arrays(codes, scales))
    stored, held_scales, factors, peaks = arrays
    factors = factors.reshape([1, 1])
    weight = FourBitWeight(stored, held_scales, factors, 32, "e8m0", width, peaks)
    found = values_on_device(m, weight)[0, 0]
    values = E2M1[np.stack([codes & 15, codes >> 4], axis=2).reshape(40, width)]
    wanted = values * 2.0 ** (scales.repeat(32, axis=1) - 127.0)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def test_scales_of_zeros_are_small() -> None:
    """A peak that belongs to no value would take bits of the row's values."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 128), np.uint8) | np.uint8(0x11)
    # zeros of both signs
    codes[:2, 16:32], codes[2, 16:32] = 0x80, 0x01
    scales = np.full((3, 8), 100, np.uint8)
    scales[1:, 1] = 127
    wanted = scales.copy()
    wanted[:2, 1], wanted[2] = 100 - 26, np.maximum(scales[2], 127 - 26)
    np.testing.assert_array_equal(mxfp4_scales(codes, scales), wanted)
    np.testing.assert_array_equal(mxfp4_arrays(codes, scales)[3], [100, 100, 127])
    scales[:, 1] = 126
    np.testing.assert_array_equal(mxfp4_scales(codes, scales), scales)


@pytest.mark.parametrize("peak", [10, 26, 27, 154])
def test_scales_far_below_the_peak_are_raised(peak: int) -> None:
    """They are at least 2^-26 of the largest one, so FP8 holds their values."""
    codes = np.full((4, 64), 0x11, np.uint8)
    lowest = max(0, peak - 26)
    for smallest in sorted({0, lowest, max(0, lowest - 1), lowest + 1}):
        scales = np.full((4, 4), peak, np.uint8)
        scales[2:, 1] = smallest
        found = mxfp4_scales(codes, scales)
        np.testing.assert_array_equal(found, np.maximum(scales, lowest))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_weight_has_the_largest_scale_of_each_column(
    paddle_memory: KernelMemory, rank: int
) -> None:
    """Matrices of a rank, scales of zeros, and random matrices."""
    m, rng = paddle_memory, np.random.default_rng(rank)
    names = [f"{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down")]
    form = FourBits(frozenset(names), "e8m0", 32)
    weights = DeviceWeights("bfloat16", m.poisoned, four_bits=form)
    made = weights.experts("", 3, 256, 96)
    for name in names[:6]:
        rows, width = (256, 192) if "down" in name else (192, 256)
        codes = rng.integers(0, 256, (rows, width // 2), np.uint8)
        scales = rng.integers(90, 130, (rows, width // 32), np.uint8)
        codes[1::2, 48:64], scales[1::2, 3] = 0x80, 150
        repacked = codes, scales, None, 1.0
        cut = int("down" in name), 96 * rank, 96 * rank + 96
        source = SimpleNamespace(repack=lambda found=repacked: found, cut=cut, packing=None)
        weights.loaders[name](cast(SourceTensor, source))
    for name in names[6:]:
        weights.loaders[name](RandomTensor(name, (256, 96) if "down" in name else (96, 256), 0))
    weights.finish()
    for stack in made:
        assert isinstance(stack, FourBitExperts)
        peaks, scales = m.get(stack.weight.peaks), m.get(stack.weight.scales)
        assert len(np.unique(peaks)) > 2 and peaks.max() < 150
        np.testing.assert_array_equal(peaks, scales.max(axis=(2, 4)))


# two more sizes of integers' groups, and the other one's zero points, are slow
@pytest.mark.parametrize(
    "form",
    [*FORMS[:3], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[3:])],
    ids=str,
)
def test_the_check_of_the_kernel_passes(paddle_memory: KernelMemory, form: Form) -> None:
    held = FourBits(frozenset(), form.kind, form.group)
    assert difference(held, paddle_memory.poisoned) == ""


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_the_check_finds_a_wrong_kernel(
    paddle_memory: KernelMemory, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, right = paddle_memory, four_bit_gemm.four_bit_gemm

    def wrong(x: Any, weight: FourBitWeight, *lists: Any, **how: Any) -> Any:
        # codes of the columns before
        codes = m.put(np.roll(m.get(weight.codes), 1, axis=3))
        return right(x, weight._replace(codes=codes), *lists, **how)

    def broken(*given: Any, **how: Any) -> Any:
        raise KernelUnavailable("no such instruction")

    held = FourBits(frozenset(), form.kind, form.group)
    monkeypatch.setattr(four_bit_gemm, "four_bit_gemm", wrong)
    text = "gate_up of 3 rows differs from the definition by"
    assert difference(held, paddle_memory.poisoned).startswith(text)
    monkeypatch.setattr(four_bit_gemm, "four_bit_gemm", broken)
    assert difference(held, paddle_memory.poisoned) == "no such instruction"

"""Models in bfloat16 and block FP8 on the device, beside the CPU's float32 of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.loader import fp8_tensors, load_dummy_weights, load_weights
from fd_dsa.models.registry import config_from_dict, create_model, read_config
from fd_dsa.models.sources import EMBEDDING
from fd_dsa.models.weights import HostWeights
from fd_dsa.ops.fp8 import encode_e4m3
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.tensor import Normed
from tests.gpu_rig import Rig
from tests.models.folders import Stored, bf16, f8, f32, write_folder
from tests.ops.e4m3 import E4M3_VALUES
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import GLM, V32, random_tensors, run_rows

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

# parts of one GEMM begin at blocks; widths are no multiples of one
SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 136,
    # what is scored is not rounded to a tie
    "index_topk": 64,
    "max_position_embeddings": 64,
    # every expert is chosen: near ties of the router would hide the errors of the arithmetic
    "n_routed_experts": 3,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}
# index keys are of the GEMM of q_a and kv_a where all are FP8 and without a bias
WIDE_KEYS = {"index_head_dim": 128, "qk_rope_head_dim": 64}
STEPS = [
    [(0, 10, 0, True), (2, 14, 0, True)],
    [(0, 6, 10, True), (2, 1, 14, False)],
    [(0, 1, 16, False), (2, 2, 15, False)],
]
IDS = np.random.default_rng(7).integers(2, 50, 64).tolist()
# of the largest logit; what gpu_engine.md allows, as a share
BOUNDS = {"bfloat16": 0.02, "fp8": 0.04}


def quantised(
    values: np.ndarray, rng: np.random.Generator, order: Callable[[np.ndarray], np.ndarray]
) -> tuple[Stored, Stored]:
    """Codes and scales, which differ from block to block by powers of two."""
    rows, columns = (-(-extent // 128) for extent in values.shape)
    scales = np.exp2(rng.integers(-8, -4, (rows, columns))).astype(np.float32)
    every = scales.repeat(128, axis=0).repeat(128, axis=1)
    codes = encode_e4m3(values / every[: values.shape[0], : values.shape[1]])
    return f8(codes), f32(order(scales))


def folder_of(
    path: Path,
    fields: dict[str, Any],
    form: str,
    order: Callable[[np.ndarray], np.ndarray] = lambda scales: scales,
) -> Path:
    """A folder of random weights in a form, scales in an order."""
    rng = np.random.default_rng(3)
    config = config_from_dict(fields)
    expected, tensors = expected_tensors(config), {}
    for name, values in random_tensors(config).items():
        # as trained models have it: what a layer adds is less than what it is added to
        if name == EMBEDDING:
            values = values * np.float32(config.hidden_size**0.5)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            values = values * np.float32(0.3)
        if form == "fp8" and expected[name].quantisable:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(values, rng, order)
        else:
            tensors[name] = bf16(values)
    return write_folder(path, fields, tensors)


class RoundingMatrix:
    """A weight of the CPU before which activations are rounded as FP8 rounds them.

    Its own error is then that of bfloat16: without, a bound would have to let a wrong block pass.
    """

    # as an expert it is neither multiplied in one call with others, nor by NumPy
    _packed, _few = None, 0

    def __init__(self, inner: Any) -> None:
        self.inner, self.activated, self.out_width = inner, inner.activated, inner.out_width

    def matmul(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The GEMM of rounded activations."""
        width = x.shape[1]
        padded = np.pad(x, ((0, 0), (0, -width % 128))).reshape(len(x), -1, 128)
        scale = np.maximum(np.abs(padded).max(axis=2, keepdims=True) / np.float32(448), 1e-12)
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
        rounded = E4M3_VALUES[encode_e4m3(padded / scale)].astype(np.float32) * scale
        return self.inner.matmul(np.ascontiguousarray(rounded.reshape(len(x), -1)[:, :width]), out)


class RoundingWeights(HostWeights):
    """Weights of the CPU, those that a device holds in FP8 with rounded activations."""

    def __init__(self, fp8: frozenset[str]) -> None:
        super().__init__()
        self.fp8 = fp8

    def matrix(self, in_width: int, parts: Any, **how: Any) -> Any:
        made = super().matrix(in_width, parts, **how)
        return RoundingMatrix(made) if self.fp8.issuperset(parts) else made


def runner_on(folder: Path, device: str) -> ModelRunner:
    """A runner of the folder's model: float32 on the CPU, as stored on a device."""
    config = read_config(folder)
    with Checkpoint.open(folder) as checkpoint:
        weights: Any = RoundingWeights(fp8_tensors(checkpoint, config))
        if device != "cpu":
            weights = DeviceWeights(
                "bfloat16",
                paddle_allocator(device),
                fp8_tensors(checkpoint, config),
                round_scales=config.round_scales,
            )
        model = create_model(config, weights)
        load_weights(checkpoint, config, weights.loaders)
        weights.finish()
    return runner_of(model, device)


def runner_of(model: Any, device: str) -> ModelRunner:
    """Four rows of shuffled blocks."""
    batch = InputBatch(4, 48, 3, 16)
    dtype = "float32" if device == "cpu" else "bfloat16"
    layout = model.config.cache_layout(dtype, 16)
    runner = dsa_runner(model, batch, layout, 13, device, dtype=dtype)
    blocks = np.random.default_rng(0).permutation(13)
    for row in range(4):
        batch.set_blocks(row, blocks[3 * row : 3 * row + 3])
    return runner


def logits_of(runner: ModelRunner, steps: Any = STEPS) -> list[np.ndarray]:
    """Logits of every token of all steps."""
    return [
        run_rows(
            runner,
            [(row, IDS[done : done + new], done, new_row) for row, new, done, new_row in step],
        ).copy()
        for step in steps
    ]


def index_keys(runner: ModelRunner) -> np.ndarray:
    """Return what STEPS have written to the first layer's cache of the indexer."""
    tables = runner.input_batch.block_tables[[0, 2]].astype(np.int64)
    slots = (tables[:, :, None] * 16 + np.arange(16)).reshape(2, -1)[:, :17].ravel()
    cache = runner.caches[1]
    values = np.asarray(cache.numpy().reshape(-1, cache.shape[-1])[slots])
    if values.itemsize == 2:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values


@pytest.mark.parametrize("form", BOUNDS)
@pytest.mark.parametrize(
    "fields",
    [V32, V32 | WIDE_KEYS, GLM | {"attention_bias": True}],
    ids=["v32", "v32-wide-keys", "glm"],
)
def test_logits_are_those_of_the_cpu(
    rig: Rig, tmp_path: Path, fields: dict[str, Any], form: str
) -> None:
    fields = fields | SIZES | (FP8 if form == "fp8" else {})
    folder = folder_of(tmp_path, fields, form)
    runners = [runner_on(folder, device) for device in ("cpu", rig.device)]
    wanted, found = map(logits_of, runners)
    for ours, theirs in zip(found, wanted, strict=True):
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUNDS[form] * largest)
    # no logit depends on the keys: fewer than are chosen
    wanted.append(index_keys(runners[0]))
    found.append(index_keys(runners[1]))
    for ours, theirs in zip(found, wanted, strict=True):
        # a wrong block or scale is off by more on average, too
        assert np.sqrt(np.mean((ours - theirs) ** 2)) < BOUNDS[form] / 3 * np.abs(theirs).max()


def test_norms_are_quantised_in_layers_that_have_fp8_weights(rig: Rig) -> None:
    fp8 = {"model.layers.1.mlp.down_proj.weight"}
    weights = DeviceWeights("bfloat16", paddle_allocator(rig.device), fp8)
    x = paddle.zeros([3, 128], "bfloat16")
    names = [f"model.layers.{layer}.self_attn.q_a_layernorm.weight" for layer in (0, 1, 10)]
    norms = [weights.norm(name, 128, 1e-6).normalize(x) for name in (*names, "model.norm.weight")]
    assert [isinstance(normed, Normed) for normed in norms] == [False, True, False, False]


def test_random_weights_are_finite_and_use_all_experts(rig: Rig) -> None:
    config = config_from_dict(V32 | SIZES | FP8)
    weights = DeviceWeights(
        "bfloat16", paddle_allocator(rig.device), fp8_tensors(None, config), round_scales=True
    )
    model = create_model(config, weights)
    load_dummy_weights(config, weights.loaders, 0)
    weights.finish()
    for logits in logits_of(runner_of(model, rig.device)):
        assert np.isfinite(logits).all() and 0.1 < logits.std() < 10


# of prompts on both sides of index_topk, 12: chunks that cross it, begin and end there, beside
# decode rows; then the same rows in other chunks
CROSSING = [
    [(0, 20, 0, True), (1, 7, 0, True), (3, 12, 0, True)],
    [(0, 1, 20, False), (1, 9, 7, True), (3, 4, 12, True)],
    [(0, 1, 21, False), (1, 1, 16, False), (3, 2, 16, False)],
]
IN_CHUNKS = [
    [(0, 5, 0, True)],
    [(0, 15, 5, True), (1, 16, 0, True), (3, 1, 0, True)],
    [(0, 1, 20, False), (3, 15, 1, True)],
    *CROSSING[2:],
]
WIDE_HEADS = {"qk_rope_head_dim": 16, "index_head_dim": 32, "index_topk": 12, "index_n_heads": 16}
WIDE_HEADS |= {"num_hidden_layers": 2}


@pytest.mark.parametrize(("form", "values"), [("bfloat16", 24), ("fp8", 128)])
def test_prompts_attend_densely_up_to_index_topk(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, values: int
) -> None:
    from fd_dsa.attention import dense_prompts

    fields = V32 | SIZES | WIDE_HEADS | {"v_head_dim": values} | (FP8 if form == "fp8" else {})
    folder = folder_of(tmp_path, fields, form)
    attend, counts = dense_prompts.attend_prompts, []

    def counted(*args: Any, **how: Any) -> None:
        counts.append(args[6].counts)
        attend(*args, **how)

    monkeypatch.setattr(dense_prompts, "attend_prompts", counted)
    wanted = logits_of(runner_on(folder, "cpu"), CROSSING)
    dense = logits_of(runner_on(folder, rig.device), CROSSING)
    layers = fields["num_hidden_layers"]
    assert counts == [(12, 7, 12)] * layers + [(5,)] * layers
    chunks = logits_of(runner_on(folder, rig.device), IN_CHUNKS)
    monkeypatch.setattr(dense_prompts, "row_dependence_refusal", lambda: "one form")
    counts.clear()
    absorbed = logits_of(runner_on(folder, rig.device), CROSSING)
    assert not counts
    # in which chunks a row came makes no difference, but for a GPU's GEMMs
    bound = BOUNDS[form] * np.abs(wanted[-1]).max() * rig.is_real
    np.testing.assert_allclose(chunks[-1], dense[-1], rtol=0, atol=bound)
    near = []
    for step, *logits, theirs in zip(CROSSING, dense, absorbed, wanted, strict=True):
        bound = BOUNDS[form] * np.abs(theirs).max()
        below = np.concatenate([done + np.arange(new) for _, new, done, _ in step]) < 12
        clear = clear_lead(theirs, 2 * bound)
        for ours in logits:
            is_near = np.abs(ours - theirs).max(axis=1) < bound
            assert is_near[below].all()
            assert (ours.argmax(1) == theirs.argmax(1))[clear & is_near].all()
            near.append(is_near)
    # past index_topk scores that nearly tie may choose other keys
    assert np.concatenate(near).mean() > 0.85


def clear_lead(logits: np.ndarray, least: float) -> np.ndarray:
    """Return for each row whether its largest value leads by so much."""
    top = np.sort(logits, axis=1)
    return top[:, -1] - top[:, -2] > least


# rows of CROSSING in other chunks and in no company
ALONE = [[part] for step in IN_CHUNKS for part in step if part[0] == 1]


@pytest.mark.slow
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("form", BOUNDS)
def test_bits_of_a_row_do_not_depend_on_chunks_or_company(
    rig: Rig, tmp_path: Path, form: str
) -> None:
    fields = V32 | SIZES | WIDE_HEADS | (FP8 if form == "fp8" else {})
    folder = folder_of(tmp_path, fields, form)
    together, in_chunks, alone = (
        np.concatenate(
            [logits[tokens_of(step, 1)] for step, logits in zip(steps, found, strict=True)]
        )
        for steps in (CROSSING, IN_CHUNKS, ALONE)
        for found in [logits_of(runner_on(folder, rig.device), steps)]
    )
    np.testing.assert_array_equal(in_chunks, together)
    np.testing.assert_array_equal(alone, together)


def tokens_of(step: list[tuple[int, int, int, bool]], wanted: int) -> np.ndarray:
    """Return a mask of the tokens of a step that are of a row."""
    return np.repeat([row for row, *_ in step], [new for _, new, *_ in step]) == wanted

"""DeepSeek-V4 with its model on the device: the CPU's logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.device.transfers import transfers_for
from fd_dsa.distributed import Group
from fd_dsa.errors import CheckpointError, ConfigError
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.four_bit_experts import four_bit_experts
from fd_dsa.models.loader import load_weights
from fd_dsa.models.mtp_layer import add_mtp_layer
from fd_dsa.models.registry import create_model, open_checkpoint, read_config
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.startup.plan import make_plan
from fd_dsa.v4_attention.device_backend import V4DeviceBackend
from fd_dsa.v4_attention.device_memory import workspace_bytes
from fd_dsa.v4_attention.device_pools import DeviceLayout
from tests.gpu_rig import Rig
from tests.models.folders import Stored, write_safetensors
from tests.v4_model.cases import CASES, CSA, HCA, WINDOW, Case
from tests.v4_model.ours import load_model, make_runner, prompt_logits
from tests.v4_model.quantised import CASE as QUANTISED
from tests.v4_model.quantised import FP4, stored_tensors, write_pair

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

# in the interpreter Sinkhorn's 20 iterations take most of the time of a token. Few of them are
# further from its limit; other models and the tests of the kernel have 20
FEW_ITERATIONS = {"hc_sinkhorn_iters": 3}
# one layer of each kind, in which nothing is chosen by scores that rounding may change
SMOOTH: dict[str, Any] = FEW_ITERATIONS | {
    "layer_types": [WINDOW, CSA, HCA],
    "num_hidden_layers": 3,
    "num_hash_layers": 3,
    "index_topk": 64,
}
ROWS, LONGEST, TOKENS = 3, 96, 48


def device_model(
    folder: Path,
    rig: Rig,
    dtype: str,
    *,
    four_bits: bool = False,
    mtp: bool = False,
    group: Group | None = None,
) -> Any:
    """The model of a folder on the device, its weights loaded, with its draft layer if asked.

    A rank of a group has its part.
    """
    config, size = read_config(folder), group.size if group else 1
    with open_checkpoint(config, folder) as checkpoint:
        if mtp:
            config = add_mtp_layer(checkpoint, config)
        form = four_bit_experts(checkpoint, config, size) if four_bits else None
        weights = DeviceWeights(dtype, paddle_allocator(rig.device), group=group, four_bits=form)
        model = create_model(config.split(size), weights)
        load_weights(checkpoint, config, weights.loaders, group=group)
    weights.finish()
    return model


def device_runner(
    model: Any,
    rig: Rig,
    dtype: str,
    block_size: int,
    rows: int = ROWS,
    longest: int = LONGEST,
    snapshots: int = 0,
    drafts: int = 0,
    kv_cache_dtype: str | None = None,
    tokens: int = TOKENS,
) -> ModelRunner:
    """A runner whose rows own scattered blocks, and whose unwritten cache rows are infinite."""
    columns = -(-longest // block_size)
    batch, num_blocks = InputBatch(rows, tokens, columns, block_size), rows * columns + 1
    blocks = np.random.default_rng(0).permutation(num_blocks)
    for row in range(rows):
        batch.set_blocks(row, blocks[row:-1:rows])
    sizes = model.config, batch, num_blocks, rig.device, dtype
    own: dict[str, Any] = {"num_snapshots": snapshots, "max_drafts": drafts, "group": model.group}
    backend = V4DeviceBackend(*sizes, **own, kv_cache_dtype=kv_cache_dtype)
    runner = ModelRunner(model, batch, backend, rig.device, drafts)
    poison_pools(runner)
    return runner


def poison_pools(runner: ModelRunner) -> None:
    """Make the pools of a runner infinite, and the bytes of records 255, codes of NaN."""
    for pools in runner.caches:
        for pool in (pools.ring, pools.entries, pools.index_entries, pools.states):
            if pool is not None:
                # unlike `fill_`, it leaves a view in the memory of its tensor, also on the rig
                value = 255 if pool.dtype == paddle.uint8 else float("inf")
                infinite = paddle.full(pool.shape, value, pool.dtype)
                pool.copy_(infinite.to(pool.place), False)


def worst(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest error as a share of the largest logit."""
    pairs = zip(found, wanted, strict=True)
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


@pytest.mark.parametrize(
    "name", ["mixed", pytest.param("repeated-experts", marks=pytest.mark.slow)]
)
def test_logits_of_chunks(name: str, rig: Rig, tmp_path: Path) -> None:
    """Prompts across windows, entries, blocks and the limit of the selection, in company."""
    case = CASES[name]
    folder, prompts = case.write(tmp_path), [case.prompt(n) for n in (3, 21, 40)]
    wanted = prompt_logits(make_runner(load_model(folder), case.block_size), prompts, 40)
    model = device_model(folder, rig, "float32")
    for chunk in (16, 7):
        runner = device_runner(model, rig, "float32", case.block_size)
        assert worst(prompt_logits(runner, prompts, chunk), wanted) < 1e-4


def test_quantised_weights(rig: Rig, tmp_path: Path) -> None:
    """In float32 the device holds FP8 and FP4 weights in the type of the activations."""
    folder, _ = write_pair(tmp_path, FP4)
    wanted = prompt_logits(make_runner(load_model(folder), 16), [QUANTISED.prompt(9)], 9)
    runner = device_runner(device_model(folder, rig, "float32"), rig, "float32", 16)
    assert worst(prompt_logits(runner, [QUANTISED.prompt(9)], 9), wanted) < 1e-4


def test_experts_in_four_bits(rig: Rig, tmp_path: Path) -> None:
    """Their values are exact in bfloat16, so only the order of the sums differs."""
    folder, _ = write_pair(tmp_path, FP4)
    prompts, found = [QUANTISED.prompt(9)], []
    for four_bits in (False, True):
        model = device_model(folder, rig, "bfloat16", four_bits=four_bits)
        runner = device_runner(model, rig, "bfloat16", 16)
        found.append(prompt_logits(runner, prompts, 9))
    # a GPU sums in another order
    assert worst(*found) < 0.01
    plan = make_plan(
        EngineConfig(
            model=folder,
            device=rig.device,
            block_size=16,
            dtype="bfloat16",
            enforce_eager=True,
            enable_prefix_caching=False,
        )
    )
    assert plan.four_bits is not None and (plan.four_bits.kind, plan.four_bits.group) == (
        "e8m0",
        32,
    )


def test_a_large_scale_is_refused(rig: Rig, tmp_path: Path) -> None:
    """A kernel would make it infinite."""
    folder, _ = write_pair(tmp_path, FP4)
    tensors = stored_tensors(folder)
    name = next(name for name in tensors if ".experts.1." in name and name.endswith("scale"))
    codes = bytearray(tensors[name].data)
    codes[3] = 155
    tensors[name] = Stored("F8_E8M0", tensors[name].shape, bytes(codes))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"got code 155, allowed on a device: up to 154"):
        device_model(folder, rig, "bfloat16", four_bits=True)


def test_logits_in_bfloat16(rig: Rig, tmp_path: Path) -> None:
    """They are within rounding of float32, and the same bits in every chunk."""
    case = Case("smooth", SMOOTH, seed=21)
    folder, prompts = case.write(tmp_path), [case.prompt(n) for n in (35, 12)]
    wanted = prompt_logits(make_runner(load_model(folder), case.block_size), prompts, 40)
    model, found = device_model(folder, rig, "bfloat16"), []
    for chunk in (20, 1):
        runner = device_runner(model, rig, "bfloat16", case.block_size)
        found.append(prompt_logits(runner, prompts, chunk))
        assert worst(found[-1], wanted) < 0.03
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


FORMS: dict[str, dict[str, Any]] = {
    "chunks of 24 beside answers": {"max_num_batched_tokens": 24},
    "preemption": {"num_gpu_blocks_override": 5, "max_num_batched_tokens": 24},
}


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens(form: str, rig: Rig, tmp_path: Path) -> None:
    """Several requests at once have the tokens of the CPU, one of them twice."""
    case = Case("smooth", SMOOTH, seed=22)
    folder, prompts = case.write_served(tmp_path), [case.prompt(n) for n in (6, 20, 30)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=2)
    sizes = {"block_size": case.block_size, "max_num_seqs": 3, "max_model_len": 64}
    with LLM(model=folder, device="cpu", **sizes) as llm:
        wanted = tokens_of(llm, prompts, params)
    own = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    with LLM(model=folder, device=rig.device, **sizes, **own, **FORMS[form]) as llm:
        assert tokens_of(llm, prompts, params) == wanted
        assert (llm.stats().num_preemptions > 0) == (form == "preemption")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_cache_dtype": "float32"}, "--kv-cache-dtype: got 'float32', allowed: auto, bfloat"),
        ({"block_size": 24}, "--block-size: got 24"),
    ],
    ids=str,
)
def test_flags_that_are_refused(
    fields: dict[str, Any], words: str, rig: Rig, tmp_path: Path
) -> None:
    served = {"device": rig.device, "block_size": 16, "dtype": "bfloat16"}
    own = {"enforce_eager": True}
    with pytest.raises(ConfigError, match=words):
        make_plan(EngineConfig(model=CASES["mixed"].write(tmp_path), **(served | own | fields)))


@pytest.mark.parametrize(
    ("dtype", "caches", "snapshots", "drafts", "method"),
    [
        ("bfloat16", "auto", 16, 0, ""),
        ("bfloat16", "fp8", 16, 3, "mtp"),
        ("float32", "auto", 0, 1, "ngram"),
        ("float32", "fp8", 0, 2, "mtp"),
    ],
)
def test_bytes_of_the_plan(
    dtype: str, caches: str, snapshots: int, drafts: int, method: str, rig: Rig, tmp_path: Path
) -> None:
    """The plan counts the bytes that weights and pools take, with a layer that drafts."""
    case = Case("smooth", SMOOTH | {"num_nextn_predict_layers": 1}, seed=23)
    folder = case.write_served(tmp_path)
    sizes = {"block_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 24, "dtype": dtype}
    own: dict[str, Any] = {"enforce_eager": True, "num_gpu_blocks_override": 7}
    own |= {"enable_prefix_caching": snapshots > 0, "kv_cache_dtype": caches}
    if drafts:
        own["speculative_config"] = {"method": method, "num_speculative_tokens": drafts}
    config = EngineConfig(model=folder, device=rig.device, max_model_len=64, **sizes, **own)
    plan, taken = make_plan(config), []
    allocate = paddle_allocator(rig.device)

    def counted(shape: tuple[int, ...], name: str) -> Any:
        tensor = allocate(shape, name)
        taken.append(tensor.element_size() * int(np.prod(shape)))
        return tensor

    create_model(plan.model_config, DeviceWeights(dtype, counted))
    assert sum(taken) == plan.memory.weight_bytes
    taken.clear()
    batch = InputBatch(3, 24, 4, 16)
    parts = plan.model_config, batch, 7, rig.device, dtype, counted
    kept = plan.config.kv_cache_dtype
    backend = V4DeviceBackend(
        *parts, num_snapshots=snapshots, max_drafts=drafts, kv_cache_dtype=kept
    )
    layout = DeviceLayout(plan.model_config, kept, 16, drafts)
    planned = workspace_bytes(layout, batch, dtype, transfers_for(allocate((1,), dtype)).traits)
    assert 0 <= planned - sum(taken) < 16 << 10
    taken.clear()
    backend.allocate_caches()
    assert sum(taken) == plan.memory.kv_cache_bytes + plan.memory.state_bytes


def tokens_of(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Answers to prompts in one call."""
    answers = llm.generate(prompts, params)
    return [output.token_ids for answer in answers for output in answer.outputs]

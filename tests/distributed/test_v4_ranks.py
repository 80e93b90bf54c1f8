"""DeepSeek-V4 on ranks that hold a part each: the logits, selections and caches of the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("paddle")

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup
from fd_dsa.errors import CheckpointError, ConfigError
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.four_bit_experts import four_bit_experts
from fd_dsa.models.registry import config_from_dict
from fd_dsa.startup.graph_sizes import graph_bytes
from fd_dsa.startup.memory import weight_bytes, weight_parts
from fd_dsa.startup.plan import make_plan
from tests.distributed.groups import on_ranks
from tests.distributed.test_llm import ranks_left
from tests.models.folders import Stored
from tests.models.published import V4_FLASH
from tests.v4_model import quantised
from tests.v4_model.cases import CASES, GREEDY, GREEDY_PROMPTS, Case
from tests.v4_model.drafts import MIXED
from tests.v4_model.ours import load_model, make_runner, prompt_logits
from tests.v4_model.quantised import FP4, Release, loaded, stored_tensors, write_pair, written
from tests.v4_model.test_engine import REFERENCE, check_tokens, engine_of, tokens_of
from tests.v4_model.test_parity import GOLDENS

WIDE = {"num_attention_heads": 8, "o_groups": 4}
MODELS = {
    "mixed": CASES["mixed"],
    "wide": Case("wide", WIDE, seed=51),
    # no head to split, and one that cannot be
    "tied": CASES["sigmoid-tied"],
    "uneven": Case("uneven", {"vocab_size": 97}, seed=52),
    "released-ratios": CASES["released-ratios"],
}


def flash(**fields: Any) -> DeepseekV4Config:
    """The released model with other fields."""
    return cast(DeepseekV4Config, config_from_dict(V4_FLASH | fields))


def run(case: Case, folder: Path, group: HostGroup | None) -> tuple[Any, Any, Any]:
    """Logits of prompts in chunks, the selections of all layers, and the caches afterwards."""
    runner = make_runner(load_model(folder, group), case.block_size)
    backend: Any = runner.attn_backends[0]
    selections, select = [], backend.select

    def recorded(*given: Any) -> np.ndarray:
        selections.append(select(*given))
        return cast(np.ndarray, selections[-1])

    backend.select = recorded
    logits = prompt_logits(runner, [case.prompt(n) for n in (3, 21, case.lengths[-1])], 40)
    pools = [
        pool
        for layer in runner.caches
        for pool in (layer.keys, layer.index_entries, layer.states, layer.records)
        if pool is not None
    ]
    return logits, selections, pools


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for the order of sums."""
    known = np.abs(wanted[~np.isnan(wanted)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * known.max(initial=0))


def check(case: Case, folder: Path, size: int) -> None:
    logits, selections, pools = run(case, folder, None)
    ranks = on_ranks(size, lambda group: run(case, folder, group))
    first = ranks[0]
    for found in ranks:
        for one, other, own in zip(found[0], logits, first[0], strict=True):
            close(one, other)
            np.testing.assert_array_equal(one, own)
        for one, other in zip(found[1], selections, strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other, own in zip(found[2], pools, first[2], strict=True):
            close(one, other)
            # to the bit the same on all ranks
            np.testing.assert_array_equal(one, own)


@pytest.mark.parametrize(
    ("name", "size"),
    [("mixed", 2), ("wide", 2), ("wide", 4), ("tied", 2), ("uneven", 2), ("released-ratios", 2)],
)
def test_ranks_give_the_logits_of_the_whole_and_choose_alike(
    name: str, size: int, tmp_path: Path
) -> None:
    case = MODELS[name]
    check(case, case.write(tmp_path), size)


RELEASES = {"fp4": FP4, "fp8": Release(experts="fp8"), "float": Release("fp8", float_scales=True)}


@pytest.mark.parametrize(
    "name", ["fp4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "float"))]
)
def test_ranks_share_released_checkpoints(name: str, tmp_path: Path) -> None:
    """FP4 experts keep whole groups. The borders of heads and of FP8 experts cut blocks."""
    folder, _ = write_pair(tmp_path, RELEASES[name])
    check(quantised.CASE, folder, 2)


def parts_of(folder: Path, rank: int) -> dict[str, np.ndarray]:
    """The part of each tensor that one of two ranks loads."""
    return loaded(folder, cast(Group, SimpleNamespace(rank=rank, size=2)))


# two groups of FP4, and for FP8 two whole blocks
SIZES = {"moe_intermediate_size": 256, "n_routed_experts": 2, "num_attention_heads": 8}


def test_parts_put_together_are_the_whole(tmp_path: Path) -> None:
    case = Case("parts", quantised.CASE.changes | SIZES, seed=53)
    folder, twin = write_pair(tmp_path, FP4, case)
    whole, ranks = loaded(twin), [parts_of(folder, rank) for rank in range(2)]
    assert whole.keys() == ranks[0].keys()
    for name, values in whole.items():
        parts = [rank[name] for rank in ranks]
        own = parts[0].shape
        axis = next((i for i, width in enumerate(own) if width < values.shape[i]), None)
        for part in parts if axis is None else [np.concatenate(parts, axis)]:
            np.testing.assert_array_equal(part, values, name)


@pytest.mark.parametrize("place", [("w1", (40, 0)), ("w3", (63, 2)), ("w2", (5, 1))])
def test_a_rank_reads_only_its_part(place: tuple[str, tuple[int, int]], tmp_path: Path) -> None:
    """Damage in the other's part of an expert is not found."""
    folder, _ = write_pair(tmp_path, FP4)
    tensors, (part, cell) = stored_tensors(folder), place
    name = f"layers.1.ffn.experts.2.{part}.scale"
    scales = np.frombuffer(tensors[name].data, np.uint8).reshape(tensors[name].shape).copy()
    scales[cell] = 255
    tensors[name] = Stored("F8_E8M0", scales.shape, scales.tobytes())
    damaged = written(folder, tensors)
    parts_of(damaged, 0)
    with pytest.raises(CheckpointError, match=r"got code 255 \(NaN\)"):
        parts_of(damaged, 1)


SPLIT = {
    "attn.attn_sink": (8,),
    "attn.wq_b.weight": (8 * 512, 1024),
    "attn.wo_a.weight": (1024, 4096),
    "attn.wo_b.weight": (4096, 1024),
    "ffn.shared_experts.w1.weight": (256, 4096),
    "ffn.shared_experts.w2.weight": (4096, 256),
    "ffn.experts.255.w3.weight": (256, 4096),
    "ffn.experts.255.w2.weight": (4096, 256),
}


def test_heads_experts_and_the_head_are_split_and_nothing_else() -> None:
    config = flash()
    whole, parts = expected_tensors(config), expected_tensors(config.split(8))
    prefix = "model.layers.2."
    assert {name: parts[prefix + name].shape for name in SPLIT} == SPLIT
    changed = {
        name.removeprefix(prefix)
        for name, tensor in parts.items()
        if tensor.shape != whole[name].shape
        if name.startswith(prefix) or ".layers." not in name
    }
    experts = {f"ffn.experts.{i}.{part}.weight" for i in range(256) for part in ("w1", "w2", "w3")}
    shared = {f"ffn.shared_experts.{part}.weight" for part in ("w1", "w2", "w3")}
    assert changed == {*SPLIT, *experts, *shared, "lm_head.weight"}
    assert parts["lm_head.weight"].shape == (129280 // 8, 4096)


@pytest.mark.parametrize(
    ("fields", "size", "said"),
    [
        ({}, 3, "got 3, allowed: a divisor of the model's num_attention_heads, 64;"),
        ({}, 16, "got 16, allowed: a divisor of the model's o_groups, 8;"),
        (
            {"moe_intermediate_size": 2050, "expert_dtype": "fp8"},
            4,
            "got 4, allowed: a divisor of the model's moe_intermediate_size, 2050;",
        ),
        (
            {"moe_intermediate_size": 96},
            2,
            "got 2, allowed: one that leaves each rank whole groups of 32 of FP4 experts; "
            "moe_intermediate_size 96 would be split into parts of 48",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    fields: dict[str, Any], size: int, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        flash(**fields).split(size)
    assert f"--tensor-parallel-size: {said}" in str(caught.value)


def test_the_start_refuses_before_it_loads(tmp_path: Path) -> None:
    folder = CASES[GREEDY].write_served(tmp_path)
    config = EngineConfig(model=folder, device="cpu", block_size=16, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="got 4, allowed: a divisor of the model's o_groups, 2"):
        make_plan(config)


def test_a_rank_is_planned_with_its_part(tmp_path: Path) -> None:
    folder = CASES[GREEDY].write_served(tmp_path)
    sizes: dict[str, Any] = {"model": folder, "device": "cpu", "block_size": 16}
    one, two = (
        make_plan(EngineConfig(**sizes, tensor_parallel_size=size)).describe()["memory"]
        for size in (1, 2)
    )
    assert two["weight_bytes"] == 4 * sum(part.size for part in parts_of(folder, 0).values())
    assert two["weight_bytes"] < one["weight_bytes"]
    # caches are whole on every rank
    assert all(two[name] == one[name] for name in ("bytes_per_block", "state_bytes"))


def test_a_gpu_is_planned_with_its_part() -> None:
    config, forms = flash(), {}
    for size in (1, 4):
        part, form = config.split(size), four_bit_experts(None, config, size)
        forms[size] = weight_parts(part, "bfloat16", frozenset(), form)
        assert weight_bytes(part, "bfloat16", frozenset(), form) == sum(forms[size].values())
    # all but the factor of each matrix, and the largest scale of each row of a down projection
    rows = config.num_hidden_layers * config.n_routed_experts * config.hidden_size
    assert 0 <= 4 * forms[4]["routed experts"] - forms[1]["routed experts"] - 3 * rows < 2**20
    assert 4 * forms[4]["head"] == forms[1]["head"]
    assert forms[4]["embedding"] == forms[1]["embedding"]
    sizes = (1, 64), 4096, (2048,), 128
    one, four = (graph_bytes(config.split(size), *sizes) for size in (1, 4))
    # of heads and experts a quarter, and the logits of all ranks
    assert 0.4 * one < four < 0.8 * one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with layers of all kinds and a tokenizer."""
    return CASES[GREEDY].write_served(tmp_path_factory.mktemp("served"))


FORMS: dict[str, dict[str, Any]] = {
    "hits, chunks of 24 beside answers": {"max_num_batched_tokens": 24},
    "preemption": {"num_gpu_blocks_override": 10, "max_model_len": 96},
}
FORMS["host memory"] = FORMS["preemption"] | {"max_num_seqs": 1, "kv_offload_bytes": "64M"}


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.slow if n else ()) for n, form in enumerate(FORMS)],
)
def test_tokens_of_two_processes(form: str, folder: Path) -> None:
    """They are Hugging Face's, and steps, hits and preemptions those of one process."""
    with np.load(GOLDENS / f"{GREEDY}.npz") as data:
        wanted, margins = (data[f"greedy_{name}"][:, :24] for name in ("tokens", "margins"))
    prompts, counts = [CASES[GREEDY].prompt(length) for length in GREEDY_PROMPTS], []
    for size in (1, 2):
        with engine_of(folder, **FORMS[form], tensor_parallel_size=size) as llm:
            for _ in range(2):
                check_tokens(tokens_of(llm, prompts, REFERENCE), wanted, margins)
            stats = llm.stats()
            hits = stats.prefix_cache_hits, stats.prefix_cache_host_hits
            counts.append((stats.num_steps, *hits, stats.num_preemptions))
    assert counts[0] == counts[1] and (counts[0][3] > 0) == (form == "preemption")
    assert (counts[0][2] > 0) == (form == "host memory")
    assert form == "preemption" or counts[0][1] > 0
    assert ranks_left() == []


@pytest.mark.slow
def test_several_outputs_and_random_weights_of_two_processes(folder: Path) -> None:
    """Sampled outputs of one request, and parts of weights that are made up."""
    prompt, found = CASES[GREEDY].prompt(52), []
    several = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8, ignore_eos=True)
    for size in (1, 2):
        with LLM(
            model=folder,
            device="cpu",
            block_size=16,
            max_num_seqs=4,
            load_format="dummy",
            tensor_parallel_size=size,
        ) as llm:
            found.append(tokens_of(llm, [prompt], several))
    assert found[0] == found[1] and len({*map(tuple, found[0])}) == 3


def test_drafts_of_two_processes_change_no_token(tmp_path: Path) -> None:
    folder, found = MIXED.write_served(tmp_path), []
    prompts = [MIXED.prompt(length) for length in (21, 37)]
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    for speculative, size in (("none", 1), (drafts, 2)):
        fields = {"tensor_parallel_size": size, "speculative_config": speculative}
        with engine_of(folder, **fields) as llm:
            tokens = tokens_of(llm, prompts, SamplingParams(temperature=0, max_tokens=24))
            found.append((tokens, llm.stats().num_draft_tokens))
    assert found[0][0] == found[1][0]
    assert found[0][1] == 0 < found[1][1]

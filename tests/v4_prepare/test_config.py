"""Sizes of V4 steps: what follows from them, what is refused, and how a model gives them."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import ConfigError, V4PrepareError
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig

SIZES = {
    "window_size": 128,
    "spec_tokens": 3,
    "block_size": 128,
    "csa_ratio": 4,
    "hca_ratio": 128,
    "index_topk": 512,
    "num_slots": 64,
    "num_blocks": 1000,
    "max_blocks_per_seq": 64,
    "max_num_seqs": 32,
    "max_num_tokens": 128,
    "max_tokens_per_seq": 4,
    "max_model_len": 8192,
}
# what the public configs of the two models say, as far as it matters here
FLASH = {
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "sliding_window": 128,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
}
PRO = FLASH | {
    "num_hidden_layers": 61,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "index_topk": 1024,
}
ROWS = {"max_rows": 32, "max_model_len": 8192, "num_slots": 64, "num_blocks": 1000}


def sizes(**changes: Any) -> V4PrepareConfig:
    return V4PrepareConfig(**(SIZES | changes))


def test_derived_sizes() -> None:
    cfg = sizes()
    assert (cfg.ring_rows, cfg.pool(4), cfg.pool(128)) == (131, 8, 128)
    assert cfg.hca_list_length == 128 * 64 == OUTPUT_SHAPES(cfg)["hca_idx"][0]
    assert cfg.csa_list_length == 128 * 512
    # 4 tokens finish at most one entry of ratio 4, and all of them go into the state ring
    assert (cfg.plan_capacity(4), cfg.wplan_capacity(4)) == (32, 128)
    # 40 tokens a row: 10 entries of 4 in one row, but not in all 32; 8 of them are kept
    prefill = sizes(max_tokens_per_seq=40)
    assert (prefill.plan_capacity(4), prefill.plan_capacity(128)) == (64, 32)
    assert prefill.wplan_capacity(4) == 128
    assert replace(prefill, max_num_tokens=1000).wplan_capacity(4) == 32 * 8


def test_the_list_of_a_longer_context_is_left_to_the_reader() -> None:
    tokens = 64 * 2**20 // 4 // 64
    assert sizes(max_num_tokens=tokens).hca_mode == "list"
    long = sizes(max_num_tokens=tokens + 1)
    assert long.hca_mode == "table"
    assert "hca_idx" not in OUTPUT_SHAPES(long)
    assert sizes(hca_mode="table").hca_mode == "table"
    with pytest.raises(ValueError, match=r"hca_mode: got 'list', .* 67109120 bytes.* use 'table'"):
        sizes(max_num_tokens=tokens + 1, hca_mode="list")


def test_sizes_are_frozen_ints() -> None:
    cfg = sizes(window_size=np.int64(128), max_num_seqs=np.uint8(32))
    assert cfg == sizes() and hash(cfg) == hash(sizes())
    assert all(type(value) in (int, str) for value in asdict(cfg).values())
    with pytest.raises(FrozenInstanceError):
        cfg.window_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, -1) for name in SIZES),
        *((name, 0) for name in SIZES if name != "spec_tokens"),
        *(("window_size", value) for value in (2**31, 1.0, "1", None, True)),
    ],
)
def test_sizes_that_are_none(name: str, value: Any) -> None:
    assert sizes(spec_tokens=0).ring_rows == 128
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, allowed are integers in "):
        sizes(**{name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"swa": "rings"}, "swa: got 'rings', allowed are 'ring', 'paged'"),
        ({"hca_mode": "lists"}, "hca_mode: got 'lists', allowed are 'list', 'table', None"),
        ({"comp_base": -1}, "comp_base: got -1, allowed are integers in 0..2147483647"),
        ({"block_size": 126}, "block_size: got 126, must be a multiple of csa_ratio = 4"),
        ({"block_size": 64}, "block_size: got 64, must be a multiple of hca_ratio = 128"),
        ({"hca_ratio": 4}, "hca_ratio: got 4, must differ from csa_ratio = 4"),
        ({"max_model_len": 8193}, "max_blocks_per_seq: got 64, must be at least 65"),
        ({"num_slots": 2**24}, "num_slots: got 16777216, which makes 2197815296 rows"),
        ({"num_blocks": 2**24, "swa": "paged"}, "num_blocks: got 16777216, which makes 2147483648"),
        ({"comp_base": 2**31 - 1}, "comp_base: got 2147483647, which makes 2147515647 rows"),
        ({"num_blocks": 2**26}, "comp_base: got 8384, which makes 2147492032 rows"),
        ({"max_blocks_per_seq": 2**26}, "max_blocks_per_seq: got 67108864, which makes 2147483648"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as refused:
        sizes(**changes)
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    ("changes", "product"),
    [
        ({"index_topk": 2**24}, 128 * 2**24),
        ({"window_size": 2**20, "num_slots": 1, "max_num_tokens": 2**11}, 2**31),
        ({"max_model_len": 2**20, "max_blocks_per_seq": 2**13, "max_num_tokens": 2**18}, 2**31),
    ],
)
def test_offsets_that_could_exceed_int32(changes: dict[str, Any], product: int) -> None:
    with pytest.raises(V4PrepareError) as refused:
        sizes(**changes)
    assert (refused.value.code, refused.value.row) == ("E_INDPTR", -1)
    assert f"={product} > 2147483647" in str(refused.value)
    # one token less fits, and so does the largest offset that int32 holds
    fewer = SIZES | changes
    sizes(**(fewer | {"max_num_tokens": fewer["max_num_tokens"] - 1}))
    assert sizes(index_topk=2**31 - 1, max_num_tokens=1).max_num_tokens == 1


SAVED = {name: value for name, value in FLASH.items() if name != "compress_ratios"} | {
    "layer_types": [
        {0: "sliding_attention", 4: "compressed_sparse_attention"}.get(
            ratio, "heavily_compressed_attention"
        )
        for ratio in FLASH["compress_ratios"][:43]
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
}
MODELS = {
    "Flash": FLASH,
    "Pro": PRO,
    # released with three draft layers that have a window alone
    "46 ratios": FLASH | {"compress_ratios": [*FLASH["compress_ratios"], 0, 0]},
    "drafts of another ratio": FLASH | {"compress_ratios": [*FLASH["compress_ratios"], 7]},
    # as transformers writes and holds it; without rates they are the released ones
    "saved": SAVED,
    "saved without rates": SAVED | {"compress_rates": None},
    "one kind": FLASH | {"compress_ratios": [0, 4] * 22},
    "no entries": FLASH | {"compress_ratios": [0] * 43},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_window_ratios_and_topk(name: str, tmp_path: Path) -> None:
    model, path = MODELS[name], tmp_path / "config.json"
    path.write_text(json.dumps(model | {"model_type": "deepseek_v4", "hidden_size": 1}))
    for source in (model, SimpleNamespace(**model, unknown=1.0), path, tmp_path, str(tmp_path)):
        cfg = V4PrepareConfig.from_model(source, **ROWS, spec_tokens=3)
        assert cfg == sizes(index_topk=model["index_topk"])


def test_rates_of_layer_types_are_its_ratios() -> None:
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 16}
    cfg = V4PrepareConfig.from_model(SAVED | {"compress_rates": rates}, **ROWS)
    assert (cfg.csa_ratio, cfg.hca_ratio) == (8, 16)


@pytest.mark.oracle
def test_configurations_of_transformers() -> None:
    """As constructed from a released config.json, and as it writes them to a folder."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this release of transformers has no DeepSeek-V4")
    hf_config = transformers.DeepseekV4Config(**(MODELS["46 ratios"]))
    for source in (hf_config, hf_config.to_dict(), json.loads(hf_config.to_json_string())):
        assert V4PrepareConfig.from_model(source, **ROWS, spec_tokens=3) == sizes()


def test_sizes_that_a_model_leaves_open() -> None:
    decode = V4PrepareConfig.from_model(FLASH, **ROWS)
    assert (decode.max_num_tokens, decode.max_tokens_per_seq) == (32, 1)
    assert (decode.max_blocks_per_seq, decode.swa, decode.comp_base) == (64, "ring", 64 * 128)
    given = {"max_num_tokens": 4096, "max_blocks_per_seq": 70, "block_size": 256}
    given |= {"swa": "paged", "comp_base": 0, "hca_mode": "table"}
    mixed = V4PrepareConfig.from_model(FLASH, **ROWS, **given)
    assert mixed.max_tokens_per_seq == 4096
    assert {name: getattr(mixed, name) for name in given} == given
    chunk = V4PrepareConfig.from_model(FLASH, **ROWS, max_num_tokens=4096, max_tokens_per_seq=512)
    assert chunk.max_tokens_per_seq == 512


def test_a_model_of_which_only_the_needed_fields_are_known() -> None:
    fields = {"compress_ratios": (4, 128, 0), "sliding_window": 256, "index_topk": 7}
    cfg = V4PrepareConfig.from_model(fields, **ROWS)
    assert (cfg.csa_ratio, cfg.hca_ratio, cfg.window_size, cfg.index_topk) == (4, 128, 256, 7)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"compress_ratios": None},
            "layer_types: got None, allowed: layer_types or compress_ratios",
        ),
        ({"compress_ratios": "4"}, "compress_ratios: got '4', allowed: a list"),
        ({"compress_ratios": [0, 4, -128]}, "compress_ratios: got -128, allowed: 0, 4 or 128"),
        ({"compress_ratios": [True, 4, 128]}, "compress_ratios: got [True, 4, 128], allowed"),
        ({"compress_ratios": [4.0, 128]}, "compress_ratios: got [4.0, 128], allowed: a list"),
        ({"compress_ratios": [0, 8] * 22}, "compress_ratios: got 8, allowed: 0, 4 or 128"),
        ({"compress_ratios": [4, 128]}, "compress_ratios: got [4, 128], allowed: a list of at"),
        ({"num_hidden_layers": "43"}, "num_hidden_layers: got '43', allowed: an integer"),
        ({"layer_types": "mla"}, "layer_types: got 'mla', allowed: a list of at least 43"),
        ({"layer_types": ["mla"] * 43}, "layer_types[0]: got 'mla', allowed: 'sliding_attention'"),
        ({"layer_types": [[]]}, "layer_types: got [[]], allowed: a list"),
        ({"layer_types": []}, "layer_types: got [], allowed: a list of at least 43"),
        (SAVED | {"compress_rates": 4}, "compress_rates: got 4, allowed: an object"),
        (
            SAVED | {"compress_rates": {"compressed_sparse_attention": 0}},
            "compress_rates.compressed_sparse_attention: got 0, allowed: an integer of at least 1",
        ),
        ({"sliding_window": None}, "sliding_window: got None, allowed: an integer of at least 1"),
        ({"sliding_window": 0}, "sliding_window: got 0, allowed: an integer of at least 1"),
        ({"index_topk": "512"}, "index_topk: got '512', allowed: an integer of at least 1"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings: got 4096, allowed: at least"),
    ],
    ids=str,
)
def test_fields_of_a_model_that_cannot_be_served(changes: dict[str, Any], text: str) -> None:
    for source, name in (
        (FLASH | changes, "hf_config"),
        (SimpleNamespace(**(FLASH | changes)), "SimpleNamespace"),
    ):
        with pytest.raises(ConfigError) as refused:
            V4PrepareConfig.from_model(source, **ROWS)
        assert str(refused.value).startswith(f"{name}: {text}")


@pytest.mark.parametrize("name", ["max_rows", "max_model_len", "spec_tokens", "block_size"])
def test_sizes_beside_a_model_are_named_as_they_were_given(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got -1, allowed are integers"):
        V4PrepareConfig.from_model(FLASH, **(ROWS | {name: -1}))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: file not found"):
        V4PrepareConfig.from_model(tmp_path, **ROWS)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"got a JSON list, allowed: an object"):
        V4PrepareConfig.from_model(tmp_path, **ROWS)

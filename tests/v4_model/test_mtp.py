"""DeepSeek-V4's layer for multi-token prediction: its definition, its caches, its faults."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError
from fd_dsa.models.deepseek_v4.model import DeepseekV4ForCausalLM, MultiTokenPredictor
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict
from fd_dsa.startup.plan import make_plan
from fd_dsa.v4_attention.pooling import PoolingPlan
from tests.models.published import V4_FLASH
from tests.v4_model.cases import CASES, Case
from tests.v4_model.drafts import MIXED, MOST, MTP, RELEASED
from tests.v4_model.mtp_reference import MtpReference
from tests.v4_model.ours import load_model, make_runner, prompt_logits, run_step
from tests.v4_model.quantised import CASE as QUANTISED
from tests.v4_model.quantised import FP4, write_pair
from tests.v4_model.test_wrong_builds import put_in

LENGTH, TOLERANCE = 70, 1e-4


class Sides:
    """A model with its layer, and what both have to give for a prompt."""

    def __init__(self, case: Case, folder: Path, length: int) -> None:
        self.case, self.ids = case, case.prompt(length)
        self.folder = case.write(folder, "deepseek")
        self.model = load_model(self.folder, mtp=True)
        runner = self.runner()
        (self.main,) = prompt_logits(runner, [self.ids], length)
        streams = runner.forward_meta.hidden_states
        self.streams = streams.reshape(length, case.config["hc_mult"], -1)
        tensors = load_file(self.folder / "model.safetensors")
        self.reference = MtpReference(case.config, tensors)

    def runner(self, max_drafts: int = MOST) -> Any:
        return make_runner(self.model, self.case.block_size, max_drafts=max_drafts)

    def wanted(self, next_ids: Any, streams: np.ndarray) -> np.ndarray:
        """Logits of the layer after each token."""
        return self.reference.logits(self.reference.streams(np.array(next_ids), streams))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(MIXED, tmp_path_factory.mktemp("mixed"), LENGTH)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(RELEASED, tmp_path_factory.mktemp("released"), 270)


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """True if all logits are equal within rounding."""
    return bool(np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max())


def layer_logits(runner: Any, row: int, ids: list[int], begin: int, end: int) -> np.ndarray:
    """Logits of the layer after each token of a chunk, whose next tokens are known."""
    run_step(runner, {row: (ids[begin:end], begin)})
    logits: np.ndarray = runner.predict_more(np.array(ids[begin + 1 : end + 1]), range(end - begin))
    return logits


CHUNKS = ([69], [16, 53], [7, 9, 24, 29], [33, *[1] * 36], [40, *[2, 3, 4] * 3, 2])


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_logits_equal_their_definition_in_any_chunks(chunks: list[int], mixed: Sides) -> None:
    runner, begin, found = mixed.runner(), 0, []
    for size in chunks:
        found.append(layer_logits(runner, 2, mixed.ids, begin, begin + size))
        begin += size
    assert near(np.concatenate(found), mixed.wanted(mixed.ids[1:], mixed.streams[:-1])[:begin])


def test_logits_of_released_windows(released: Sides) -> None:
    found = layer_logits(released.runner(), 0, released.ids, 0, 269)
    assert near(found, released.wanted(released.ids[1:], released.streams[:-1]))


def test_streams_of_the_model_are_those_of_its_logits(mixed: Sides) -> None:
    """The model gives streams of all tokens, which its own head turns into its logits."""
    rows = mixed.streams.reshape(LENGTH, -1)
    np.testing.assert_array_equal(mixed.model.compute_logits(rows), mixed.main)
    plain = load_model(mixed.folder)
    (found,) = prompt_logits(make_runner(plain, 16), [mixed.ids], LENGTH)
    np.testing.assert_array_equal(found, mixed.main)


def test_further_drafts_go_on_from_the_layers_own_streams(mixed: Sides) -> None:
    ids, runner = mixed.ids, mixed.runner()
    batch, last = runner.input_batch, {0: 7, 2: 8}
    run_step(runner, {row: (ids[:20], 0) for row in last})
    next_ids = [*ids[1:20], 7, *ids[1:20], 8]
    logits = runner.predict_more(np.array(next_ids), [19, 39])
    for place, (row, token) in enumerate(last.items()):
        own_ids, streams = [*ids[1:20], token], mixed.streams[:20]
        assert near(logits[place], mixed.wanted(own_ids, streams)[19])
        if row != 2:
            continue
        # of two rows one goes on, twice
        follows, found = [1], logits
        for depth, draft in enumerate((30, 31)):
            after = mixed.reference.streams(np.array(own_ids), streams)
            own_ids, streams = [*own_ids, draft], np.concatenate([streams, after[-1:]])
            batch.begin_step()
            batch.add_row(row, [draft], 20 + depth, is_prefill=False)
            found = runner.predict_more(np.array([draft]), [0], follows)
            assert near(found[0], mixed.wanted(own_ids, streams)[-1])
            follows = [0]


def with_rejected(sides: Sides, begin: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the model and of the layer for tokens that came with any drafts, right and wrong.

    A step has one token and up to three drafts, of which any number is right. After it the layer
    runs for all tokens, as for drafts.

    Args:
        begin: tokens that a prompt has before them.
    """
    rng, runner, ids = np.random.default_rng(seed), sides.runner(), sides.ids
    last, main, layer = len(ids) - 1, [], []
    layer_logits(runner, 1, ids, 0, begin)
    done = begin
    while done < last:
        count = int(rng.integers(1, MOST + 2))
        right = min(int(rng.integers(1, count + 1)), last - done)
        wrong = rng.integers(2, 96, count - right).tolist()
        tokens = ids[done : done + right] + wrong
        logits = run_step(runner, {1: (tokens, done)})[1]
        next_ids = np.array([*ids[done + 1 : done + right + 1], *wrong])
        more = runner.predict_more(next_ids, range(right))
        main.append(logits[:right])
        layer.append(more)
        done += right
    return np.concatenate(main), np.concatenate(layer)


@pytest.mark.parametrize("seed", range(4))
def test_rejected_drafts_leave_nothing(seed: int, mixed: Sides) -> None:
    """Borders of windows, of entries of 4 and 16 tokens, and of blocks."""
    main, layer = with_rejected(mixed, 1 + seed, seed)
    np.testing.assert_allclose(main, mixed.main[1 + seed : -1], rtol=0, atol=2e-5)
    assert near(layer, mixed.wanted(mixed.ids[1:], mixed.streams[:-1])[1 + seed :])


@pytest.mark.parametrize("begin", [110, 230])
def test_rejected_drafts_around_released_borders(begin: int, released: Sides) -> None:
    """Borders of windows, of entries and of blocks, at 128 and at 256 tokens."""
    main, layer = with_rejected(released, begin)
    np.testing.assert_allclose(main, released.main[begin:-1], rtol=0, atol=2e-5)
    assert near(layer, released.wanted(released.ids[1:], released.streams[:-1])[begin:])


def test_hits_after_rejected_drafts(mixed: Sides) -> None:
    """A row that takes the blocks of one with rejected drafts goes on as that one."""
    ids, runner = mixed.ids, mixed.runner()
    layer_logits(runner, 0, ids, 0, 29)
    for begin in range(29, 53, 2):
        wrong = [*ids[begin : begin + 2], 3, 4]
        run_step(runner, {0: (wrong, begin)})
        runner.predict_more(np.array([*ids[begin + 1 : begin + 3], 3, 4]), [1])
    runner.input_batch.set_blocks(1, runner.input_batch.block_tables[0, :3])
    main = run_step(runner, {1: (ids[48:-1], 48)})[1]
    np.testing.assert_allclose(main, mixed.main[48:-1], rtol=0, atol=2e-5)
    found = runner.predict_more(np.array(ids[49:]), range(len(ids) - 49))
    assert near(found, mixed.wanted(ids[1:], mixed.streams[:-1])[48:])


# owner, function, piece of its source, what takes its place
FAULTS: dict[str, tuple[Any, str, str, str]] = {
    "rings as short as without drafts": (
        *(PoolingPlan, "__init__"),
        *("cfg.source_rows(ratio)", "pool"),
    ),
    "no norm of the streams": (
        *(MultiTokenPredictor, "__call__"),
        *("self._stream_norm.normalize(rows)", "rows"),
    ),
    "no norm of the token": (
        *(MultiTokenPredictor, "__call__"),
        *("self._token_norm.normalize(self.embed_tokens[ids])", "self.embed_tokens[ids]"),
    ),
    "streams summed first": (
        *(MultiTokenPredictor, "__call__"),
        "rows, width = hidden.reshape(-1, embedded.shape[1]), embedded.shape[1]",
        "width = embedded.shape[1]; n = self._collapse.num_streams; "
        "rows = self._collapse.weighted_sum(hidden.reshape(len(ids), n, -1)).repeat(n, axis=0)",
    ),
    "token in one stream": (
        *(MultiTokenPredictor, "__call__"),
        "np.add(streams, embedded[:, None], out=residual[:, :-1])",
        "residual[:, :-1] = streams; residual[:, 0] += embedded",
    ),
    "frequencies of layers with entries": (
        *(DeepseekV4ForCausalLM, "__init__"),
        *("weights, self._rotations[True]", "weights, self._rotations[False]"),
    ),
    "streams of sampled tokens alone": (
        *(DeepseekV4ForCausalLM, "__call__"),
        *("self.mtp is not None or len", "len"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, mixed: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, *FAULTS[fault])
    faulty = Sides.__new__(Sides)
    vars(faulty).update(vars(mixed))
    faulty.model = load_model(mixed.folder, mtp=True)
    # a row samples its last token only, as prompts do
    with np.errstate(all="ignore"):
        runner = faulty.runner()
        runner.input_batch.begin_step()
        runner.input_batch.add_row(0, mixed.ids[:30], 0, is_prefill=True)
        runner.execute_model(np.array([29]))
        layer = runner.predict_more(np.array(mixed.ids[1:31]), range(30))
        main, _ = with_rejected(faulty, 2)
    wanted = mixed.wanted(mixed.ids[1:31], mixed.streams[:30])
    is_right = near(layer, wanted), near(main, mixed.main[2:-1])
    assert is_right == ((True, False) if "rings" in fault else (False, True))


def test_quantised_layers_are_those_of_the_twin(tmp_path: Path) -> None:
    """FP4 experts and FP8 projections of the layer, as releases store them."""
    case = Case("quantised", QUANTISED.changes | MTP, seed=22)
    prompt, found = case.prompt(40), []
    for folder in write_pair(tmp_path, FP4, case):
        runner = make_runner(load_model(folder, mtp=True), case.block_size, max_drafts=1)
        found.append(layer_logits(runner, 0, prompt, 0, 39))
    np.testing.assert_array_equal(*found)
    assert np.ptp(found[0]) > 1


def test_names_of_the_releases() -> None:
    names = expected_tensors(config_from_dict(V4_FLASH).with_mtp_layer())
    shapes = {
        "mtp.0.e_proj.weight": (4096, 4096),
        "mtp.0.h_proj.weight": (4096, 4096),
        "mtp.0.enorm.weight": (4096,),
        "mtp.0.hnorm.weight": (4096,),
        "mtp.0.norm.weight": (4096,),
        "mtp.0.hc_head_fn": (4, 16384),
        "mtp.0.hc_head_base": (4,),
        "mtp.0.hc_head_scale": (1,),
        "mtp.0.attn_norm.weight": (4096,),
        "mtp.0.attn.wq_a.weight": (1024, 4096),
        "mtp.0.attn.attn_sink": (64,),
        "mtp.0.hc_ffn_fn": (24, 16384),
        "mtp.0.ffn.gate.bias": (256,),
        "mtp.0.ffn.experts.255.w2.weight": (4096, 2048),
    }
    assert {name: names[name].shape for name in shapes} == shapes
    assert names["mtp.0.e_proj.weight"].quantisable
    assert names["mtp.0.ffn.experts.0.w1.weight"].may_be_fp4
    other = [name for name in names if "mtp" in name and ("indexer" in name or "compr" in name)]
    assert not other and "mtp.0.ffn.gate.tid2eid" not in names
    assert not any("mtp" in name for name in expected_tensors(config_from_dict(V4_FLASH)))


def plan_of(folder: Path, **fields: Any) -> Any:
    """The plan of an engine on a CPU."""
    return make_plan(EngineConfig(model=folder, device="cpu", block_size=16, **fields))


def drafting(count: int = MOST, method: str = "mtp") -> dict[str, Any]:
    """The flag."""
    return {"speculative_config": {"method": method, "num_speculative_tokens": count}}


def test_memory_of_the_layer_and_of_longer_rings(tmp_path: Path) -> None:
    folder = MIXED.write_served(tmp_path)
    plain, ngram, mtp = (
        plan_of(folder, max_num_seqs=5, num_gpu_blocks_override=64, **fields).memory
        for fields in ({}, drafting(method="ngram"), drafting())
    )
    window = 16 * 32 * 4
    assert mtp.bytes_per_block - plain.bytes_per_block == window
    assert ngram.bytes_per_block == plain.bytes_per_block
    # a source of a CSA layer has two halves of values and gates, with the indexer's channels
    source = 4 * 2 * (2 * 2 * (32 + 16) + 2 * 32)
    assert (
        ngram.state_bytes - plain.state_bytes
        == 5 * MOST * source
        == (mtp.state_bytes - plain.state_bytes)
    )
    layer = sum(
        one.nbytes
        for name, one in load_file(folder / "model.safetensors").items()
        if name.startswith("mtp.")
    )
    assert mtp.weight_bytes - plain.weight_bytes == layer > 0


DSPARK = {f"mtp.{i}.attn_norm.weight": np.ones(48, np.float32) for i in range(3)} | {
    "mtp.0.main_proj.weight": np.ones((48, 144), np.float32)
}


def test_checkpoints_with_another_drafter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log has one line on the skipped stages of DSpark, and `mtp` drafts are refused."""
    folder = CASES["mixed"].write_served(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (folder / "config.json").write_text(json.dumps(MIXED.config))
    save_file(tensors | DSPARK, path)
    with caplog.at_level(logging.INFO, "fd_dsa"):
        plan_of(folder)
    assert [r.message.count("DSpark") for r in caplog.records if "skipped" in r.message] == [1]
    with pytest.raises(ConfigError, match=r"method: got 'mtp', allowed: ngram.*DSpark"):
        plan_of(folder, **drafting())
    plan_of(folder, **drafting(method="ngram"))
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"layers 0 to 5, and no tensor 'mtp\.0\.e_proj\.weight'"):
        plan_of(folder, **drafting())
    CASES["mixed"].write(folder)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers 0"):
        plan_of(folder, **drafting())

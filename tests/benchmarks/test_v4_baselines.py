"""The baseline of the V4 preparation makes the arrays of the loop oracle."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks._v4_baselines import NAMES, HostArrays, Vectorised
from benchmarks._v4_steps import Decode, config_of
from fd_dsa.v4_prepare import V4PrepareConfig
from tests.reference.v4_prepare import naive

SMALL = {"window_size": 8, "block_size": 16, "csa_ratio": 4, "hca_ratio": 16, "index_topk": 3}
SMALL |= {"num_slots": 8, "num_blocks": 64}


def poisoned(count: int) -> np.ndarray:
    return np.full(count, -77, np.int32)


def check(config: V4PrepareConfig, inputs: tuple[np.ndarray, ...]) -> None:
    """Compare every array of one step."""
    out = HostArrays(config, poisoned)
    for name in NAMES:
        out.arrays[name].fill(-77)
    ctx, q, slot, table = inputs
    baseline = Vectorised(config, out)
    baseline.first(ctx, q, slot)
    baseline.second(ctx, q, table)
    wanted = naive(config, *inputs)
    assert set(wanted) == {*NAMES, "ext_len"} and not wanted["ext_len"].any()
    for name in NAMES:
        end = out.used("entries") if name == "hca_idx" else None
        np.testing.assert_array_equal(out.arrays[name][:end], wanted[name], name)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_decode_steps(drafts: int) -> None:
    config = config_of(5, drafts, max_model_len=4096)
    decode = Decode(config, 1024)
    for _ in range(3):
        check(config, (*decode.inputs(), decode.block_table))
        for _ in range(13):
            decode.advance()


def test_ragged_rows_idle_rows_and_padding() -> None:
    sizes = {"max_blocks_per_seq": 8, "max_num_seqs": 6, "max_num_tokens": 20}
    sizes |= {"max_tokens_per_seq": 4, "max_model_len": 128, "spec_tokens": 3}
    config = V4PrepareConfig(**SMALL | sizes)
    table = np.random.default_rng(3).permutation(64)[:40].reshape(5, 8).astype(np.int32)
    for ctx, q in (
        ([1, 34, 0, 128, 19], [1, 4, 0, 4, 2]),
        ([3, 16, 5, 64, 33], [3, 1, 0, 4, 1]),
        ([0, 7, 0, 0, 0], [0, 0, 0, 0, 0]),
    ):
        rows = [np.array(values, np.int32) for values in (ctx, q, [7, 1, -1, 0, 4])]
        check(config, (*rows, table))


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_operators_make_their_part(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("benchmarks._v4_sides.DEVICE", "cpu")
    from benchmarks._v4_sides import Operators

    config = config_of(5, drafts, max_model_len=4096)
    decode, run = Decode(config, 1024), Operators(config)
    for context in (drafts + 1, 1024):
        decode.ctx[:] = context + np.arange(5)
        run.inputs.copy_(torch.from_numpy(np.stack([decode.ctx, decode.slot])))
        found = run()
        wanted = naive(config, *decode.inputs(), decode.block_table.clip(0))
        assert len(found) == 7
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor.numpy(), wanted[name], name)

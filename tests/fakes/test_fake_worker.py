"""The double's runner: tasks, states of rows, and what a step is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.config import demo_model_path
from tests.fakes import golden
from tests.fakes.trees import DEVELOP, UPSTREAM_ENV, V1_VARIABLE, installed

ROWS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time_buffer")


@pytest.fixture
def develop() -> Iterator[None]:
    with installed(DEVELOP):
        yield


def make_runner(**overrides: Any) -> Any:
    """A runner without a model."""
    from fastdeploy.config import fd_config
    from fastdeploy.worker.gpu_worker import GpuWorker

    sizes = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    worker = GpuWorker(fd_config(demo_model_path(), **{**sizes, **overrides}))
    worker.init_device()
    return worker.model_runner


def state(runner: Any, row: int) -> tuple[int, int, int, bool]:
    """(encoder, decoder, this_time, stopped) of a row."""
    values = [int(runner.share_inputs[name].numpy().reshape(-1)[row]) for name in ROWS]
    return (*values, bool(runner.share_inputs["stop_flags"].numpy()[row, 0]))


def task(kind: str, row: int = 1, **fields: Any) -> Any:
    from fastdeploy.engine.request import Request, RequestType

    return Request(idx=row, task_type=RequestType[kind], **fields)


PROMPT = list(range(10, 110))
PREFILLS = {
    "first chunk": ((0, 40, [], False), (40, 0, 40)),
    "later chunk": ((40, 100, [], False), (60, 40, 60)),
    "prefix hit": ((64, 100, [], False), (36, 64, 36)),
    "resumed": ((0, 103, [1, 2, 3], False), (103, 0, 103)),
    "decode node": ((100, 101, [5], True), (0, 100, 1)),
}


@pytest.mark.parametrize("name", PREFILLS)
def test_a_prefill_task_sets_the_row(develop: None, name: str) -> None:
    (start, end, output, is_remote), expected = PREFILLS[name]
    runner = make_runner()
    request = task(
        "PREFILL",
        prompt_token_ids=PROMPT,
        output_token_ids=output,
        prefill_start_index=start,
        prefill_end_index=end,
        block_tables=[7, 3],
        disaggregate_decode=is_remote,
    )
    runner.insert_tasks_v1([request], 2)
    assert state(runner, 1) == (*expected, False)
    assert runner.share_inputs["block_tables"].numpy()[1].tolist()[:3] == [7, 3, -1]
    assert runner.share_inputs["seq_lens_this_time"].shape == [2]
    tokens = PROMPT + output
    assert runner.share_inputs["input_ids"].numpy()[1, : end - start].tolist() == tokens[start:end]
    assert runner.exist_prefill() is not is_remote
    assert bool(runner.share_inputs["is_chunk_step"].numpy()[1]) == (name == "first chunk")


def test_other_tasks_change_tables_and_stop_rows(develop: None) -> None:
    runner = make_runner()
    prefill = task("PREFILL", prompt_token_ids=PROMPT, prefill_end_index=100, block_tables=[5])
    runner.insert_tasks_v1([prefill], 2)
    runner.insert_tasks_v1([task("DECODE", block_tables=[5, 9])], 2)
    assert runner.share_inputs["block_tables"].numpy()[1].tolist()[:3] == [5, 9, -1]
    assert state(runner, 1) == (100, 0, 100, False)
    runner.insert_tasks_v1([task("PREEMPTED")], 2)
    assert runner.share_inputs["block_tables"].numpy()[1].tolist()[:2] == [-1, -1]
    assert state(runner, 1) == (0, 0, 0, True)


# (encoder, decoder, this_time), prompt_lens, sampled -> the same after the step, stopped
TRANSITIONS = {
    "the prompt's end": ((100, 0, 100), 100, [5], (0, 100, 1), False),
    "a chunk": ((40, 0, 40), 100, [], (0, 0, 0), True),
    "the last chunk": ((60, 40, 60), 100, [5], (0, 100, 1), False),
    "decode": ((0, 110, 1), 100, [6], (0, 111, 1), False),
    "drafts, two accepted": ((0, 110, 4), 100, [6, 7], (0, 112, 1), False),
    "no block for the next token": ((0, 127, 1), 100, [6], (0, 0, 0), True),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_rows_after_a_step(develop: None, name: str) -> None:
    """custom_ops/gpu_ops/update_inputs_v1.cu."""
    from fastdeploy.model_executor.pre_and_post_process import set_row, update_inputs_v1

    before, prompt_len, sampled, after, stopped = TRANSITIONS[name]
    runner = make_runner()
    share = runner.share_inputs
    runner.insert_tasks_v1([task("DECODE", block_tables=[2, 3])], 2)
    set_row(share, 1, before, stopped=False)
    share["prompt_lens"][1] = prompt_len
    update_inputs_v1(share, {1: sampled}, 64)
    assert state(runner, 1) == (*after, stopped)
    if sampled and not stopped:
        assert share["input_ids"].numpy()[1, 0] == sampled[-1]
    blocked = bool(share["is_block_step"].numpy()[1])
    assert blocked == (name == "no block for the next token")


def test_a_blocked_row_goes_on_when_its_block_comes(develop: None) -> None:
    from fastdeploy.model_executor.pre_and_post_process import (
        recover_decode_task,
        set_row,
        update_inputs_v1,
    )

    runner = make_runner()
    share = runner.share_inputs
    runner.insert_tasks_v1([task("DECODE", block_tables=[2])], 2)
    set_row(share, 1, (0, 63, 1), stopped=False)
    update_inputs_v1(share, {1: [9]}, 64)
    recover_decode_task(share, 64)
    assert state(runner, 1) == (0, 0, 0, True)
    runner.insert_tasks_v1([task("DECODE", block_tables=[2, 8])], 2)
    recover_decode_task(share, 64)
    assert state(runner, 1) == (0, 64, 1, False)
    assert share["input_ids"].numpy()[1, 0] == 9


@pytest.mark.parametrize("launched", [13, 16])
def test_tokens_of_a_step_are_packed(develop: None, launched: int) -> None:
    """custom_ops/gpu_ops/get_padding_offset.cu, on the worked step."""
    from fastdeploy.model_executor.pre_and_post_process import pre_process

    ids = paddle.to_tensor(np.arange(5 * 8).reshape(5, 8))
    drafts = paddle.to_tensor(-np.arange(5 * 4).reshape(5, 4))
    now, encoder, decoder = (
        paddle.to_tensor(lengths, dtype="int32")
        for lengths in (golden.THIS_TIME, golden.ENCODER, golden.DECODER)
    )
    packed, rows, cu_q, cu_k = pre_process(launched, ids, now, True, drafts, encoder, decoder)
    expected = [0, 8, 9, 10, 11, 12, 24, 25, 26, 27, -16, -17, -18]
    assert packed.tolist() == expected + [2] * (launched - 13)
    assert rows.tolist() == golden.BATCH_IDS + [-1] * (launched - 13)
    assert cu_q.tolist() == golden.CU_SEQLENS_Q and cu_k.tolist() == golden.CU_SEQLENS_K


def test_forward_meta_has_the_running_rows(develop: None) -> None:
    runner = make_runner()
    runner.num_gpu_blocks = 8
    runner.initialize_kv_cache()
    prefill = task("PREFILL", row=0, prompt_token_ids=PROMPT, prefill_end_index=9, block_tables=[5])
    runner.insert_tasks_v1([prefill], 1)
    runner._prepare_inputs()
    meta = runner.forward_meta
    for lengths in (meta.seq_lens_encoder, meta.seq_lens_this_time):
        assert lengths.shape == [1]
    assert meta.block_tables.shape[0] == 1
    # the runner makes them after that
    assert meta.position_ids is None
    runner._pad_and_place()
    assert meta.position_ids.tolist() == list(range(9))
    assert meta.slot_mapping.tolist() == list(range(5 * 64, 5 * 64 + 9))


@pytest.mark.parametrize("v1", ["1", "0"])
def test_who_makes_the_caches_decides_their_dtype(v1: str) -> None:
    """Bytes from the V1 cache manager; of the model's dtype from the runner since #8060."""
    with installed(DEVELOP, {**UPSTREAM_ENV, V1_VARIABLE: v1}):
        runner = make_runner()
        runner.num_gpu_blocks = 8
        runner.initialize_kv_cache()
        caches = runner.share_inputs["caches"]
        layers = runner.model_config.num_hidden_layers
        assert len(caches) == 2 * layers
        assert {str(cache.dtype) for cache in caches} == {
            "paddle.uint8" if v1 == "1" else "paddle.float32"
        }
        assert [cache.shape[-1] for cache in caches[:2]] == [656, 132]
        if v1 == "1":
            runner.attn_backends.pop()
            with pytest.raises(ValueError, match="attention backends for"):
                runner.initialize_kv_cache()


def test_a_proposer_with_a_model_unpacks_two_shapes() -> None:
    """spec_decode/mtp.py cannot start with upstream's DSA backend either, without V1."""
    with installed(DEVELOP, {**UPSTREAM_ENV, V1_VARIABLE: "0"}):
        from fastdeploy.spec_decode import MTPProposer

        runner = make_runner()
        with pytest.raises(ValueError, match="too many values to unpack"):
            MTPProposer(runner.fd_config, runner, 0, 0, runner.share_inputs)

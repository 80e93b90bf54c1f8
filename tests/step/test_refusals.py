"""A step that cannot be right is refused before anything of the last step changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import BackendUnavailable, CapacityError, DtypeError, ShapeError
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from tests.step.helpers import arrays_of
from tests.strategies import make_batch

INT32_MAX = 2**31 - 1
ROWS, TOKENS, COLUMNS, BLOCK_SIZE, NUM_BLOCKS = 5, 32, 3, 16, 40
FIELDS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")

# prefill chunk, decode, idle, draft tokens, decode: 10 + 1 + 0 + 2 + 1 tokens
LENGTHS = [(10, 20, 10), (0, 33, 1), (0, 0, 0), (0, 15, 2), (0, 7, 1)]


def _legal_step() -> dict[str, Any]:
    batch = make_batch(LENGTHS, BLOCK_SIZE, seed=3)
    assert batch.block_tables.shape == (ROWS, COLUMNS)
    return dict(zip(FIELDS, batch.inputs(), strict=True))


def _set(field: str, row: int, value: int) -> Callable[[dict[str, Any]], None]:
    """Change one length."""

    def change(step: dict[str, Any]) -> None:
        step[field][row] = value

    return change


def _set_block(row: int, column: int, value: int) -> Callable[[dict[str, Any]], None]:
    """Change one entry of the block table."""

    def change(step: dict[str, Any]) -> None:
        step["block_tables"][row, column] = value

    return change


def _set_tokens(row: int, value: int) -> Callable[[dict[str, Any]], None]:
    """Change a prefill row's number of new tokens consistently."""

    def change(step: dict[str, Any]) -> None:
        step["seq_lens_encoder"][row] = step["seq_lens_this_time"][row] = value

    return change


def _keyword(**keywords: Any) -> Callable[[dict[str, Any]], None]:
    """Add arguments."""
    return lambda step: step.update(keywords)


def _replace(field: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """Change a whole array."""

    def change(step: dict[str, Any]) -> None:
        step[field] = make(step[field])

    return change


Case = tuple[Callable[[dict[str, Any]], None], type[Exception], list[str]]
REFUSED: dict[str, Case] = {
    "negative encoder": (
        _set("seq_lens_encoder", 3, -2),
        ValueError,
        ["seq_lens_encoder", "row 3 is -2", "0 or more"],
    ),
    "negative decoder": (
        _set("seq_lens_decoder", 4, -7),
        ValueError,
        ["seq_lens_decoder", "row 4 is -7", "0 or more"],
    ),
    "negative this time": (
        _set("seq_lens_this_time", 2, -1),
        ValueError,
        ["seq_lens_this_time", "row 2 is -1", "0 or more"],
    ),
    "smallest int32": (
        _set("seq_lens_decoder", 0, -INT32_MAX - 1),
        ValueError,
        ["seq_lens_decoder", f"row 0 is {-INT32_MAX - 1}"],
    ),
    "encoder below this time": (
        _set("seq_lens_encoder", 0, 9),
        ValueError,
        ["seq_lens_encoder", "row 0 is 9", "seq_lens_this_time 10", "0 (decode or idle row)"],
    ),
    "encoder of an idle row": (
        _set("seq_lens_encoder", 2, 4),
        ValueError,
        ["seq_lens_encoder", "row 2 is 4", "seq_lens_this_time 0"],
    ),
    "table too short": (
        _set("seq_lens_decoder", 3, 47),
        CapacityError,
        ["block_tables", "47 cached + 2 new tokens of row 3", "4 blocks of 16", "3 columns"],
    ),
    "length past int32": (
        _set("seq_lens_decoder", 1, INT32_MAX),
        CapacityError,
        ["block_tables", f"{INT32_MAX} cached + 1 new tokens of row 1", "3 columns"],
    ),
    "needed block is missing": (
        _set_block(1, 2, -1),
        ValueError,
        ["block_tables", "row 1, column 2 is -1", "33 cached + 1 new", "0..39"],
    ),
    "block of the prefix is missing": (
        _set_block(1, 0, -1),
        ValueError,
        ["block_tables", "row 1, column 0 is -1", "0..39"],
    ),
    "block is past the cache": (
        _set_block(3, 1, NUM_BLOCKS),
        ValueError,
        ["block_tables", "row 3, column 1 is 40", "0..39"],
    ),
    "block is very negative": (
        _set_block(4, 0, -INT32_MAX),
        ValueError,
        ["block_tables", f"row 4, column 0 is {-INT32_MAX}"],
    ),
    "too many tokens": (
        _set_tokens(0, 29),
        CapacityError,
        ["seq_lens_this_time", "33 tokens", "row 0: 29", "max_num_tokens = 32"],
    ),
    "tokens whose int32 sum would wrap": (
        lambda step: step["seq_lens_this_time"].__setitem__([1, 3], INT32_MAX),
        CapacityError,
        ["seq_lens_this_time", f"row 1: {INT32_MAX}", "max_num_tokens = 32"],
    ),
    "padding below the tokens": (
        _keyword(num_padded_tokens=13),
        ValueError,
        ["num_padded_tokens: got 13", "14 tokens"],
    ),
    "negative padding": (
        _keyword(num_padded_tokens=-1),
        ValueError,
        ["num_padded_tokens: got -1"],
    ),
    "padding above the capacity": (
        _keyword(num_padded_tokens=33),
        CapacityError,
        ["num_padded_tokens: got 33", "max_num_tokens = 32"],
    ),
    "wrong token count": (
        _keyword(num_tokens=15),
        ValueError,
        ["num_tokens: got 15", "14"],
    ),
    "wrong prefill count": (
        _keyword(num_prefill_tokens=0),
        ValueError,
        ["num_prefill_tokens: got 0", "10"],
    ),
    "longest row above its bound": (
        _keyword(max_seqlen_k=33),
        ValueError,
        ["max_seqlen_k: got 33", "row 1 has 34 keys"],
    ),
    "rows disagree": (
        _replace("seq_lens_decoder", lambda a: a[:4]),
        ShapeError,
        ["seq_lens_decoder", "(4,)", "(5,)"],
    ),
    "lengths in a column": (
        lambda step: step.update({f: step[f][:, None] for f in FIELDS[:3]}),
        ShapeError,
        ["seq_lens_this_time", "(5, 1)", "[rows]"],
    ),
    "table of fewer rows": (
        _replace("block_tables", lambda a: a[:4]),
        ShapeError,
        ["block_tables", "(4, 3)", "(5, 3)"],
    ),
    "table of other width": (
        _replace("block_tables", lambda a: a[:, :2]),
        ShapeError,
        ["block_tables", "(5, 2)", "(5, 3)"],
    ),
    "flat table": (
        _replace("block_tables", np.ravel),
        ShapeError,
        ["block_tables", "(15,)", "(5, 3)"],
    ),
    "too many rows": (
        lambda step: step.update({f: np.concatenate([step[f], step[f][2:3]]) for f in FIELDS}),
        CapacityError,
        ["6 rows", "max_num_seqs = 5"],
    ),
    "int64 lengths": (
        _replace("seq_lens_encoder", lambda a: a.astype(np.int64)),
        DtypeError,
        ["seq_lens_encoder", "int64", "int32"],
    ),
    "float table": (
        _replace("block_tables", lambda a: a.astype(np.float32)),
        DtypeError,
        ["block_tables", "float32", "int32"],
    ),
    "list": (
        _replace("seq_lens_this_time", lambda a: a.tolist()),
        DtypeError,
        ["seq_lens_this_time", "list", "int32"],
    ),
}


def _builder(device: str = "numpy") -> StepMetadataBuilder:
    return StepMetadataBuilder(ROWS, TOKENS, COLUMNS, BLOCK_SIZE, NUM_BLOCKS, device)


def _fill_all_buffers(builder: StepMetadataBuilder) -> ForwardMeta:
    """A step that uses every row, token and column, and leaves 0 or -1 hardly anywhere."""
    batch = make_batch([(8, 40, 8)] * 3 + [(0, 44, 4)] * 2, BLOCK_SIZE, seed=1)
    meta = builder.build(*batch.inputs())
    assert len(meta.position_ids) == TOKENS
    return meta


def test_the_step_that_the_cases_spoil_is_legal() -> None:
    meta = _builder().build(
        **_legal_step(), num_padded_tokens=32, num_tokens=14, num_prefill_tokens=10, max_seqlen_k=34
    )
    assert meta.num_prefill_tokens == 10
    assert meta.num_decode_tokens == 4


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_step_names_row_value_and_rule_and_writes_nothing(name: str) -> None:
    spoil, error, words = REFUSED[name]
    builder = _builder()
    held = _fill_all_buffers(builder)
    before = arrays_of(held)
    step = _legal_step()
    spoil(step)
    with pytest.raises(ValueError) as caught:
        builder.build(**step)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert builder.num_builds == 1
    for field, array in arrays_of(held).items():
        np.testing.assert_array_equal(array, before[field], err_msg=field)


def test_entries_past_a_rows_length_may_hold_anything() -> None:
    step = _legal_step()
    for row, column, block in ((2, 0, -1), (2, 1, 10**9), (4, 1, -5), (0, 2, NUM_BLOCKS)):
        step["block_tables"][row, column] = block
    meta = _builder().build(**step)
    np.testing.assert_array_equal(meta.block_tables, step["block_tables"])


def test_a_row_without_tokens_may_keep_a_cached_length_of_any_size() -> None:
    step = _legal_step()
    step["seq_lens_decoder"][2] = INT32_MAX
    meta = _builder().build(**step)
    assert meta.cache_seqlens.tolist() == [0, 34, 0, 17, 8]
    assert meta.max_seqlen_k == 34


def test_without_num_blocks_only_missing_blocks_are_refused() -> None:
    builder = StepMetadataBuilder(1, 4, 1, 64, None, "numpy")
    lengths = [np.array([n], np.int32) for n in (0, 63, 1)]
    meta = builder.build(*lengths, np.array([[INT32_MAX]], np.int32))
    # past int32 by far: slots are int64
    assert meta.slot_mapping.tolist() == [INT32_MAX * 64 + 63]
    with pytest.raises(ValueError, match=r"row 0, column 0 is -1.*0 or more"):
        builder.build(*lengths, np.array([[-1]], np.int32))


def test_gathered_keys_past_int32_are_refused() -> None:
    columns, block_size = 2**10, 2**20
    builder = StepMetadataBuilder(3, 8, columns, block_size, None, "numpy")
    tables = np.zeros((3, columns), np.int32)
    lengths = np.array([[1, 2**30 - 2, 1], [1, 2**30 - 2, 1], [0, 5, 1]], np.int32)
    meta = builder.build(*lengths.T, tables)
    assert meta.cu_seqlens_kg.tolist() == [0, 2**30 - 1, 2**31 - 2, 2**31 - 1]
    assert meta.indexer_attn_mask_offsets.tolist() == [0, 2**30 - 1, 2**30 - 1, 2**31 - 2, 0, 0]
    lengths[1, 1] += 1
    with pytest.raises(CapacityError, match=r"seq_lens_decoder.*2147483648 keys.*2147483647"):
        builder.build(*lengths.T, tables)


@pytest.mark.parametrize("device", ["xpu", "xpu:1", "", "numpy:0"])
def test_other_devices_are_refused_with_those_there_are(device: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"got '.*'cpu'.*'numpy'.*installed Paddle"):
        _builder(device)


@pytest.mark.parametrize("device", ["gpu", "gpu:0"])
def test_a_gpu_needs_a_paddle_that_serves_one(device: str) -> None:
    import paddle

    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle serves GPUs")
    with pytest.raises(BackendUnavailable, match=r"'gpu' needs paddlepaddle-gpu"):
        _builder(device)


class _DeviceTensor:
    """A tensor that claims to be in CUDA memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class _CustomDeviceTensor:
    """A tensor on a device that DLPack does not know."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("Unsupported Paddle device type")


@pytest.mark.parametrize("tensor", [_DeviceTensor, _CustomDeviceTensor])
def test_a_tensor_on_a_device_is_refused(tensor: type) -> None:
    step = _legal_step() | {"seq_lens_decoder": tensor()}
    with pytest.raises(BackendUnavailable, match=r"seq_lens_decoder.*host memory.*device='gpu'"):
        _builder().build(**step)


@pytest.mark.parametrize(
    "name", ["num_padded_tokens", "num_tokens", "num_prefill_tokens", "max_seqlen_k"]
)
@pytest.mark.parametrize("value", [40.0, "40"])
def test_counts_that_are_no_integers_are_refused(name: str, value: Any) -> None:
    builder = _builder()
    with pytest.raises(ValueError, match=rf"{name}: got {value!r}, allowed are integers"):
        builder.build(**_legal_step(), **{name: value})
    assert builder.num_builds == 0


@pytest.mark.parametrize(
    "size", ["max_num_seqs", "max_num_tokens", "max_blocks_per_seq", "block_size", "num_blocks"]
)
@pytest.mark.parametrize("value", [0, -3, 2**31, 4.0, "4"])
def test_sizes_are_checked(size: str, value: Any) -> None:
    sizes = {"max_num_seqs": 1, "max_num_tokens": 1, "max_blocks_per_seq": 1, "block_size": 1}
    with pytest.raises(
        ValueError, match=rf"{size}: got {value!r}, allowed are integers in 1\.\.2147483647"
    ):
        StepMetadataBuilder(**{**sizes, size: value}, device="numpy")


def test_a_table_whose_lengths_would_not_fit_int32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_blocks_per_seq.*2147483648 tokens.*int32"):
        StepMetadataBuilder(1, 1, 2**21, 2**10, device="numpy")

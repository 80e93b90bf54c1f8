"""A step that cannot be right is refused before anything of the last step changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import BackendUnavailable, CapacityError, DtypeError, ShapeError
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from fd_dsa.step.checks import INPUTS
from tests.kernel_memory import KernelMemory
from tests.step.helpers import arrays_of, counts_of, device_builder
from tests.strategies import make_batch

INT32_MAX = 2**31 - 1
ROWS, TOKENS, COLUMNS, BLOCK_SIZE, NUM_BLOCKS = 5, 32, 3, 16, 40
FIELDS = INPUTS
LENGTHS = FIELDS[:3]

# prefill chunk, decode, idle, draft tokens, decode: 10 + 1 + 0 + 2 + 1 tokens
LEGAL = make_batch([(10, 20, 10), (0, 33, 1), (0, 0, 0), (0, 15, 2), (0, 7, 1)], BLOCK_SIZE, seed=3)
# uses every row, token and column, and leaves 0 or -1 hardly anywhere
FULL = make_batch([(8, 40, 8)] * 3 + [(0, 44, 4)] * 2, BLOCK_SIZE, seed=1)

Step = dict[str, Any]
Spoil = Callable[[Step], None]


def _set(field: str, index: Any, value: int) -> Spoil:
    """Change some values of an input."""
    return lambda step: step[field].__setitem__(index, value)


def _set_tokens(row: int, value: int) -> Spoil:
    """Change a prefill row's number of new tokens consistently."""
    return lambda step: [step[field].__setitem__(row, value) for field in FIELDS[::2]] and None


def _keyword(**keywords: Any) -> Spoil:
    """Add or change arguments."""
    return lambda step: step.update(keywords)


def _replace(make: Callable[[Any], Any], *fields: str) -> Spoil:
    """Change whole inputs."""
    return lambda step: step.update({field: make(step[field]) for field in fields})


Case = tuple[Spoil, type[Exception], str]
E, D, T, TABLES = FIELDS
# found in the values of arrays on the host
VALUES: dict[str, Case] = {
    "encoder < 0": (_set(E, 3, -2), ValueError, f"{E}: row 3 is -2.*0 or more"),
    "decoder < 0": (_set(D, 4, -7), ValueError, f"{D}: row 4 is -7.*0 or more"),
    "this time < 0": (_set(T, 2, -1), ValueError, f"{T}: row 2 is -1.*0 or more"),
    "smallest int32": (_set(D, 0, -INT32_MAX - 1), ValueError, f"{D}: row 0 is {-INT32_MAX - 1}"),
    "encoder below this time": (
        _set(E, 0, 9),
        ValueError,
        rf"{E}: row 0 is 9 with {T} 10, allowed is 0 \(decode or idle row\)",
    ),
    "encoder of an idle row": (_set(E, 2, 4), ValueError, f"{E}: row 2 is 4 with {T} 0"),
    "table too short": (
        _set(D, 3, 47),
        CapacityError,
        "block_tables: the 47 cached [+] 2 new tokens of row 3 .* 4 blocks of 16.* 3 columns",
    ),
    "length past int32": (
        _set(D, 1, INT32_MAX),
        CapacityError,
        f"block_tables: the {INT32_MAX} cached [+] 1 new tokens of row 1.*3 columns",
    ),
    "needed block is missing": (
        _set(TABLES, (1, 2), -1),
        ValueError,
        "block_tables: row 1, column 2 is -1.*33 cached [+] 1 new.*0..39",
    ),
    "block of the prefix is missing": (
        _set(TABLES, (1, 0), -1),
        ValueError,
        "block_tables: row 1, column 0 is -1.*0..39",
    ),
    "block is past the cache": (
        _set(TABLES, (3, 1), NUM_BLOCKS),
        ValueError,
        "block_tables: row 3, column 1 is 40.*0..39",
    ),
    "block is very negative": (
        _set(TABLES, (4, 0), -INT32_MAX),
        ValueError,
        f"block_tables: row 4, column 0 is {-INT32_MAX}",
    ),
    "too many tokens": (
        _set_tokens(0, 29),
        CapacityError,
        f"{T}: the rows hold 33 tokens .*row 0: 29.*max_num_tokens = 32",
    ),
    "tokens whose int32 sum would wrap": (
        _set(T, [1, 3], INT32_MAX),
        CapacityError,
        f"{T}: .*row 1: {INT32_MAX}.*max_num_tokens = 32",
    ),
    "wrong token count": (_keyword(num_tokens=15), ValueError, "num_tokens: got 15.*14"),
    "wrong prefill count": (
        _keyword(num_prefill_tokens=0),
        ValueError,
        "num_prefill_tokens: got 0.*10",
    ),
    "longest row above its bound": (
        _keyword(max_seqlen_k=33),
        ValueError,
        "max_seqlen_k: got 33.*row 1 has 34 keys",
    ),
    "list": (_replace(np.ndarray.tolist, T), DtypeError, f"{T}: got list.*int32"),
}
# found without a look at values, on the host and on a device
FORMS: dict[str, Case] = {
    "padding below the tokens": (
        _keyword(num_padded_tokens=13),
        ValueError,
        "num_padded_tokens: got 13.*14 tokens",
    ),
    "negative padding": (_keyword(num_padded_tokens=-1), ValueError, "num_padded_tokens: got -1"),
    "padding above the capacity": (
        _keyword(num_padded_tokens=33),
        CapacityError,
        "num_padded_tokens: got 33.*max_num_tokens = 32",
    ),
    "rows disagree": (_replace(lambda a: a[:4], D), ShapeError, rf"{D}: .*\(4,\).*\(5,\)"),
    "lengths in a column": (
        _replace(lambda a: a.reshape([5, 1]), *LENGTHS),
        ShapeError,
        rf"{T}: .*\(5, 1\).*\[rows\]",
    ),
    "table of fewer rows": (
        _replace(lambda a: a[:4], TABLES),
        ShapeError,
        r"block_tables: .*\(4, 3\).*\(5, 3\) = \[rows, max_blocks_per_seq\]",
    ),
    "table of other width": (
        _replace(lambda a: a[:, :2], TABLES),
        ShapeError,
        r"block_tables: .*\(5, 2\).*\(5, 3\)",
    ),
    "flat table": (
        _replace(lambda a: a.reshape([15]), TABLES),
        ShapeError,
        r"block_tables: .*\(15,\).*\(5, 3\)",
    ),
    "no integer": (
        _keyword(num_tokens=14.0),
        ValueError,
        "num_tokens: got 14.0, allowed are integers",
    ),
}
ON_HOST: dict[str, Case] = {
    **VALUES,
    **FORMS,
    "too many rows": (
        _replace(lambda a: np.concatenate([a, a[2:3]]), *FIELDS),
        CapacityError,
        "6 rows.*max_num_seqs = 5",
    ),
    "int64 lengths": (
        _replace(lambda a: a.astype(np.int64), E),
        DtypeError,
        f"{E}: got dtype int64.*int32",
    ),
    "float table": (
        _replace(lambda a: a.astype(np.float32), TABLES),
        DtypeError,
        "block_tables: got dtype float32.*int32",
    ),
}
ON_DEVICE: dict[str, Case] = {
    **FORMS,
    "no token count": (_keyword(num_tokens=None), ValueError, "num_tokens: needed"),
    "no prefill count": (_keyword(num_prefill_tokens=None), ValueError, "num_prefill_tokens: need"),
    "no longest row": (_keyword(max_seqlen_k=None), ValueError, "max_seqlen_k: needed"),
    "more prefill than tokens": (
        _keyword(num_prefill_tokens=15),
        ValueError,
        "num_prefill_tokens: got 15.*0..num_tokens = 14",
    ),
    "negative longest row": (_keyword(max_seqlen_k=-1), ValueError, "max_seqlen_k: got -1"),
    "too many tokens": (
        _keyword(num_tokens=33),
        CapacityError,
        "num_tokens: got 33.*max_num_tokens = 32",
    ),
    "lists": (_replace(lambda _: [0], *FIELDS), DtypeError, f"{E}.*got list.*four tensors"),
    "an array among tensors": (
        _replace(lambda _: LEGAL.seq_lens_encoder, E),
        DtypeError,
        "allowed are four NumPy arrays or four tensors",
    ),
    "lengths of another type": (
        _replace(lambda t: t.long(), E),
        DtypeError,
        f"{E}: got dtype .*int64.*int32",
    ),
    "strided lengths": (
        _replace(lambda t: t.reshape([5, 1]).expand([5, 2]).contiguous()[:, 0], T),
        ShapeError,
        f"{T}: got strides.*contiguous",
    ),
}


def _legal(put: Callable[[np.ndarray], Any] = np.copy) -> Step:
    return dict(zip(FIELDS, map(put, LEGAL.inputs()), strict=True))


def _builder(device: str = "numpy") -> StepMetadataBuilder:
    return StepMetadataBuilder(ROWS, TOKENS, COLUMNS, BLOCK_SIZE, NUM_BLOCKS, device)


def _on_device(m: KernelMemory) -> StepMetadataBuilder:
    sizes = {"max_num_seqs": ROWS, "max_num_tokens": TOKENS, "num_blocks": NUM_BLOCKS}
    return device_builder(m, LEGAL, **sizes)


def _refused(builder: StepMetadataBuilder, step: Step, case: Case, get: Any) -> None:
    """A refused step names the field, row, value and rule, and writes nothing."""
    spoil, error, message = case
    held: ForwardMeta = builder.build(*FULL.inputs())
    before = arrays_of(held, get)
    spoil(step)
    with pytest.raises(ValueError, match=message) as caught:
        builder.build(**step)
    assert type(caught.value) is error
    assert builder.num_builds == 1
    for field, array in arrays_of(held, get).items():
        np.testing.assert_array_equal(array, before[field], err_msg=field)


def test_the_step_that_the_cases_spoil_is_legal() -> None:
    meta = _builder().build(**_legal(), num_padded_tokens=32, **counts_of(LEGAL))
    assert (meta.num_prefill_tokens, meta.num_decode_tokens, meta.max_seqlen_k) == (10, 4, 34)


@pytest.mark.parametrize("name", ON_HOST)
def test_arrays_on_the_host(name: str) -> None:
    _refused(_builder(), _legal(), ON_HOST[name], np.asarray)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_tensors_on_a_device(kernel_memory: KernelMemory, name: str) -> None:
    m = kernel_memory
    _refused(_on_device(m), _legal(m.put) | counts_of(LEGAL), ON_DEVICE[name], m.get)


def test_arrays_for_a_device_are_checked_in_full(kernel_memory: KernelMemory) -> None:
    case = VALUES["needed block is missing"]
    _refused(_on_device(kernel_memory), _legal(), case, kernel_memory.get)


def test_entries_past_a_rows_length_may_hold_anything() -> None:
    step = _legal()
    for row, column, block in ((2, 0, -1), (2, 1, 10**9), (4, 1, -5), (0, 2, NUM_BLOCKS)):
        step[TABLES][row, column] = block
    # and a row without tokens may keep a cached length of any size
    step[D][2] = INT32_MAX
    meta = _builder().build(**step)
    np.testing.assert_array_equal(meta.block_tables, step[TABLES])
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


@pytest.mark.parametrize("device", ["xpu", "xpu:1", "", "numpy:0", "gpu", "gpu:0"])
def test_other_devices_are_refused_with_those_there_are(device: str) -> None:
    import paddle

    if device.startswith("gpu") and paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle serves GPUs")
    allowed = r"got '.*'cpu'.*'numpy'.*installed Paddle.*'gpu' needs paddlepaddle-gpu"
    with pytest.raises(BackendUnavailable, match=allowed):
        _builder(device)


class _DeviceTensor:
    """A tensor that claims to be in CUDA memory, or on a device that DLPack does not know."""

    def __init__(self, place: int | None) -> None:
        self._place = place

    def __dlpack_device__(self) -> tuple[int, int]:
        if self._place is None:
            raise RuntimeError("Unsupported Paddle device type")
        return self._place, 0


@pytest.mark.parametrize("place", [2, None])
def test_a_tensor_on_a_device_is_refused(place: int | None) -> None:
    step = _legal() | {D: _DeviceTensor(place)}
    with pytest.raises(BackendUnavailable, match=r"seq_lens_decoder.*host memory.*device='gpu'"):
        _builder().build(**step)


@pytest.mark.parametrize(
    "name", ["num_padded_tokens", "num_tokens", "num_prefill_tokens", "max_seqlen_k"]
)
@pytest.mark.parametrize("value", [40.0, "40"])
def test_counts_that_are_no_integers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: got {value!r}, allowed are integers"):
        _builder().build(**_legal(), **{name: value})


@pytest.mark.parametrize(
    ("size", "value"),
    [
        *(
            (size, 0)
            for size in ("max_num_tokens", "max_blocks_per_seq", "block_size", "num_blocks")
        ),
        *(("max_num_seqs", value) for value in (0, -3, 2**31, 4.0, "4")),
    ],
)
def test_sizes_are_checked(size: str, value: Any) -> None:
    sizes = {"max_num_seqs": 1, "max_num_tokens": 1, "max_blocks_per_seq": 1, "block_size": 1}
    with pytest.raises(
        ValueError, match=rf"{size}: got {value!r}, allowed are integers in 1\.\.2147483647"
    ):
        StepMetadataBuilder(**{**sizes, size: value}, device="numpy")


def test_a_table_whose_lengths_would_not_fit_int32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_blocks_per_seq.*2147483648 tokens.*int32"):
        StepMetadataBuilder(1, 1, 2**21, 2**10, device="numpy")

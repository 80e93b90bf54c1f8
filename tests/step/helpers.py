"""Parts of all step tests: fields by kind, comparison with the oracle, builders that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.reference.step_metadata import ref_step_metadata
from tests.strategies import StepBatch

ROW_FIELDS = (
    "seq_lens_encoder",
    "seq_lens_decoder",
    "seq_lens_this_time",
    "cu_seqlens_q",
    "block_tables",
)
TOKEN_FIELDS = ("batch_id_per_token", "position_ids", "position_ids_int32", "slot_mapping")
PREFILL_FIELDS = ("indexer_attn_mask_offsets", "cu_seqlens_kg")
COUNT_FIELDS = ("num_prefill_tokens", "num_decode_tokens", "max_seqlen_k")
Get = Callable[[Any], np.ndarray]
ARRAY_FIELDS = ROW_FIELDS + TOKEN_FIELDS + PREFILL_FIELDS


def builder_for(batch: StepBatch, device: str = "numpy", **sizes: Any) -> StepMetadataBuilder:
    """A builder whose capacity is larger than the step, unless `sizes` says otherwise."""
    padded = batch.num_padded_tokens or 0
    return StepMetadataBuilder(
        **{
            "max_num_seqs": batch.num_rows + 2,
            "max_num_tokens": max(batch.num_tokens, padded) + 5,
            "max_blocks_per_seq": batch.block_tables.shape[1],
            "block_size": batch.block_size,
            "num_blocks": batch.num_blocks,
            "device": device,
            "int32_position_ids": True,
            **sizes,
        }
    )


def device_builder(memory: KernelMemory, batch: StepBatch, **sizes: Any) -> StepMetadataBuilder:
    """A builder over poisoned buffers in a kernel memory; capacity as in `builder_for`."""
    return builder_for(batch, **{"device": "gpu", "allocate": memory.poisoned, **sizes})


def as_numpy(array: Any) -> np.ndarray:
    """An array of either device as NumPy, over the same memory."""
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def arrays_of(meta: ForwardMeta, get: Get = as_numpy) -> dict[str, np.ndarray | None]:
    """Copies of all arrays of a step by name; `get` reads an array."""
    arrays = {name: getattr(meta, name) for name in ARRAY_FIELDS}
    return {name: None if a is None else get(a).copy() for name, a in arrays.items()}


def assert_matches_oracle(meta: ForwardMeta, batch: StepBatch, get: Get = as_numpy) -> None:
    """Every field equals the oracle's, in dtype, shape and value; int32 positions may be None."""
    assert_fields(meta, oracle_of(batch), get)


def oracle_of(batch: StepBatch) -> dict[str, Any]:
    """The fields of a step by the naive loop."""
    return ref_step_metadata(*batch.inputs(), batch.block_size, batch.num_padded_tokens)


def assert_fields(meta: ForwardMeta, wanted: dict[str, Any], get: Get = as_numpy) -> None:
    """As `assert_matches_oracle`, for several builds of one step."""
    assert set(wanted) == set(ForwardMeta.__slots__)
    for name, array in arrays_of(meta, get).items():
        if name == "position_ids_int32" and array is None:
            continue
        if wanted[name] is None:
            assert array is None, name
            continue
        assert array is not None, name
        assert array.dtype == wanted[name].dtype, name
        assert array.shape == wanted[name].shape, name
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    for name in COUNT_FIELDS:
        assert type(getattr(meta, name)) is int, name
        assert getattr(meta, name) == wanted[name], name


def counts_of(batch: StepBatch) -> dict[str, int]:
    """Return the scheduler's counts of a step, as the keywords of `build`."""
    lengths = (batch.seq_lens_decoder + batch.seq_lens_this_time) * (batch.seq_lens_this_time > 0)
    return {
        "num_tokens": batch.num_tokens,
        "num_prefill_tokens": int(batch.seq_lens_encoder.sum()),
        "max_seqlen_k": int(lengths.max(initial=0)),
    }


@dataclass(frozen=True)
class Place:
    """Place where steps are built.

    Attributes:
        name: "numpy", "cpu", or that of a kernel memory.
        memory: the kernel memory; None on the host.
    """

    name: str
    memory: KernelMemory | None

    @property
    def get(self) -> Get:
        """Reads an array of the place."""
        return as_numpy if self.memory is None else self.memory.get

    def builder(self, batch: StepBatch, **sizes: Any) -> StepMetadataBuilder:
        """See `builder_for`; on a device over poisoned buffers."""
        if self.memory is None:
            return builder_for(batch, self.name, **sizes)
        return device_builder(self.memory, batch, **sizes)

    def put(self, batch: StepBatch) -> list[Any]:
        """The inputs of a step as tensors of the place."""
        if self.memory is not None:
            return [self.memory.put(array) for array in batch.inputs()]
        if self.name == "numpy":
            return list(batch.inputs())
        import paddle

        return [paddle.to_tensor(array) for array in batch.inputs()]

    def build(self, builder: StepMetadataBuilder, batch: StepBatch, on_host: bool) -> ForwardMeta:
        """The step, from NumPy arrays or from tensors of the place."""
        if on_host:
            return builder.build(*batch.inputs(), batch.num_padded_tokens)
        return builder.build(*self.put(batch), batch.num_padded_tokens, **counts_of(batch))

    def both(
        self, batch: StepBatch, ways: Iterable[bool] = (False, True), **sizes: Any
    ) -> Iterator[tuple[StepMetadataBuilder, ForwardMeta]]:
        """A builder and its step, from tensors and from NumPy arrays (True), or one of the two."""
        builder = self.builder(batch, **sizes)
        for on_host in ways:
            yield builder, self.build(builder, batch, on_host)

    def check(self, batch: StepBatch, ways: Iterable[bool] = (False, True), **sizes: Any) -> None:
        """A step equals the oracle; see `both`."""
        wanted = oracle_of(batch)
        for _, meta in self.both(batch, ways, **sizes):
            assert_fields(meta, wanted, self.get)

    def address(self, array: Any) -> int:
        """Return the address of an array of the place."""
        if self.memory is None:
            return int(as_numpy(array).__array_interface__["data"][0])
        return int(array.data_ptr())

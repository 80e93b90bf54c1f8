"""Top-k by our kernels and by other projects': label -> a function of scores that fills `out`.

Peers are exact but those whose label begins with "~": they may drop winners where many scores
share a coarse bin. Of the exact ones FlashInfer's "low" has our rule for equal scores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _peers
from fd_dsa import custom_ops
from fd_dsa.ops.topk.custom_op import SlotSelector, TopkRows
from fd_dsa.ops.topk.triton_kernel import select_slots

Side = Callable[[torch.Tensor], Any]

OURS, SLOTS, TRITON = "custom op", "slots", "Triton, slots"
BLOCK = 64
_WORKSPACE = 1 << 20
# FlashInfer's cluster kernel uses half the shared memory
_CLUSTER_SHARED = 227 * 1024 // 2


def stream() -> int:
    """Return the current stream."""
    return torch.cuda.current_stream().cuda_stream


def checked(code: int) -> None:
    """Raise RuntimeError for an error of CUDA."""
    if code:
        raise RuntimeError(f"CUDA error {code}")


class Sides:
    """All kernels for rows of one shape, over the same lengths and output.

    Args:
        rows, width, k: the shape of the scores, and how many are chosen.
        peers: folder of other projects' kernels.

    Attributes:
        out: int32 [rows, k]; positions, or slots of the sides that are called so.
    """

    def __init__(self, rows: int, width: int, k: int, peers: Path | None) -> None:
        self.rows, self.width, self.k = rows, width, k
        self.lengths = torch.full((rows,), width, device="cuda", dtype=torch.int32)
        self.zeros = torch.zeros_like(self.lengths)
        self.out = torch.empty(rows, k, device="cuda", dtype=torch.int32)
        self._peers = peers

    def ours(self) -> dict[str, Side]:
        """Return the kernel of custom_ops/ with positions and with slots, and Triton's."""
        kernels = custom_ops.build().kernels
        arguments = TopkRows(
            lengths=self.lengths.data_ptr(),
            out=self.out.data_ptr(),
            num_rows=self.rows,
            width=self.width,
            k=self.k,
        )

        def positions(scores: torch.Tensor) -> None:
            arguments.logits, arguments.row_stride = scores.data_ptr(), scores.stride(0)
            address = ctypes.c_void_p(stream())
            checked(kernels.fd_dsa_topk_cuda(ctypes.byref(arguments), address))

        selector = SlotSelector(kernels)
        return {OURS: positions, SLOTS: self._slots(selector), TRITON: self._slots(select_slots)}

    def _slots(self, select: Callable[..., None]) -> Side:
        """Return a `select_slots` on pages in order."""
        last = torch.full((self.rows,), self.width - 1, device="cuda", dtype=torch.int64)
        columns = -(-self.width // BLOCK)
        table = torch.arange(columns, device="cuda", dtype=torch.int32)[None]
        tokens = last, self.zeros, table
        sizes = {"block_size": BLOCK, "num_blocks": columns}
        return lambda scores: select(scores, *tokens, self.out, **sizes)

    def exact(self) -> dict[str, Side]:
        """Return peers that never drop a winner, FlashInfer's with our rule first."""

        def by_torch(scores: torch.Tensor) -> None:
            self.out.copy_(torch.topk(scores, self.k, dim=1, sorted=False)[1])

        return {**self._flashinfer(), **self._vllm_rows(), "torch": by_torch}

    def inexact(self) -> dict[str, Side]:
        """Return the peers that may drop a winner."""
        ops = _peers.vllm_ops(self._peers)
        if ops is None:
            return {}
        space = torch.zeros(_WORKSPACE, device="cuda", dtype=torch.uint8)
        rest = self.lengths, self.out, space, self.k, self.width
        sides: dict[str, Side] = {"~vLLM pers.": lambda scores: ops.persistent_topk(scores, *rest)}
        if self.rows <= 32:
            sides["~vLLM coop."] = lambda scores: ops.cooperative_topk(scores, *rest)
        return sides

    def _flashinfer(self) -> dict[str, Side]:
        """Return FlashInfer's ragged form in three modes, and its kernel on clusters."""
        library = _peers.flashinfer_topk(self._peers)
        if library is None:
            return {}
        states = torch.zeros(_WORKSPACE, device="cuda", dtype=torch.uint8)
        out, zeros, lengths = (t.data_ptr() for t in (self.out, self.zeros, self.lengths))
        sizes = self.rows, self.k, self.width

        def mode(*flags: int) -> Side:
            def positions(scores: torch.Tensor) -> None:
                tensors = scores.data_ptr(), out, zeros, lengths, states.data_ptr()
                checked(library.fi_topk(*tensors, *sizes, *flags, stream()))

            return positions

        # deterministic, ties to the lowest position, good in a graph
        sides = {"FlashInfer low": mode(1, 1, 1), "FlashInfer det": mode(1, 0, 0)}
        sides["FlashInfer"] = mode(0, 0, 0)
        return sides | {"FlashInfer cl.": self._clusters(library)}

    def _clusters(self, library: Any) -> Side:
        """Return FlashInfer's kernel on clusters, called like its Python front end."""
        by_rows = ((32, 8), (127, 4), (255, 2))
        clusters = next((c for most, c in by_rows if self.rows <= most), 1)
        if self.width < 8192:
            clusters = 1
        cached = (_CLUSTER_SHARED - (self.k + 5 + 3 * 256 + 8) * 4 - 1024) // 16
        stride = 4 * (self.width // clusters) * clusters
        overflow = torch.empty(self.rows * stride, device="cuda", dtype=torch.int32)
        out, zeros, lengths = (t.data_ptr() for t in (self.out, self.zeros, self.lengths))
        sizes = self.rows, self.k, self.width, clusters, cached

        def positions(scores: torch.Tensor) -> None:
            tensors = scores.data_ptr(), out, zeros, lengths, overflow.data_ptr()
            checked(library.fi_topk_clusters(*tensors, *sizes, stream()))

        return positions

    def _vllm_rows(self) -> dict[str, Side]:
        """Return vLLM's kernels with one block per row."""
        ops = _peers.vllm_ops(self._peers)
        if ops is None:
            return {}

        def of(op: Callable[..., Any], *before: Any) -> Side:
            after = self.lengths, self.out, self.rows
            return lambda scores: op(scores, *before, *after, *scores.stride(), self.k)

        return {
            "vLLM pre.": of(ops.top_k_per_row_prefill, self.zeros),
            "vLLM dec.": of(ops.top_k_per_row_decode, 1),
        }

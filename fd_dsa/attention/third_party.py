"""FlashMLA and DeepGEMM behind a DeviceAttention: whether they serve, and what happens if not.

A package serves if it is installed, takes the shapes, and agrees with our kernel on a small case
in the first step that is not captured into a graph. Whatever it raises, then or later, ends that:
our kernel serves for good, with one warning. Nothing of it is imported before that step.
"""

from __future__ import annotations

import logging
from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device_logits import DeepGemmScores, deep_gemm_bytes
from fd_dsa.attention.probes import Probe
from fd_dsa.ops import _third_party
from fd_dsa.ops._provider import device_kind
from fd_dsa.ops.indexer_logits import deep_gemm
from fd_dsa.ops.sparse_mla import flash_mla
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import transfers_for

logger = logging.getLogger(__name__)

_SCORES, _ATTENTION = "indexer_logits", "sparse_mla"
_MODULES = {_SCORES: deep_gemm, _ATTENTION: flash_mla}


class ThirdPartyKernels:
    """What serves a DeviceAttention in the place of our kernels; at first, nothing.

    Args:
        config: sizes.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        queries, weights: see DeepGemmScores.
        logits_bytes: most memory for scores.

    Attributes:
        scores, attention: the packages that serve, or None.
    """

    def __init__(
        self,
        config: DSABackendConfig,
        allocate: Allocate,
        queries: Any,
        weights: Any,
        logits_bytes: int,
    ) -> None:
        self._config, self._allocate = config, allocate
        self._queries, self._weights, self._logits_bytes = queries, weights, logits_bytes
        self._kind, self._transfers = device_kind(queries), transfers_for(queries)
        self.scores: DeepGemmScores | None = None
        self.attention: flash_mla.FlashMla | None = None
        # scores that a captured graph reads the rows of, whoever serves now
        self._captured: DeepGemmScores | None = None
        self._prepared: ForwardMeta | None = None
        self._pending = []
        for operator, module in _MODULES.items():
            reason = _reason_against(module, config)
            if reason is None:
                self._pending.append(operator)
            else:
                _third_party.settle(operator, self._kind, module.PACKAGE, reason)

    def is_capturing(self) -> bool:
        """Whether the current stream is captured into a graph."""
        return self._transfers.is_capturing()

    def begin_step(self, step: ForwardMeta) -> None:
        """Try what has not been tried, and make what DeepGEMM needs of the step."""
        if self._pending and not self.is_capturing():
            self.try_packages()
        self._prepared = None
        if self._captured is not None:
            # a graph refers to these rows: there is nothing to fall back to
            self._captured.prepare(step)
            self._prepared = step
        elif self.scores is not None and step.max_seqlen_k > self._config.index_topk:
            try:
                self.scores.prepare(step)
                self._prepared = step
            except Exception as error:
                self.drop(_SCORES, error)

    def try_packages(self) -> None:
        """Import the packages that may serve and compare them with our kernels; once each."""
        pending, self._pending = self._pending, []
        for operator in pending:
            self._try(operator)

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any, slots: Any) -> bool:
        """Fill `slots` by DeepGEMM; False if it does not serve this step."""
        scores = self.scores
        if scores is None or self._prepared is not step:
            return False
        if self.is_capturing():
            if step.position_ids.shape[0] > scores.max_captured:
                return False
            self._captured = scores
        try:
            scores.select(step, q, weights, cache, slots)
        except Exception as error:
            self.drop(_SCORES, error)
            return False
        return True

    def attend(self, q: Any, cache: Any, slots: Any, out: Any) -> Any:
        """Attention by FlashMLA; None if it does not serve."""
        if self.attention is None:
            return None
        try:
            return self.attention.attend(q, cache, slots, out)
        except Exception as error:
            self.drop(_ATTENTION, error)
            return None

    def drop(self, operator: str, error: Exception) -> None:
        """Go on without a package that raised."""
        if operator == _SCORES:
            self.scores = None
        else:
            self.attention = None
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        package = _MODULES[operator].PACKAGE
        _third_party.settle(operator, self._kind, package, reason, failed=True)

    def _try(self, operator: str) -> None:
        """Import a package, compare it with our kernel, and let it serve if they agree."""
        package = _MODULES[operator].PACKAGE
        try:
            module = _third_party.load(package, self._queries)
            probe = Probe(self._config, self._allocate, self._transfers)
            start = self._start_scores if operator == _SCORES else self._start_attention
            reason = start(module, probe)
        except Exception as error:
            self.drop(operator, error)
            return
        _third_party.settle(operator, self._kind, package, reason, serves=True)

    def _start_attention(self, module: Any, probe: Probe) -> str:
        """FlashMLA with its buffers, if the probe succeeds; why it serves."""
        mla = flash_mla.FlashMla(module, self._config, self._allocate, self.is_capturing)
        reason = _agreement(probe.attention(mla))
        self.attention, heads = mla, self._config.num_heads
        return reason if mla.heads == heads else f"{heads} heads padded to {mla.heads}, {reason}"

    def _start_scores(self, module: Any, probe: Probe) -> str:
        """DeepGEMM with its buffers, if the probe succeeds; why it serves."""
        logger.info(
            "deep_gemm: compiling what is not in its cache, seconds for each of its kernels"
        )
        gemm = deep_gemm.DeepGemm(module)
        deviation = probe.scores(gemm)
        scores = DeepGemmScores(
            gemm, self._config, self._allocate, self._queries, self._weights, self._logits_bytes
        )
        scores.compile(self._transfers)
        self.scores = scores
        return _agreement(deviation)


def third_party_bytes(config: DSABackendConfig, logits_bytes: int) -> int:
    """Bytes that the packages may take which could serve a DeviceAttention of this configuration.

    Scores and partial results that they allocate in a layer are counted once.
    """
    total = 0
    if _reason_against(deep_gemm, config) is None:
        total += deep_gemm_bytes(config, logits_bytes)
    if _reason_against(flash_mla, config) is None:
        total += flash_mla.workspace_bytes(config)
    return total


def _agreement(deviation: float) -> str:
    """What a probe found, in words."""
    return f"agrees with our kernel to {deviation:.1e}"


def _reason_against(module: Any, config: DSABackendConfig) -> str | None:
    """Why a package need not be tried; None if it may serve."""
    if not _third_party.is_installed(module.PACKAGE):
        return "not installed"
    return module.reason_against(config)

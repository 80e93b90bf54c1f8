"""Sampling on a device: from logits to token ids with nothing read back."""

from __future__ import annotations

from fd_dsa.ops.sampling.parameters import NO_TOKEN, NOT_FINITE, REJECTED, SlotParameters
from fd_dsa.ops.sampling.sampler import DeviceSampler

__all__ = ["NOT_FINITE", "NO_TOKEN", "REJECTED", "DeviceSampler", "SlotParameters"]

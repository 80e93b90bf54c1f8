"""Plans of an engine on Hopper GPUs that this machine lacks."""

from __future__ import annotations

import pytest

from fd_dsa.triton_runtime.driver import GpuTraits


def pretend_hopper(patch: pytest.MonkeyPatch, gib: int) -> None:
    """Pretend that devices are Hopper GPUs of some GiB that hold experts in four bits."""
    resolve = "fd_dsa.device.resolve"
    patch.setattr(f"{resolve}.resolve_device", lambda name: "gpu:0")
    patch.setattr(f"{resolve}.device_of_rank", lambda device, rank, size: device)
    patch.setattr(f"{resolve}.keep_float32", lambda device: None)
    patch.setattr(f"{resolve}.traits_of", lambda device: GpuTraits(90, 132, 227 << 10))
    patch.setattr(f"{resolve}.free_device_bytes", lambda device, share: int(share * (gib << 30)))
    patch.setattr("fd_dsa.device.allocation.paddle_allocator", lambda device: None)
    patch.setattr("fd_dsa.models.four_bit_check.difference", lambda *_: "")

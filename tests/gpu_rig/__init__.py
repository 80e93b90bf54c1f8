"""Paddle tensors in device memory with Paddle's CPU wheel, for tests.

A CustomDevice plug-in of our own (`plugin/`) gives Paddle a device named "hopper" in one of four
forms: CUDA memory ("real"), host memory ("fake"), host memory where host access to a device
pointer faults ("guard"), or address space over a driver that does nothing ("null", see
`tests.null_driver`). Paddle reads its plug-ins when it is imported, so a process has one form
or none: `pytest -m gpu_rig` takes the real one, `FD_DSA_RIG=guard pytest tests/gpu_rig` the one
that is named, and the tests of `make test` start such sessions in processes of their own.
"""

from tests.gpu_rig.build import BuildError
from tests.gpu_rig.rig import Rig, RigError, current, load

__all__ = ["BuildError", "Rig", "RigError", "current", "load"]

"""What kernels call that are launched before the kernel ahead of them has ended.

Source: PTX ISA, `griddepcontrol`; CUDA C++ programming guide, programmatic dependent launch.
"""

from __future__ import annotations

import inspect
from typing import Any

from fd_dsa.triton_runtime.mode import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip
from triton.language.extra import cuda  # isort: skip


@triton.jit
def _nothing():
    """What stands for an instruction where kernels are interpreted, or Triton has it not."""


def _instruction(name: str) -> Any:
    """A device function: an instruction in kernels that are launched early, in others nothing."""
    instruction = getattr(cuda, name, None)
    if INTERPRETING or instruction is None:
        return _nothing
    if "_semantic" not in inspect.signature(instruction).parameters:
        # Triton 3.4 calls device functions with other arguments
        return _nothing

    @tl.core.extern
    def emit(_semantic: Any = None) -> None:
        if _semantic.builder.options.launch_pdl:
            instruction(_semantic=_semantic)

    return emit


wait_for_inputs = _instruction("gdc_wait")
"""Wait until all kernels before have ended, and what they wrote can be read.

Every program of a kernel that `waits` calls it. Ahead of it only weights are read, and nothing is
written: kernels before may still read what this one overwrites.
"""
start_next = _instruction("gdc_launch_dependents")
"""Let the next kernel start, if it waits too, once every program has come here or has ended.

It takes what this kernel leaves free of the processors. So it is called after the wait, and by a
program that has much to read after that too.
"""

"""Device functions of programmatic dependent launch (PDL).

A kernel with PDL is launched before the previous kernel has ended.

Source: PTX ISA, `griddepcontrol`; CUDA C++ programming guide, programmatic dependent launch.
"""

from __future__ import annotations

import inspect
from typing import Any

from fd_dsa.triton_runtime.interpreter import no_instruction
from fd_dsa.triton_runtime.mode import INTERPRETING

import triton.language as tl  # isort: skip
from triton.language.extra import cuda  # isort: skip


def _instruction(name: str) -> Any:
    """Make a device function for an instruction, which only kernels with PDL contain."""
    instruction = getattr(cuda, name, None)
    if INTERPRETING or instruction is None:
        return no_instruction
    if "_semantic" not in inspect.signature(instruction).parameters:
        # Triton 3.4 calls device functions with other arguments
        return no_instruction

    @tl.core.extern
    def emit(_semantic: Any = None) -> None:
        if _semantic.builder.options.launch_pdl:
            instruction(_semantic=_semantic)

    return emit


wait_for_inputs = _instruction("gdc_wait")
"""Wait until all earlier kernels have ended and their writes can be read.

Every program of a kernel that `waits` calls it. Before the call a program may read weights, but
must not write, because an earlier kernel may still read that memory.
"""
start_next = _instruction("gdc_launch_dependents")
"""Let the next kernel start, if it `waits` too, when every program has called this or has ended.

The next kernel occupies the space that this kernel leaves free on the processors. So a program
calls it after the wait, and a program that reads much calls it after its last reads.
"""

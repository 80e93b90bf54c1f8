"""Loads the test plug-in, and the operators built for it, when Python starts.

So that any command, and every process that it starts, runs on Paddle tensors in device memory:

    FD_DSA_RIG=real PYTHONPATH=tests/gpu_rig/startup:. python -m fd_dsa.accuracy selection \\
        --providers hopper:0 --out selection
"""

from __future__ import annotations

import os
import sys

FORM = os.environ.get("FD_DSA_RIG")
if FORM:
    from tests.gpu_rig import custom_ops, load

    load(FORM)
    # the guard form has no memory that its host kernels could work in
    if FORM != "guard":
        sys.path.append(str(custom_ops.build(FORM).parent))

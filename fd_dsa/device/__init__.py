"""Device memory and streams: allocation, copies, staged inputs.

Each module is imported by its name. `allocation`, `host_tensor` and `resolve` need no Triton. The
others talk to the CUDA driver through `fd_dsa.triton_runtime`.
"""

"""Device memory and streams: places, allocation, copies, staged inputs.

Each module is imported by its name. `allocation`, `host_tensor`, `places` and `resolve` need no
Triton; the others talk to the CUDA driver through `fd_dsa.triton_runtime`.
"""

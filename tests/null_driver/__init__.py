"""Engines over a CUDA driver that does nothing, so that a step takes only the time of the host.

The form "null" of the test plug-in (`tests.gpu_rig`) gives Paddle a device of address space, and
`libraries/` replaces the CUDA driver, cuBLASLt, NCCL and the kernels of custom_ops/. The launcher
is the one of a GPU. It never compiles a kernel. Weights of 61 layers take no memory, and a process
may be rank 0 of several ranks that are not there.

All results are wrong. Only launches and the time of the host mean something: `benchmarks.host_time`
measures them.
"""

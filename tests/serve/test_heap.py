"""Settings of glibc's allocator: the heap that threads share, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    getattr(ctypes.CDLL(None), "malloc_info", None) is None, reason="the allocator is not glibc's"
)

# threads that take memory at the same time, then glibc's own account of its heaps
PROGRAM = """
import ctypes, threading
from fd_dsa.serve.heap import share_heap
print(share_heap())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(6)
def take():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


# the settings are ours; an import of Paddle takes seconds, and what it frees blurs the figures
WITHOUT_PADDLE = "import sys\nsys.modules['paddle'] = None\n"


def run(program: str, variables: dict[str, str]) -> str:
    """Return the output of a program whose heaps only `variables` configure."""
    names = {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}
    environment = {k: v for k, v in os.environ.items() if k not in names} | variables
    command = [sys.executable, "-u", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def heaps_of(variables: dict[str, str]) -> tuple[str, int]:
    """Return the result of `share_heap` in a new process, and its number of heaps afterwards."""
    output = run(PROGRAM, variables)
    return output.split("\n")[0], output.count("<heap ")


def test_threads_share_a_heap() -> None:
    assert heaps_of({}) == ("True", 1)


@pytest.mark.parametrize(
    "variables", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}]
)
def test_the_environment_decides(variables: dict[str, str]) -> None:
    assert heaps_of(variables) == ("False", 4)


# pages between two blocks that stay, which glibc keeps by itself
HOLE = """
import ctypes, time
from pathlib import Path
from fd_dsa.serve import heap
heap.TRIM_EVERY_S = 0.05
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
assert libc.mallopt(-3, 1 << 25)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
blocks = [ctypes.c_void_p(libc.malloc(1 << 20)) for _ in range(65)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
full = resident()
for block in blocks[:-1]:
    libc.free(block)
assert full - resident() < 8 << 20
heap.keep_heap_trimmed()
end = time.monotonic() + 30
while full - resident() < 56 << 20 and time.monotonic() < end:
    time.sleep(0.05)
print(full - resident() >> 20)
"""


def test_holes_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLE], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 56


# memory that threads have taken and freed at the same time, with the settings of a server
THREADS = """
import ctypes, threading
from pathlib import Path
from fd_dsa.environment import prepare_cpu_runtime
from fd_dsa.serve.heap import share_heap, trim_heap
share_heap()
prepare_cpu_runtime()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
together = threading.Barrier(4)
def take():
    blocks = [ctypes.c_void_p(libc.malloc(100_000)) for _ in range(400)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    together.wait()
    for block in blocks:
        libc.free(block)
before = resident()
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
trim_heap()
print(resident() - before >> 20)
"""


def test_memory_of_threads_is_given_back() -> None:
    assert int(run(WITHOUT_PADDLE + THREADS, {})) < 20
    # a heap of one thread keeps 40 MB; two or three threads may share the first one
    assert int(run(WITHOUT_PADDLE + THREADS, {"MALLOC_ARENA_MAX": "4"})) > 30


# page faults of arrays of 10 MiB together, taken and freed twice, when heaps have grown
ARRAYS = """
import resource
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        arrays = [np.ones(655_360, np.float32) for _ in range(4)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.parametrize(
    ("variables", "keeps"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1"}, False)]
)
def test_memory_of_a_step_is_kept_for_the_next(variables: dict[str, str], keeps: bool) -> None:
    command = [sys.executable, "-c", WITHOUT_PADDLE + ARRAYS]
    environment = os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (int(done.stdout) < 500) == keeps


def test_a_frozen_object_is_in_no_collection() -> None:
    program = """
import gc
from fd_dsa.serve.heap import freeze_objects
kept = [[] for _ in range(100_000)]
freeze_objects()
print(gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 1000)
"""
    assert run(program, {}) == "True True\n"

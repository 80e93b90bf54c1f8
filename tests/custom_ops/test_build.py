"""Builds: by pip, with CUDA kernels, and those that fail, which say what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from custom_ops import build_library, setup
from fd_dsa import custom_ops
from tests.custom_ops.building import (
    ROOT,
    build_package,
    compiler,
    copy_sources,
    pip_install,
    run_setup,
)

pytestmark = pytest.mark.slow
CURE = r"; build it again: .*-m pip install --no-build-isolation \S*custom_ops$"

SCRIPT = """
import sys
from fd_dsa import custom_ops
print(custom_ops.build().state, custom_ops.build().reason)
import paddle, fd_dsa_ops
lengths = [paddle.to_tensor(x, dtype="int32") for x in ([3, 0], [2, 4], [3, 1])]
positions = paddle.zeros([4], "int32")
fd_dsa_ops.get_position_ids_and_mask_encoder_batch(*lengths, position_ids=positions)
print(positions.tolist())
"""


def run_python(folder: Path, script: str, **variables: str) -> list[str]:
    """Lines that a script prints in a process of its own, with a folder on its path."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_pip_installs_a_package_that_serves() -> None:
    folder = build_package()
    state, positions = run_python(folder, SCRIPT)
    assert state.startswith("built for Paddle ") and state.endswith(" without CUDA kernels")
    assert positions == "[2, 3, 4, 4]"
    names = {path.name for path in (folder / "fd_dsa_ops").iterdir()}
    assert names - {"__pycache__"} == {"__init__.py", "build.json", "libfd_dsa_ops.so"}


@pytest.mark.network
def test_pip_finds_paddle_from_a_build_of_its_own(tmp_path: Path) -> None:
    pip_install(copy_sources(tmp_path / "sources"), tmp_path / "made")
    assert run_python(tmp_path / "made", SCRIPT)[1] == "[2, 3, 4, 4]"


def test_a_source_that_does_not_compile_is_named(tmp_path: Path) -> None:
    compiler()
    pytest.importorskip("paddle")
    sources = copy_sources(tmp_path / "sources")
    (sources / "position_ids.cc").write_text("this is no C++\n")
    done = run_setup(sources, "build", "--build-lib", str(tmp_path / "made"))
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "position_ids.cc:1:1: error:" in said
    assert "fd_dsa_ops: not built; the compiler's output is above" in said
    assert not (tmp_path / "made" / "fd_dsa_ops" / "build.json").exists()


def test_without_paddle_the_build_says_what_to_install(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    (tmp_path / "paddle.py").write_text("raise ImportError('no Paddle on this machine')\n")
    done = run_setup(sources, "build", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "Paddle cannot be imported here (no Paddle on this machine)" in done.stderr
    assert f" -m pip install --no-build-isolation {sources}" in done.stderr


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_120\n", ["80", "90", "100"]),
        ("compute_70\ncompute_80\ncompute_90\n", ["80", "90"]),
    ],
)
def test_code_is_made_for_those_that_the_compiler_knows(
    tmp_path: Path, listed: str, archs: list[str]
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '{listed}'\n".replace("\n'", "'"))
    nvcc.chmod(0o755)
    assert list(build_library.known_archs(str(nvcc))) == archs
    flags = build_library.gencode(archs)
    assert flags[0] == "-gencode=arch=compute_80,code=sm_80"
    # Hopper's own instructions
    assert flags[1] == "-gencode=arch=compute_90a,code=sm_90a"
    # GPUs to come get what their driver can compile
    assert flags[-1] == f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"


def test_no_second_standard_library_is_linked_in(tmp_path: Path) -> None:
    found = subprocess.run(
        [compiler(), "-print-file-name=libstdc++.a"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("this compiler has no libstdc++ as an archive")
    # a compiler that has nothing else
    (tmp_path / "libstdc++.a").symlink_to(found)
    source = tmp_path / "says.cc"
    source.write_text(
        "#include <sstream>\n"
        'extern "C" int says(int n) { std::ostringstream s; s << n; return s.str().size(); }\n'
    )

    def defined(*flags: str) -> str:
        made = str(tmp_path / "says.so")
        command = [compiler(), "-shared", "-fPIC", str(source), f"-L{tmp_path}", *flags]
        subprocess.run([*command, "-o", made], check=True)
        return subprocess.run(["nm", "-D", "--defined-only", made], capture_output=True).stdout

    its_own = b"_ZNSt6locale"
    assert its_own in defined()
    assert its_own not in defined(*setup.LINK_FLAGS)


def toolkit() -> str:
    """Return the folder of the CUDA toolkit, or skip the test without one."""
    nvcc = build_library.find_nvcc()
    home = Path(nvcc or "", "..", "..").resolve()
    if not (home / "include" / "cuda_runtime.h").is_file():
        home = Path(build_library.CUDA_FOLDER)
    if nvcc is None or not (home / "lib64" / "libcudart.so").exists():
        pytest.skip("THE CUDA KERNELS CANNOT BE COMPILED HERE: no CUDA toolkit")
    return str(home)


@pytest.mark.parametrize("source", sorted(p.name for p in build_library.SOURCES.glob("*.cu")))
def test_kernels_compile_for_every_gpu_without_a_warning(tmp_path: Path, source: str) -> None:
    """ptxas also warns (C7519) where accumulators are used before a wgmma fence."""
    toolkit()
    archs = "80", "89", "90", "100", "120"
    nvcc = str(build_library.find_nvcc())
    # half of the time of -O3, and the same warnings
    options = ["-O1" if flag == "-O3" else flag for flag in build_library.NVCC_FLAGS]
    flags = [*build_library.gencode(archs)[:-1], *options, "-c"]
    done = subprocess.run(
        [nvcc, *flags, source, "-o", str(tmp_path / "made.o")],
        cwd=build_library.SOURCES,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


WITH_CUDA = """
import runpy, sys
import paddle
paddle.is_compiled_with_cuda, paddle.version.cuda = lambda: True, lambda: "13.0"
sys.argv = ["setup.py", "build", "--build-lib", "made"]
runpy.run_path("setup.py", run_name="__main__")
"""


def small_sources(folder: Path) -> Path:
    """The sources without the kernels that take the compiler longest."""
    sources = copy_sources(folder)
    for pattern in ("topk*", "sparse_mla_*", "v4_attend*", "*_fp4*"):
        for path in sources.rglob(pattern):
            path.unlink()
    return sources


def build_with_cuda(tmp_path: Path, home: str) -> tuple[str, dict[str, Any]]:
    """Return the output and the record of a build for a Paddle that claims to have CUDA.

    The flags of such a build are tested; a Paddle with CUDA would also have to be there to run it.
    """
    compiler()
    pytest.importorskip("paddle")
    sources = small_sources(tmp_path / "sources")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITH_CUDA],
        cwd=sources,
        env=os.environ | {"CUDA_HOME": home},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((sources / "made" / "fd_dsa_ops" / "build.json").read_text())


def test_beside_a_paddle_with_cuda_the_package_has_kernels(tmp_path: Path) -> None:
    output, record = build_with_cuda(tmp_path, toolkit())
    assert record["cuda"] == "13.0" and "sm_90" in record["archs"]
    assert "without CUDA kernels" not in output
    script = (
        "from fd_dsa import custom_ops as c; b = c.build(); print(b.state, b.reason);"
        "print(hasattr(b.kernels, 'fd_dsa_position_ids_cuda'))"
    )
    state, has_kernels = run_python(tmp_path / "sources" / "made", script)
    assert state.startswith("built for Paddle ") and "with kernels for sm_80" in state
    assert has_kernels == "True"


def test_without_a_toolkit_plain_cpp_is_built_and_what_serves_is_said(tmp_path: Path) -> None:
    output, record = build_with_cuda(tmp_path, str(tmp_path))
    assert record["archs"] == []
    [line] = [line for line in output.splitlines() if line.startswith("fd_dsa_ops: ")]
    assert line.startswith("fd_dsa_ops: built without CUDA kernels (")
    assert line.endswith("; Triton's kernels serve top-k and sparse MLA on GPUs")
    assert run_python(tmp_path / "sources" / "made", SCRIPT)[1] == "[2, 3, 4, 4]"


def test_the_c_library_needs_no_paddle_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit()
    monkeypatch.setattr(build_library, "SOURCES", small_sources(tmp_path / "sources") / "csrc")
    monkeypatch.setattr(build_library, "CACHE", tmp_path / "cache")
    library = build_library.build_library(["90"])
    made = library.stat().st_mtime_ns
    assert build_library.build_library(["90"]) == library
    assert library.stat().st_mtime_ns == made
    header = build_library.SOURCES / "lengths.h"
    header.write_text(header.read_text() + "// another\n")
    assert build_library.build_library(["90"]) != library
    custom_ops.use_library(library)
    try:
        assert hasattr(custom_ops.build().kernels, "fd_dsa_position_ids_cuda")
    finally:
        custom_ops.use_library(None)


def test_all_kernels_make_one_library() -> None:
    toolkit()
    assert build_library.build_library(["90"]).is_file()


@pytest.mark.parametrize(
    ("name", "kernels"), [("sparse_mla_wide", 6), ("sparse_mla_narrow", 4), ("v4_attend", 1)]
)
def test_products_are_not_serialised_and_nothing_is_spilled(
    tmp_path: Path, name: str, kernels: int
) -> None:
    home = toolkit()
    source = build_library.SOURCES / f"{name}.cu"
    command = [f"{home}/bin/nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", "-c", str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # ptxas says so where a GEMM has to wait for the one before it
    assert "serialized" not in done.stderr and "setmaxnreg" not in done.stderr, done.stderr
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in done.stderr.splitlines()
        if "bytes spill stores" in line
    ]
    assert spilled == [0] * kernels, done.stderr


def test_without_nvcc_the_c_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_library, "find_nvcc", lambda: None)
    with pytest.raises(build_library.BuildError, match=r"no nvcc: install .*CUDA_HOME"):
        build_library.build_library()


def test_a_kernel_that_does_not_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit()
    (tmp_path / "wrong.cu").write_text("this is no CUDA\n")
    monkeypatch.setattr(build_library, "SOURCES", tmp_path)
    monkeypatch.setattr(build_library, "CACHE", tmp_path / "cache")
    with pytest.raises(build_library.BuildError, match=r"nvcc .*wrong\.cu(.|\n)*error"):
        build_library.build_library(["90"])
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("breaks", ["record", "library"])
def test_a_package_that_cannot_be_loaded_says_why(tmp_path: Path, breaks: str) -> None:
    package = tmp_path / "installed" / "fd_dsa_ops"
    shutil.copytree(build_package() / "fd_dsa_ops", package)
    library, record = package / "libfd_dsa_ops.so", package / "build.json"
    if breaks == "library":
        library.write_bytes(b"no library")
        beginning = str(library)
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"paddle": "2.6.0"}))
        beginning = "fd_dsa_ops was built beside Paddle 2.6.0, this is Paddle 3."
    script = "from fd_dsa import custom_ops as c; print(c.build().state); print(c.build().reason)"
    state, reason = run_python(package.parent, script)
    assert state == "broken"
    assert reason.startswith(beginning) and re.search(CURE, reason)

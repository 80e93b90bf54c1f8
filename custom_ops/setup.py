"""Builds fd_dsa_ops for the Paddle that is installed: with CUDA kernels where that has CUDA.

    pip install ./custom_ops                        # setuptools comes from the package index
    pip install --no-build-isolation ./custom_ops   # needs setuptools here, and no network

Source: the documentation of paddle.utils.cpp_extension.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext

NAME = "fd_dsa_ops"
# those that the compiler does not know are left out
ARCHS = ("80", "90", "100")
# of an architecture, the one that has its own instructions too; code for it runs there alone
FEATURES = {"90": "90a"}
# Python may ask for symbols of a debugger, which take longer than the code
CXX_FLAGS = ["-O2", "-g0", "-std=c++17"]
# Where a compiler has libstdc++ as an archive alone, the library would get one of its own beside
# Paddle's, and formatting the number of a line, as Paddle does for an error, ends the process
LINK_FLAGS = ["-l:libstdc++.so.6"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads", "0"]


def import_paddle() -> tuple[Any, Any]:
    """Paddle and its build tools.

    pip builds in a folder of its own, which hides the packages beside which the result will be
    installed; they are looked for behind its own.
    """
    for kind in ("purelib", "platlib"):
        folder = sysconfig.get_path(kind)
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        import paddle
        from paddle.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"{NAME}: Paddle cannot be imported here ({error}). The operators are built for the "
            "Paddle that is installed: install it first (pip install '.[cpu]' or '.[gpu]'), then "
            "pip install --no-build-isolation ./custom_ops"
        )
    return paddle, cpp_extension


def find_nvcc(cuda_home: str | None) -> str:
    """The CUDA compiler in the toolkit that Paddle's build tools take: where CUDA_HOME says, or
    above the first nvcc on the path.
    """
    nvcc = shutil.which("nvcc", path=f"{cuda_home}/bin") if cuda_home else None
    if nvcc is None or not Path(str(cuda_home), "include", "cuda_runtime.h").is_file():
        sys.exit(
            f"{NAME}: this Paddle has CUDA, but {cuda_home} is no CUDA toolkit with bin/nvcc and "
            "include/cuda_runtime.h. Install one or set CUDA_HOME to it; fd_dsa works without the "
            "operators too, on its Triton kernels"
        )
    return nvcc


def known_archs(nvcc: str) -> list[str]:
    """Those of ARCHS for which the compiler makes code."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", said))
    return [arch for arch in ARCHS if arch in known]


def gencode(archs: list[str]) -> list[str]:
    """Flags of nvcc: code of each architecture, and for later ones what the driver compiles."""
    names = [FEATURES.get(arch, arch) for arch in archs]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def sources(*patterns: str) -> list[str]:
    """Files of this folder, by glob: an operator is added by adding its files."""
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def describe() -> tuple[Any, dict[str, Any]]:
    """The extension to build, and what is remembered of the build."""
    paddle, tools = import_paddle()
    info: dict[str, Any] = {"paddle": paddle.__version__, "cuda": None, "archs": []}
    name = f"{NAME}.lib{NAME}"
    if not paddle.is_compiled_with_cuda():
        return tools.CppExtension(
            sources("*.cc"),
            name=name,
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=LINK_FLAGS,
        ), info
    nvcc = find_nvcc(tools.cpp_extension.CUDA_HOME)
    archs = known_archs(nvcc)
    info |= {"cuda": paddle.version.cuda(), "archs": [f"sm_{arch}" for arch in archs]}
    flags = {"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *gencode(archs)]}
    return tools.CUDAExtension(
        sources("*.cc", "csrc/*.cu"),
        name=name,
        extra_compile_args=flags,
        extra_link_args=LINK_FLAGS,
    ), info


def build_command(info: dict[str, Any]) -> type:
    """Paddle's build of an extension, without the Python file that it writes: ours is there."""
    _, tools = import_paddle()

    class Build(tools.BuildExtension):
        def run(self) -> None:
            # what a header changed shall not be left as an earlier build made it
            self.force = True
            try:
                build_ext.run(self)
            except Exception as error:
                # a compiler that fails is only printed by Paddle; what fails then is the linker
                said = str(error).partition("\n")[0][:200]
                sys.exit(
                    f"{NAME}: not built; what the compiler said stands above. fd_dsa works without "
                    f"the operators, on its Triton kernels ({type(error).__name__}: {said})"
                )
            library = Path(self.get_ext_fullpath(self.extensions[0].name))
            library.with_name("build.json").write_text(json.dumps(info) + "\n", "utf-8")
            # Paddle leaves them where files to be installed are
            for left in ("*.o", "version.txt"):
                for path in Path(self.build_lib).rglob(left):
                    path.unlink()

    return Build


def main() -> None:
    """Build what setuptools was asked for."""
    extension, info = describe()
    setup(ext_modules=[extension], cmdclass={"build_ext": build_command(info)})


if __name__ == "__main__":
    main()

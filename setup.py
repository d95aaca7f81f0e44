"""Metadata lives in pyproject.toml; here is how the native engine is built.

`csrc/cpu/kernels.cpp` is compiled once for each instruction set, the rest once; ninja runs them side by side. torch is
not needed: the engine knows nothing of it. Without a compiler the package installs all the same, and a file beside it
says what was missing.
"""

import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
NOTE = "cpu_missing.txt"  # why the engine is not there
COMMON = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall"
ALIGNED = "-falign-loops=64"  # an innermost loop that straddles a line of instructions more is up to 6 % slower
AVX2 = "-mavx2 -mfma"
AVX512 = f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
SIMD = {  # flags, bytes in a vector, rows of a tile whose sums fill the registers, pairs of bf16
    "x86_64": {
        "portable": ("", 16, 6, 0),
        "avx2": (AVX2, 32, 6, 0),
        "avx512": (AVX512, 64, 14, 0),
        "avx512bf16": (f"{AVX512} -mavx512bf16", 64, 14, 1),
    },
}
OTHERS = {"portable": ("", 16, 12, 0)}  # 32 registers, as on aarch64


def objects() -> dict[str, tuple[Path, str]]:
    """Each object's source and flags."""
    plain = [CSRC / "bindings.cpp", *(path for path in (CSRC / "cpu").glob("*.cpp") if path.stem != "kernels")]
    found = {path.stem: (path, "") for path in sorted(plain)}
    for name, (flags, vector_bytes, rows, pairs) in SIMD.get(platform.machine(), OTHERS).items():
        defines = f"{ALIGNED} -DHK_ISA={name} -DHK_VECTOR_BYTES={vector_bytes} -DHK_TILE_ROWS={rows} -DHK_PAIRS={pairs}"
        found[f"kernels_{name}"] = (CSRC / "cpu" / "kernels.cpp", f"{flags} {defines}")
    return found


def ninja_path(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_ninja(target: Path, extra: str) -> str:
    """The build as ninja reads it. `extra` flags are for every object and the link."""
    import pybind11

    folders = (sysconfig.get_paths()["include"], pybind11.get_include())
    includes = shlex.join(f"-I{folder}" for folder in folders).replace("$", "$$")
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        "rule compile",
        f"  command = $cxx {COMMON} {extra} {includes} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared -fopenmp {extra} $in -o $out",
    ]
    sources = objects()
    for name, (source, flags) in sources.items():
        lines += [f"build {name}.o: compile {ninja_path(source)}", f"  flags = {flags}"]
    lines += [f"build {ninja_path(target)}: link {' '.join(f'{name}.o' for name in sources)}", ""]
    return "\n".join(lines)


class BuildNative(build_ext):
    """`HYPERKERNELS_CXXFLAGS` adds flags, as the sanitizers' builds do."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_name(NOTE)
        folder = Path(self.build_temp) / "native"
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        try:
            import ninja

            (folder / "build.ninja").write_text(build_ninja(target, os.environ.get("HYPERKERNELS_CXXFLAGS", "")))
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
            self.announce(shlex.join(command), level=2)
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stdout", None) or "") + (getattr(error, "stderr", None) or "") or str(error)
            reason = next((line for line in output.splitlines() if "rror" in line or "not found" in line), str(error))
            target.unlink(missing_ok=True)
            note.write_text(f"it was not built: {reason.strip()}\n")
            self.warn(f"the native CPU engine was not built and the package goes without: {output}")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "hyperkernels" / NOTE
        source = Path(__file__).parent / "hyperkernels" / NOTE
        source.unlink(missing_ok=True)
        if built.exists():
            source.write_text(built.read_text())


setup(ext_modules=[Extension("hyperkernels._cpu", [], optional=True)], cmdclass={"build_ext": BuildNative})

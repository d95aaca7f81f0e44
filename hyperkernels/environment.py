"""What is here: versions, the CPU and what it can do, GPUs, and which backends are there or why not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hyperkernels import calibration
from hyperkernels.backends import BACKENDS, native_cpu
from hyperkernels.call import Call
from hyperkernels.chunking import Grid
from hyperkernels.machine import cpu_info
from hyperkernels.version import __version__

PACKAGES = ("torch", "triton", "transformers", "numpy", "matplotlib", "rich", "opt_einsum", "pydantic")
BASELINES = ("hypnettorch", "hyperlight", "pyfastkron")
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def environment() -> dict[str, dict[str, Any]]:
    """In groups: `versions`, `cpu`, `gpus`, `backends`."""
    versions = {"hyperkernels": __version__, "python": platform.python_version()}
    for name in (*PACKAGES, *BASELINES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    model, flags = cpu_info()
    cpu = {
        "model": model,
        "threads of torch": torch.get_num_threads(),
        "features": ", ".join(name for name in FEATURES if name in flags) or "none of those that matter here",
        "planner": calibration.state(),
        "native engine": native_cpu.MISSING or f"runs {', '.join(native_cpu._cpu.instruction_sets())}",
    }
    gpus = {}
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        gpus[str(n)] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    backends = {}
    for name, backend in BACKENDS.items():
        answers = {}
        for device in ("cpu", "cuda") if gpus else ("cpu",):
            call = Call(Grid(64, 64, 8, 8), 8, 1, 1, 4, device=device)
            able, reason = backend.supports(call, None)
            answers[device] = f"{'yes' if able else 'no'}: {reason}"
        backends[name] = answers["cpu"] if not gpus else "; ".join(f"{d} {a}" for d, a in answers.items())
    return {"versions": versions, "cpu": cpu, "gpus": gpus or {"-": "torch sees none"}, "backends": backends}

"""The CPU, as its operating system names it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_info() -> tuple[str, set[str]]:
    """The CPU's name, and the flags of what it can do, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return next(models, platform.processor() or platform.machine()), set(flags)


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The cost model's constants for this machine, where somebody had them measured (`hyperkernels bench --calibrate`).

They lie in the user's cache folder and are read when the package is imported; HYPERKERNELS_CALIBRATION names another
file, or with `off` none.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from hyperkernels.backends import native_cpu, torch_blocks
from hyperkernels.machine import cpu_info

FORMAT = 1
NATIVE = ("vectors_per_us", "call_us", "few_call_us")
TORCH = ("flops_per_s", "memory_bytes_per_s", "cache_bytes_per_s", "product_us")
CONSTANTS = (*NATIVE, *TORCH)


def path() -> Path | None:
    """Where the constants are kept; None where they are switched off, or nobody has a home to keep them in."""
    given = os.environ.get("HYPERKERNELS_CALIBRATION", "")
    if given == "off":
        return None
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache) / "hyperkernels" / "calibration.json"


def machine_key() -> str:
    """What a calibration is for: the CPU, what the engine uses of it, and torch's threads."""
    return f"{cpu_info()[0]}, {native_cpu.INSTRUCTIONS or 'no engine'}, {torch.get_num_threads()} threads"


def constants() -> dict[str, float]:
    """Those that the model has now."""
    machine = torch_blocks.MACHINES["cpu"]
    own = (native_cpu.VECTORS_PER_US, native_cpu.CALL_US, native_cpu.FEW_CALL_US)
    return dict(zip(NATIVE, own)) | {name: getattr(machine, name) for name in TORCH}


SHIPPED = constants()


def check(values: dict[str, float]) -> dict[str, float]:
    """Raises ValueError for what are not positive numbers by the names of `CONSTANTS`."""
    good = all(isinstance(v, (int, float)) and v > 0 for v in values.values())
    if set(values) != set(CONSTANTS) or not good:
        raise ValueError(f"constants: got {values}, wanted positive numbers for {', '.join(CONSTANTS)}")
    return values


def apply(values: dict[str, float]) -> None:
    """Of the calls from now on. Raises what `check` does."""
    check(values)
    native_cpu.VECTORS_PER_US = values["vectors_per_us"]
    native_cpu.CALL_US, native_cpu.FEW_CALL_US = values["call_us"], values["few_call_us"]
    torch_blocks.MACHINES["cpu"] = torch_blocks.MACHINES["cpu"]._replace(**{name: values[name] for name in TORCH})


def state() -> str:
    """Which constants the cost model has, in words."""
    if constants() != SHIPPED:
        return f"fitted, in {path()}"
    try:
        saved = _saved()
    except ValueError as error:
        return f"not fitted to this machine: {error}"
    again = "run `hyperkernels bench --calibrate`"
    there = "has constants that were not loaded" if saved else "has nothing for it"
    return f"not fitted to this machine: {path() or 'no file'} {there}; {again}"


def _saved() -> dict[str, float] | None:
    """What was saved for this machine. Raises ValueError for a file that cannot be read."""
    file = path()
    if file is None:
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        here = found["format"] == FORMAT and found["machine"] == machine_key()
        return check(found["constants"]) if here else None
    except (FileNotFoundError, PermissionError):  # there is none, or none for this user
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: no calibration ({error}): delete it, or run `hyperkernels bench --calibrate`"
        ) from None


def load() -> None:
    """Apply what was saved for this machine; a file that cannot be read changes nothing, and is pointed out."""
    try:
        saved = _saved()
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
    else:
        if saved:
            apply(saved)

"""Files of results: written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


class ResultsError(ValueError):
    """A file of results that cannot be read or written: one line that says what to do."""


def save(path: Path, results: Any) -> None:
    """Written beside the file and moved over it: what was there stays until all of the new is. JSON has no numbers that
    are not finite: they are null."""
    write(path, (json.dumps(_finite(results), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(path: Path) -> None:
    """Before anything is measured; what lies at the path stays as it is."""
    handle, part = _part(path)
    os.close(handle)
    Path(part).unlink()


def _part(path: Path) -> tuple[int, str]:
    try:
        if path.exists() and not path.is_file():
            raise ResultsError(f"{path}: is no file: give the path of one, which may not be there yet")
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ResultsError(f"{path}: cannot write there ({error.strerror}): give another path") from None


def write(path: Path, data: bytes) -> None:
    handle, part = _part(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise

"""Opt-in: tiles by the clock, among those that the model thinks best, and kept in a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import astuple
from math import inf
from pathlib import Path

import torch

from hyperkernels.kernels.tiles import Chip, Sizes, Tile, bucket, leading_tiles, splits_within

FILE = "tiles.json"
_folder: Path | None = None
_kept: dict[str, list] = {}


def set_tuning(folder: str | Path | None) -> None:
    """Let the Triton engine time a few tiles the first time that it meets a shape, and keep the fastest in `folder`.

    Without (None, as it is to begin with) tiles follow from the shape, the chip and what the compiler spills, and
    nothing is timed. Shapes whose numbers of rows and contexts fall below the same powers of two share a tile. Nothing
    is timed, or seen to spill, while a CUDA graph is captured: a shape that is new then goes by the model.

    Args:
        folder: where `tiles.json` is kept, made if it is not there; None to go by the model again.

    Raises:
        TypeError: the folder is not a path.
        ValueError: the folder's `tiles.json` holds something else, or a file stands in the folder's place.

    Example:
        >>> import hyperkernels as hk
        >>> hk.set_tuning(None)
    """
    global _folder, _kept
    kept: dict[str, list] = {}
    if folder is not None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder: got {folder!r}, wanted a path or None")
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"folder: got {folder}, which is a file, wanted a folder")
        path = folder / FILE
        if path.exists():
            try:
                kept = {key: list(astuple(Tile(*values))) for key, values in json.loads(path.read_text()).items()}
                if not all(isinstance(number, int) and number > 0 for tile in kept.values() for number in tile):
                    raise ValueError("a tile's sizes are positive integers")
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"folder: {path} is not a table of tiles ({error}); remove it or name another"
                ) from None
        folder.mkdir(parents=True, exist_ok=True)
    _folder, _kept = folder, kept


def enabled() -> bool:
    return _folder is not None


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def tuned_tile(sizes: Sizes, chip: Chip, numbers: str, run: Callable[[Tile], Callable[[], object]]) -> Tile | None:
    """The kept tile, or the fastest of the model's leading ones; None where there is none and nothing may be timed.
    `run(tile)` gives what to time, of `numbers`."""
    assert _folder is not None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    key = f"{device} {numbers} {tuple(bucket(sizes))}"
    if key not in _kept:
        if capturing():
            return None
        times = {tile: _time_s(run, tile) for tile in leading_tiles(sizes, chip)}
        _kept[key] = list(astuple(min(times, key=lambda tile: times[tile])))
        part = _folder / f"{FILE}.part"
        part.write_text(json.dumps(_kept, indent=1))
        part.replace(_folder / FILE)
    return splits_within(sizes, Tile(*_kept[key]))


def _time_s(run: Callable[[Tile], Callable[[], object]], tile: Tile) -> float:
    """The least of a few calls; infinite where the chip has no room for the tile."""
    from triton.runtime.errors import OutOfResources

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    least = inf
    try:
        call = run(tile)
        for _ in range(5):
            wait()
            start = time.perf_counter()
            call()
            wait()
            least = min(least, time.perf_counter() - start)
    except OutOfResources:
        return inf
    return least

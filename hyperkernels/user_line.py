"""Warnings that point at the line of whoever called, however deep in torch the call came here."""

from __future__ import annotations

import sys
import warnings

import torch


def warn_at_users_line(message: str) -> None:
    """At the nearest line that is neither ours nor torch's; what compiles has no lines, and points here."""
    level = 1
    if not torch.compiler.is_compiling():
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
            "hyperkernels",
            "torch",
        ):
            frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

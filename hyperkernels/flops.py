"""`torch.utils.flop_counter.FlopCounterMode` counts the operator by the plan that runs.

A counter copies the table of formulas when it is made, and counts 0 for an operator that is not in it. To enter ours
we would have to import that module, and it imports triton where triton is installed, which a user on a CPU should not
wait for. So the formula is entered at the moment somebody else imports it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

import torch

from hyperkernels.backends import plan_call
from hyperkernels.operators import call_of

WATCHED = "torch.utils.flop_counter"


def _flops(wanted, sizes, activation, order, backend, context_ids, *factors, out_val=None, **_) -> int:
    call = call_of(sizes, activation, context_ids, factors)
    return plan_call(call, tuple(wanted), order or None, backend or None)[1].flops


def _register(module: ModuleType) -> None:
    module.register_flop_formula(torch.ops.hyperkernels.contract, get_raw=True)(_flops)


class _WhenImported(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_then_register
        return spec


def register_flops() -> None:
    """Enter the formula now if the counter's module is there, else when it is."""
    if WATCHED in sys.modules:
        _register(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _WhenImported())

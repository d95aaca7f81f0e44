"""What a user gets from `import hyperkernels`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import torch

import hyperkernels as hk

ROOT = Path(__file__).parents[1]


def test_import_is_quiet_and_brings_no_triton():
    code = "import sys, hyperkernels; assert 'triton' not in sys.modules; assert 'matplotlib' not in sys.modules"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_flops_are_counted_whenever_the_counter_is_imported():
    code = """
import torch
{first}
import hyperkernels as hk
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    hk.hyper_linear(torch.ones(1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
assert counter.get_total_flops() == 4, counter.get_total_flops()
"""
    for first in ("", "import torch.utils.flop_counter"):
        subprocess.run([sys.executable, "-c", code.format(first=first)], check=True)


def test_the_readmes_examples_run(capsys):
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 4
    names = {"torch": torch}
    for block in blocks:
        exec(block.split("```")[0], names)
    x, hidden, head = torch.randn(5, 6), torch.randn(2, 3, 4), torch.randn(4, 5, 2)
    torch.testing.assert_close(names["eager"](x, hidden, head), hk.hyper_linear(x, hidden, head))
    assert "layers swapped: 2" in capsys.readouterr().out


def test_every_public_name_has_a_docstring_and_is_there():
    for name in hk.__all__:
        value = getattr(hk, name)
        assert name == "__version__" or value.__doc__, name


def test_no_module_outgrows_its_page():
    """About 300 lines at most, one idea each."""
    for path in (ROOT / "hyperkernels").rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 320, path
        assert ast.get_docstring(ast.parse(source)), path


def test_the_tests_are_collected_where_neither_the_engine_nor_transformers_is():
    """As on a machine with a GPU, whose own Python runs them from the source tree."""
    script = "import sys, pytest; sys.modules |= {'hyperkernels._cpu': None, 'transformers': None}; " + (
        "sys.exit(pytest.main(['--collect-only', '-q', 'tests', '-p', 'no:cacheprovider']))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]

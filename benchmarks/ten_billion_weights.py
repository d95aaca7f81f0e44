"""A 100,000 x 100,000 layer (ten billion weights, 40 GB if formed) on a batch of 4, forward and backward.

Prints one line of JSON: seconds, and the peak resident memory of this process in MiB.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import hyperkernels as hk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python benchmarks/ten_billion_weights.py")
    parser.add_argument("--size", type=int, default=100_000, help="in_features and out_features (default 100000)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    layer = hk.HyperLinear(arguments.size, arguments.size, chunk=(64, 1024), width=16)
    x = torch.randn(4, arguments.size, requires_grad=True)
    start = time.perf_counter()
    y = layer(x)
    y.square().mean().backward()
    seconds = time.perf_counter() - start
    rows = [0, arguments.size // 2, arguments.size - 1]  # three of the neurons, by a weight formed for them alone
    with torch.no_grad():
        hidden, _ = layer.hidden()
        assert isinstance(hidden, torch.Tensor)
        assert layer.bias is not None
        for row in rows:
            weight = torch.einsum("jk,kq->jq", hidden[row // 64], layer.head[:, row % 64]).flatten()[: arguments.size]
            torch.testing.assert_close(y[:, row], x @ weight + layer.bias[row], rtol=1e-3, atol=1e-4)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    case = f"forward and backward, {arguments.size:,}x{arguments.size:,}, chunks 64x1024, m=16, B=4"
    print(json.dumps({"case": case, "seconds": seconds, "process_peak_mib": peak, "process_limit_mib": 2048}))


if __name__ == "__main__":
    main()

"""The microbenchmark suite: cases with baselines by name, measured in interleaved rounds and judged against fp64.

`hyperkernels bench` runs it; the repository's own claims (`make bench`) are made of the same cases.
"""

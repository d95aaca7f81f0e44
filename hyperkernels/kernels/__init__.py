"""The Triton kernels. Nothing outside `backends/triton_fused.py` imports from here: triton may not be installed."""

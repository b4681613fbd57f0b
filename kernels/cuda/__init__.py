"""CUDA C++ kernels for what Triton does not reach: sign planes, and W4A8 with its dequantization overlapped."""

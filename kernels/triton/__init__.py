"""Room for the triton kernels; empty until the GPU backend is built."""

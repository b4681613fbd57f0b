"""Room for the cuda kernels; empty until the GPU backend is built."""

"""Code of the GPU, in Triton's language: each file needs nothing but `dlqc.kernels.triton.language`."""

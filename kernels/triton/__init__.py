"""Kernels in Triton, for NVIDIA and AMD GPUs; `device/` is what runs there, the rest packs, chooses and launches."""

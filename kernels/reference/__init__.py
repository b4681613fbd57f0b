"""Every op in plain PyTorch: written first, runs anywhere, judges the others."""

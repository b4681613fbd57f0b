"""dlqc: a compiler that makes diffusion language models small and fast."""

__version__ = "0.1.0"

"""A systematic study of quantization: bit-width × method × task category × model type, as QDLM (arXiv 2508.14896) laid it out."""

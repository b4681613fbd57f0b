"""Number formats: one file each, with quantize, dequantize, pack, unpack and the exact bits per weight."""

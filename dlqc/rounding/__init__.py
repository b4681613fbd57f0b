"""Rounding methods: weight and statistics in, codes and scales out. Pure functions behind one contract."""

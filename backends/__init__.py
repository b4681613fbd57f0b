"""Backends: graph to callable, one file a device family."""

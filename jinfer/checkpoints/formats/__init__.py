"""Quantized weights in files, one module a file format."""

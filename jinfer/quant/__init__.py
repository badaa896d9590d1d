"""Quantization: recipes, calibration, the walk over a model."""

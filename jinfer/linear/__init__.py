"""Weights as the device has them, and their products."""

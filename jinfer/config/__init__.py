"""Configurations, parameters and outputs. Imports no jax."""

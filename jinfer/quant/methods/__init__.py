"""Solvers of one weight."""

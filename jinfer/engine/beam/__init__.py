"""Beam search beside the scheduler."""

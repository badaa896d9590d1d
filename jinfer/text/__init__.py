"""Prompts to token ids, tokens to text. Imports no jax."""

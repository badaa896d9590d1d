"""Which drafts a step verifies: chains and trees. Imports no jax."""

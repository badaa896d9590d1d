"""Pages of the KV pool: who holds them, cached prefixes, the host tier. Imports no jax."""

"""Recovery of failed steps, the watchdog, integrity checks. Imports no jax."""

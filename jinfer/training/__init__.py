"""Training of Medusa heads and draft models: data and loop."""

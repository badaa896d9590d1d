"""The jitted steps and what they take."""

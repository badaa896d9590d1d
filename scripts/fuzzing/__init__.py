"""What scripts/fuzz.py consists of: an oracle, values, a loop, and a module a door."""

"""The paged KV pool, its number formats, rotations."""

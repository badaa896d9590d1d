"""Measurements of `jinfer bench`, one module each, and the report that all of them write."""

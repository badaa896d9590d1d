"""Drafting methods and the acceptance of drafts."""

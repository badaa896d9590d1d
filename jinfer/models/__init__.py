"""One decoder, configured."""

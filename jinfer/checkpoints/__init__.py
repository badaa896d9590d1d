"""Checkpoints in and out: Hugging Face folders, GGUF files, the default model."""

"""Requests as users see them: samples as one output, logprobs, beam search."""

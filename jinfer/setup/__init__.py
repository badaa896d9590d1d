"""The arguments of `LLM`, made into configurations, a model and a drafter."""

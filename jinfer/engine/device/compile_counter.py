"""Counts what is compiled in this process."""

from __future__ import annotations

import jax


class CompileCounter:
    """Counts every program that XLA compiles (or loads from its cache) in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


compile_counter = CompileCounter()

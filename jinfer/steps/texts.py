"""Texts written by the model itself, for calibration."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Int

from jinfer import functional
from jinfer.config.typing import Params
from jinfer.models.model import Model


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample_texts(
    model: Model, params: Params, first: Int[Array, "B 1"], key: Array, length: int
) -> Int[Array, "B length"]:
    """What the model itself writes after `first`: text to calibrate on where there is no other."""
    return functional.generate(
        model, params, first, max_new_tokens=length, temperature=1.0, top_p=0.95, key=key
    ).tokens

"""The step of a beam search."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, UInt32

from jinfer.config.typing import Params
from jinfer.kv.cache import KVCache
from jinfer.models.model import Model
from jinfer.sampling.logprobs import best_continuations
from jinfer.sampling.state import SamplerState
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import run_blocks


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "k", "impl"), donate_argnames=("kv",)
)
def beam_step(
    model: Model,
    params: Params,
    kv: KVCache,
    state: SamplerState,
    batch: StepBatch,
    totals: Float[Array, "S"],
    temperature: Float[Array, "S"],
    token_mask: UInt32[Array, "S W"] | None = None,
    *,
    num_beams: int,
    k: int,
    impl: str = "auto",
) -> tuple[tuple[Array, Array, Array], KVCache]:
    """Computes the newest token of S beams and chooses the best continuations of each group.

    Args:
      model: static.
      params: weights.
      kv: the pool, donated.
      state: sampler state, only looked at.
      batch: S = G * num_beams sequences of one token, given by its id.
      totals, temperature, token_mask, num_beams, k: see `sampling.best_continuations`.
      impl: attention backend.
    """
    hidden, kv = run_blocks(model, params, kv, state, batch, impl)
    logits = model.unembed(params, hidden)
    with jax.named_scope("beams"):
        best = best_continuations(logits, totals, temperature, token_mask, num_beams=num_beams, k=k)
    return best, kv

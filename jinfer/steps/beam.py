"""The step of a beam search."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array

from jinfer.config.typing import Params
from jinfer.models.model import Model
from jinfer.sampling.logprobs import best_continuations
from jinfer.steps.batch import StepBatch
from jinfer.steps.blocks import run_blocks
from jinfer.steps.inputs import Pool, StepInputs


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "k", "impl"), donate_argnames=("pool",)
)
def beam_step(
    model: Model,
    params: Params,
    pool: Pool,
    inputs: StepInputs,
    *,
    num_beams: int,
    k: int,
    impl: str = "auto",
) -> tuple[tuple[Array, Array, Array], Pool]:
    """Computes the newest token of S beams and chooses the best continuations of each group.

    Args:
      model: static.
      params: weights.
      pool: donated; the sampler's state in it stays as it is.
      inputs: a `StepBatch` of S = G * num_beams sequences of one token, given by its id; `beams`;
        a token mask or none.
      num_beams, k: static, see `sampling.logprobs.best_continuations`.
      impl: attention backend.
    """
    batch, beams = inputs.batch, inputs.beams
    assert isinstance(batch, StepBatch) and beams is not None
    hidden, kv = run_blocks(model, params, pool.kv, pool.state, batch, impl)
    logits = model.unembed(params, hidden)
    with jax.named_scope("beams"):
        best = best_continuations(
            *(logits, beams.totals, beams.temperature, inputs.token_mask),
            num_beams=num_beams,
            k=k,
        )
    return best, Pool(kv, pool.state, pool.draft_kv)

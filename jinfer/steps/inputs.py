"""What a jitted step takes beside its weights: the donated pool and the inputs of one step.

Every step is `step(model, params, pool, inputs, *, static choices) -> (output, pool)`. The pool is
donated and comes back updated; inputs are NumPy arrays that the host has packed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jinfer.config.typing import Params
from jinfer.kv.cache import KVCache
from jinfer.sampling.args import SampleArgs
from jinfer.sampling.state import SamplerState
from jinfer.steps.batch import DecodeBatch, StepBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """What an engine keeps on the device between steps; every step donates all of it.

    Attributes:
      kv: the model's KV cache.
      state: the sampler's state of R rows.
      draft_kv: KV cache of a drafting model, its pages numbered like `kv`'s; None: there is no such
        model, or it works in `kv`.
    """

    kv: KVCache
    state: SamplerState
    draft_kv: KVCache | None = None


class Weights(NamedTuple):
    """Weights of a step in which something drafts for the model.

    Attributes:
      target: the model's weights.
      drafter: those of the drafting model, or Medusa heads; None: no heads.
    """

    target: Params
    drafter: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The beams of a step, one a sequence.

    Attributes:
      totals: [S] each beam's sum of log probabilities; -inf: no beam.
      temperature: [S] positive; divides the logits.
    """

    totals: Float[Array, "S"]
    temperature: Float[Array, "S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What one step works on; fields that a kind of step does not need are None.

    Attributes:
      batch: the sequences and their tokens, padded to a bucket.
      args: sampling fields, one row a sequence.
      sampled: [S] whether a sequence's last token ends its known tokens, so that the token sampled
        after it counts. Others leave no trace in the sampler's state.
      num_drafts: [S] drafts at the end of each sequence's tokens.
      parents: [N + 1, S] the shapes of trees of at most N drafts, see `accept_tree.Nodes`.
      num_steps: decode steps to run in one program, 1 to the program's `max_steps`.
      beams: what a step of beam search needs beside the batch.
      token_mask: u32 words of ceil(V / 32) bits, of the tokens that may be sampled: [S, W], and
        [K + 1, S, W] where K drafts are verified, one mask after each; None: every token. An engine
        always gives some, so that it needs one program for steps with and without restrictions.
    """

    batch: StepBatch | DecodeBatch
    args: SampleArgs | None = None
    sampled: Bool[Array, "S"] | None = None
    num_drafts: Int[Array, "S"] | None = None
    parents: Int[Array, "N1 S"] | None = None
    num_steps: Int[Array, ""] | None = None
    beams: Beams | None = None
    token_mask: UInt32[Array, "*K1 S W"] | None = None

"""A mixture-of-experts MLP: a router, and experts that each work on the tokens sent to them only.

Rows (token, expert) are sorted by expert and cut into blocks of equal size, padded so that each
block has one expert; a scan multiplies block by block. Example with E = 2, blocks of 2 rows:

    expert of row    1 0 1 1 0          sorted rows     1 4 | 0 2 | 3 .
    (5 rows)                            block's expert   0     1     1

No token is ever dropped, a decode step reads only the experts it needs, and the result is right
under jit, vmap and grad. `jax.lax.ragged_dot` is none of these here: off the TPU it multiplies
every row with every expert, and it has no vmap rule for weights that all examples share. Since a
block sees one [I, O] weight, a quantized stack works through the same `ops.linear`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jinfer.config.model import ModelConfig
from jinfer.linear import ops
from jinfer.models.layers import Linear

MAX_BLOCK_ROWS = 128


class Experts(nnx.Module):
    """Weights of the router and of E gated MLPs, stacked."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, e, f = config.hidden_size, config.num_experts, config.expert_intermediate_size
        self.config = config
        self.router = Linear("router", d, e, has_bias=False, dtype=dtype, rngs=rngs)
        make = functools.partial(Linear, has_bias=False, dtype=dtype, rngs=rngs, num_experts=e)
        self.gate, self.up, self.down = make("gate", d, f), make("up", d, f), make("down", f, d)

    def __call__(self, x: Float[Array, "*B D"]) -> tuple[Float[Array, "*B D"], dict[str, Array]]:
        """Returns the experts' weighted sum, and taps (see `block.Block`)."""
        rows = x.reshape(-1, x.shape[-1])  # [T, D]
        weights, expert_ids = self.route(rows)
        out, hidden = self.run_experts(rows, expert_ids)  # [T, k, D], [T, k, F]
        out = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=-2).astype(x.dtype)
        lead = x.shape[:-1]
        taps = {
            "router": x,
            "gate": x,
            "up": x,
            "down": hidden.reshape(*lead, *hidden.shape[1:]),
            "expert_ids": expert_ids.reshape(*lead, -1),
        }
        return out.reshape(x.shape), taps

    def route(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
        """Returns the weights and ids of each token's experts, best first."""
        with jax.named_scope("router"):
            logits = ops.head(x, self.router.w.get_value(), is_tied=False)  # f32
            weights, ids = jax.lax.top_k(
                jax.nn.softmax(logits, axis=-1), self.config.num_experts_per_token
            )
            if self.config.norm_topk_prob:
                weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
            return weights, ids

    def run_experts(
        self, x: Float[Array, "T D"], expert_ids: Int[Array, "T k"]
    ) -> tuple[Float[Array, "T k D"], Float[Array, "T k F"]]:
        """Returns each chosen expert's output and the input of its `down`, per token and choice."""
        num_tokens, num_choices = expert_ids.shape
        num_experts = self.config.num_experts
        size, num_blocks = block_sizes(num_tokens * num_choices, num_experts)
        places, block_experts, num_used = _arrange(expert_ids.reshape(-1), num_experts, size)

        # Which token stands at each place; places that stay empty compute token 0 for nothing.
        tokens = jnp.arange(num_tokens * num_choices, dtype=jnp.int32) // num_choices
        token_at = jnp.zeros((num_blocks * size,), tokens.dtype).at[places].set(tokens)
        blocks = x[token_at].reshape(num_blocks, size, -1)
        stacks = (self.gate.w.get_value(), self.up.w.get_value(), self.down.w.get_value())
        widths = (x.shape[-1], self.config.expert_intermediate_size)

        def run_block(block: Array, expert: Array) -> tuple[Array, Array]:
            gate, up, down = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False), stacks
            )
            hidden = ops.gated(
                self.config.activation, ops.linear(block, gate), ops.linear(block, up)
            )
            return ops.linear(hidden, down), hidden

        def skip_block(block: Array, expert: Array) -> tuple[Array, Array]:
            return jnp.zeros((size, widths[0]), x.dtype), jnp.zeros((size, widths[1]), x.dtype)

        def step(_, inputs):
            block, expert, is_used = inputs
            return None, jax.lax.cond(is_used, run_block, skip_block, block, expert)

        with jax.named_scope("experts"):
            is_used = jnp.arange(num_blocks, dtype=jnp.int32) < num_used
            _, (out, hidden) = jax.lax.scan(step, None, (blocks, block_experts, is_used))

        def by_token(y: Array) -> Array:
            return y.reshape(num_blocks * size, -1)[places].reshape(num_tokens, num_choices, -1)

        return by_token(out), by_token(hidden)


def block_sizes(num_rows: int, num_experts: int) -> tuple[int, int]:
    """Returns (rows in a block, blocks that any routing of `num_rows` rows fits in).

    A block is about half an even share, so that little is padding. An expert with c rows fills
    ceil(c / size) blocks, hence the bound: num_rows / size whole ones, and one more an expert.
    """
    share = max(1, num_rows // (2 * num_experts))
    size = min(MAX_BLOCK_ROWS, 1 << (share - 1).bit_length())
    return size, num_rows // size + (min(num_experts, num_rows) if size > 1 else 0)


def _arrange(
    expert_ids: Int[Array, "R"], num_experts: int, size: int
) -> tuple[Array, Array, Array]:
    """Returns each row's place among the blocks [R], each block's expert, and the blocks in use."""
    num_rows = expert_ids.shape[0]
    num_blocks = block_sizes(num_rows, num_experts)[1]
    counts = jnp.zeros((num_experts,), jnp.int32).at[expert_ids].add(1)
    blocks = (counts + size - 1) // size  # [E] blocks of each expert
    block_ends = jnp.cumsum(blocks, dtype=jnp.int32)
    first_row = jnp.cumsum(counts, dtype=jnp.int32) - counts  # [E] in sorted order
    first_place = (block_ends - blocks) * size  # [E]
    order = jnp.argsort(expert_ids, stable=True)
    sorted_ids = expert_ids[order]
    sorted_places = (
        first_place[sorted_ids] + jnp.arange(num_rows, dtype=jnp.int32) - first_row[sorted_ids]
    )
    places = jnp.zeros((num_rows,), sorted_places.dtype).at[order].set(sorted_places)
    block_experts = jnp.searchsorted(
        block_ends, jnp.arange(num_blocks, dtype=jnp.int32), side="right"
    )
    return places, jnp.minimum(block_experts, num_experts - 1), block_ends[-1]

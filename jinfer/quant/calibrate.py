"""Computes one block's activations stage by stage, and statistics of its linears' inputs.

A block runs in five stages, so that weights can be quantized in between and nothing is computed
twice. Each is jitted once for all layers of a kind and mapped over chunks of sequences:

    x -> attention_inputs -> mix_values -> mlp_inputs -> hidden_inputs -> block_outputs
         (q, k, v read it)   (o)           (gate, up)    (down)

Activations are [C, S, T, D]: C chunks of S sequences of T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinfer.config.fields import require
from jinfer.config.typing import Params
from jinfer.linear import ops
from jinfer.linear.qtensor import check_finite
from jinfer.models import block
from jinfer.models.model import Model
from jinfer.quant.methods.factor import dot_transposed, gram

CHUNK_TOKENS = 2048  # the tokens of a chunk, about
QUERY_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStats:
    """Statistics of one linear's inputs over calibration tokens.

    Attributes:
      gram: f32 [I, I], sum of x x^T (over every `stride`-th chunk).
      abs_sum: f32 [I], sum of |x|.
      abs_max: f32 [I], largest |x|.
      count: i32 [], tokens.
      drift: f32 [I, I], sum of x (x' - x)^T with x' the float model's input for the same token;
        None if no method corrects with it.
    """

    gram: Array
    abs_sum: Array
    abs_max: Array
    count: Array
    drift: Array | None = None

    @property
    def mean_abs(self) -> Array:
        """f32 [I], mean of |x|."""
        return self.abs_sum / self.count.astype(jnp.float32)

    def divided(self, s: Array) -> InputStats:
        """Statistics of x / s."""
        outer = s[:, None] * s[None, :]
        drift = None if self.drift is None else self.drift / outer
        return InputStats(self.gram / outer, self.abs_sum / s, self.abs_max / s, self.count, drift)


@functools.partial(jax.jit, static_argnums=1)
def measure(x: Array, stride: int = 1) -> InputStats:
    """Returns statistics of [C, S, T, I]; the costly Gram matrix of each `stride`-th chunk only.

    Whole chunks, so that each position of a sequence has the same weight: inputs of first tokens
    are many times larger than others.
    """
    num_inputs = x.shape[-1]

    def add(total: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
        size = jnp.abs(chunk.reshape(-1, num_inputs).astype(jnp.float32))
        # A product with ones: the order of jnp.sum depends on the number of threads on CPUs.
        ones = jnp.ones(size.shape[0], jnp.float32)
        abs_sum = total[0] + jnp.dot(ones, size, precision=lax.Precision.HIGHEST)
        return (abs_sum, jnp.maximum(total[1], jnp.max(size, axis=0))), None

    zero = jnp.zeros(num_inputs, jnp.float32)
    abs_sum, abs_max = lax.scan(add, (zero, zero), x)[0]
    return InputStats(gram(x[::stride]), abs_sum, abs_max, jnp.int32(x.size // num_inputs))


@jax.jit
def measure_drift(x: Array, reference: Array) -> Array:
    """f32 [I, I]: sum of x (x' - x)^T over tokens of `x` and `reference` x', both [C, S, T, I]."""
    num_inputs = x.shape[-1]

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        x, reference = (a.reshape(-1, num_inputs).astype(jnp.float32) for a in pair)
        return total + dot_transposed(x, reference - x), None

    return lax.scan(add, jnp.zeros((num_inputs, num_inputs), jnp.float32), (x, reference))[0]


def chunks_of(tokens: Array) -> Array:
    """Returns [n, T] as [C, S, T], with the largest divisor S of n that CHUNK_TOKENS allows."""
    num_sequences, length = tokens.shape
    require(num_sequences > 0, "calibration needs at least one sequence")
    most = max(1, min(num_sequences, CHUNK_TOKENS // length))
    size = next(s for s in range(most, 0, -1) if num_sequences % s == 0)
    return tokens.reshape(num_sequences // size, size, length)


_LEAVES = {"w": "weight", "b": "bias"}


def check_layers(params: Params) -> None:
    """Raises ValueError, naming the first, if a parameter of a block is not finite.

    Called first, since a NaN in a weight makes all activations after it NaN.
    """
    for path, leaf in jax.tree.leaves_with_path(params["layers"]):
        name, _, kind = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")
        check_finite(jnp.asarray(leaf), f"layers.{name}: {_LEAVES.get(kind, kind)}")


def first_inputs(model: Model, params: Params, tokens: Array) -> Array:
    """The first block's inputs f32 [C, S, T, D] of calibration tokens [n, T].

    Raises:
      ValueError: a parameter that calibration meets is not finite; the message names it.
    """
    check_layers(params)
    x = embed(model, params, chunks_of(tokens)).astype(jnp.float32)
    if not bool(jnp.all(jnp.isfinite(x))):
        check_finite(jnp.asarray(params["embed"]["w"]), "embed: weight")
    return x


@functools.partial(jax.jit, static_argnums=0)
def embed(model: Model, params: Params, tokens: Array) -> Array:
    """The first block's inputs [C, S, T, D] of tokens [C, S, T]."""
    return model.embed(params, tokens)


def _run_block(
    model: Model, kind: int, layer_params: Params, x: Array
) -> tuple[Array, None, block.Taps]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[-2], dtype=jnp.int32), x.shape[:-1])
    lens = jnp.full_like(positions, x.shape[-2])
    attend = functools.partial(_attend, model)
    return model.block_with_taps(kind, layer_params, x, positions, attend, None, context_lens=lens)


def _taps(model: Model, kind: int, layer_params: Params, x: Array) -> block.Taps:
    return _run_block(model, kind, layer_params, x)[2]


def _attend(model: Model, layer: int, q: Array, k: Array, v: Array, cache: None, *, window: Any):
    """Computes dense causal attention by blocks of queries, each with the keys up to its end."""
    config, outs = model.config, []
    for start in range(0, q.shape[-3], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[-3])
        out = ops.dense_attention(
            q[..., start:stop, :, :],
            k[..., :stop, :, :],
            v[..., :stop, :, :],
            sm_scale=config.sm_scale,
            window=window,
            cap=config.attention_soft_cap,
        )
        outs.append(out)
    return jnp.concatenate(outs, axis=-3), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_block(model: Model, kind: int, layer_params: Params, x: Array) -> Array:
    """Returns a block's outputs for one text x [T, D] from its start."""
    return _run_block(model, kind, layer_params, x)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def attention_inputs(model: Model, kind: int, layer_params: Params, x: Array) -> Array:
    """Inputs of q, k and v; XLA drops the rest of the block."""
    return lax.map(lambda c: _taps(model, kind, layer_params, c)["attn"]["q"], x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def mix_values(model: Model, kind: int, layer_params: Params, x: Array) -> Array:
    """Inputs of o, [C, S, T, N * H]."""
    return lax.map(lambda c: _taps(model, kind, layer_params, c)["attn"]["o"], x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def mlp_inputs(
    model: Model, kind: int, layer_params: Params, x: Array, mixed: Array
) -> tuple[Array, Array]:
    """The residual stream after attention, and inputs of gate, up and a router."""
    bound = block.bind(model.config, kind, layer_params)

    def step(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, mixed = inputs
        out = bound.attn.o(mixed)
        if bound.attn_post_norm is not None:
            out = bound.attn_post_norm(out)
        x = x + out
        return x, bound.mlp_norm(x)

    return lax.map(step, (x, mixed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden_inputs(model: Model, kind: int, layer_params: Params, h: Array) -> Array:
    """Inputs of down, [C, S, T, F], of a dense MLP."""
    bound = block.bind(model.config, kind, layer_params)
    return lax.map(lambda c: bound.mlp(c)[1]["down"], h)


@functools.partial(jax.jit, static_argnums=(0,))
def expert_hidden(model: Model, gate: Any, up: Any, h: Array) -> Array:
    """Inputs of one expert's down, [C, S, T, F], as if every token were sent to it."""

    def step(c: Array) -> Array:
        return ops.gated(model.config.activation, ops.linear(c, gate), ops.linear(c, up))

    return lax.map(step, h)


@functools.partial(jax.jit, static_argnums=(0, 1))
def block_outputs(
    model: Model, kind: int, layer_params: Params, x: Array, h: Array, hidden: Array | None
) -> Array:
    """The block's outputs: x + MLP; `hidden` are a dense MLP's, None runs the experts on h."""
    bound = block.bind(model.config, kind, layer_params)

    def step(inputs: tuple[Array, Array, Array | None]) -> Array:
        x, h, hidden = inputs
        out = bound.mlp(h)[0] if hidden is None else bound.mlp.down(hidden)
        if bound.mlp_post_norm is not None:
            out = bound.mlp_post_norm(out)
        return x + out

    return lax.map(step, (x, h, hidden))

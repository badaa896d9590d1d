"""One decoder block, driven by ModelConfig alone; knows nothing of caches, batches or families.

flax.nnx says here what a block is: its parameters, their names and shapes. The trace works on
plain dicts: `bind` puts one layer's dict into the block's shape, and that object lives no longer
than the trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jinfer.config.model import ModelConfig
from jinfer.linear import ops
from jinfer.models.layers import Linear, Norm
from jinfer.models.moe import Experts

Attend: TypeAlias = Callable[..., tuple[Array, Any]]
"""attend(layer, q [..., T, N, H], k [..., T, K, H], v like k, cache, window=)
-> (out like q, cache)."""

Rope: TypeAlias = tuple[Array, Array]
"""(cos, sin), [..., T, R] f32."""

Taps: TypeAlias = dict[str, Any]
"""Inputs of the block's linears under the parameters' names: taps["attn"]["o"] is the input of
params["attn"]["o"]. Of experts, "down" is [..., T, k, F], one row for each choice in "expert_ids"
[..., T, k]; "gate" and "up" saw row t once for each of t's choices."""


class Attention(nnx.Module):
    """Projections, head norms and rotation; the attention itself is the caller's."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_heads * h, config.num_kv_heads * h
        make = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.config = config
        self.q = make("q", d, q_width, has_bias=config.attention_bias)
        self.k = make("k", d, kv_width, has_bias=config.attention_bias)
        self.v = make("v", d, kv_width, has_bias=config.attention_bias)
        self.o = make("o", q_width, d, has_bias=config.attention_out_bias)
        self.q_norm = Norm(config, h, dtype=dtype) if config.qk_norm else None
        self.k_norm = Norm(config, h, dtype=dtype) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "*B T D"], rope: Rope, attend: Callable, cache: Any
    ) -> tuple[Float[Array, "*B T D"], Any, Taps]:
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q, k = self.q(x).reshape(heads), self.k(x).reshape(heads)  # [..., T, N, H], [..., T, K, H]
        v = self.v(x).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(ops.rotate(q, *rope), ops.rotate(k, *rope), v, cache)
        out = out.reshape(*x.shape[:-1], -1)  # [..., T, N * H]
        return self.o(out), cache, {"q": x, "k": x, "v": x, "o": out}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        make = functools.partial(Linear, has_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation
        self.gate, self.up, self.down = make("gate", d, f), make("up", d, f), make("down", f, d)

    def __call__(self, x: Float[Array, "*B D"]) -> tuple[Float[Array, "*B D"], Taps]:
        hidden = ops.gated(self.activation, self.gate(x), self.up(x))
        return self.down(hidden), {"gate": x, "up": x, "down": hidden}


class Block(nnx.Module):
    """Attention and an MLP (dense or of experts), each with its norms and residual sum."""

    def __init__(self, config: ModelConfig, *, is_moe: bool, dtype: Any, rngs: nnx.Rngs):
        norm = functools.partial(Norm, config, config.hidden_size, dtype=dtype)
        self.attn_norm = norm()
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = (Experts if is_moe else MLP)(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x: Float[Array, "*B T D"], rope: Rope, attend: Callable, cache: Any
    ) -> tuple[Float[Array, "*B T D"], Any, Taps]:
        """Returns (x, cache, taps); `attend(q, k, v, cache)` already knows the layer."""
        with jax.named_scope("attn"):
            out, cache, attn_taps = self.attn(self.attn_norm(x), rope, attend, cache)
            if self.attn_post_norm is not None:
                out = self.attn_post_norm(out)
            x = x + out
        with jax.named_scope("mlp"):
            out, mlp_taps = self.mlp(self.mlp_norm(x))
            if self.mlp_post_norm is not None:
                out = self.mlp_post_norm(out)
            x = x + out
        return x, cache, {"attn": attn_taps, "mlp": mlp_taps}


@functools.lru_cache(maxsize=64)
def _definition(config: ModelConfig, is_moe: bool) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
    """Builds one block of a kind abstractly: its graph, and its parameters' shapes in float32."""
    block = nnx.eval_shape(
        lambda: Block(config, is_moe=is_moe, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(block)
    return graph, nnx.to_pure_dict(state)


def abstract_params(config: ModelConfig, layer: int, dtype: Any) -> dict[str, Any]:
    """Returns the layer's parameters as shapes."""
    shapes = _definition(config, config.is_moe_layer(layer))[1]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), dict(shapes))


def init_params(config: ModelConfig, layer: int, key: Array, dtype: Any) -> dict[str, Any]:
    """Returns random parameters for the layer."""
    is_moe = config.is_moe_layer(layer)
    block = Block(config, is_moe=is_moe, dtype=dtype, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(block, nnx.Param))


def bind(config: ModelConfig, layer: int, layer_params: Mapping[str, Any]) -> Block:
    """Returns the block of `layer` that holds `layer_params`; for use within one trace.

    Raises:
      ValueError: names are missing or unknown.
    """
    graph, shapes = _definition(config, config.is_moe_layer(layer))
    expected, got = _names(shapes), _names(layer_params)
    if expected != got:
        raise ValueError(
            f"parameters of layer {layer} do not fit this {config.family} model: "
            f"missing {sorted(expected - got)}, unknown {sorted(got - expected)}"
        )
    return nnx.merge(graph, layer_params)


def _names(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in tree.items():
        is_inner = isinstance(value, Mapping)
        names |= _names(value, f"{prefix}{key}.") if is_inner else {f"{prefix}{key}"}
    return names

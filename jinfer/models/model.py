"""The decoder as pure functions of a params tree; knows nothing of files, engines or requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.config.model import ModelConfig
from jinfer.config.typing import Params
from jinfer.linear import ops
from jinfer.linear.weight import flatten_weights, format_of
from jinfer.models import block, inputs, rope
from jinfer.models.block import Attend, Rope, Taps


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer: hashable, hence a static argument of jit; it holds no arrays.

    `params["layers"]` is a tuple of per-layer dicts, run by a Python loop, or one dict of stacked
    [L, ...] leaves, run by a scan where all layers are alike: `stack_layers` makes the second from
    the first.

    Two rope scalings ("dynamic", "longrope") choose frequencies by sequence length: for them
    `apply` wants `context_lens` [..., T], for each token max(prompt length, position + 1), which is
    what transformers comes to when it generates with a cache; in `logits` it is the length of the
    given text, as in a forward pass of transformers. Chunks and batch mates then change nothing.
    Its Phi-3 alone begins again where a text being generated outgrows the original context, with
    the long factors for all of it; here what is in the cache keeps the short ones.
    """

    config: ModelConfig

    def init(self, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Returns random parameters: weights normal with variance 1 / I, norms neutral."""
        inputs.check_key(key)
        dtype = inputs.read_dtype(dtype)
        config = self.config
        embed_key, head_key, *layer_keys = jax.random.split(key, config.num_layers + 2)
        d, v = config.hidden_size, config.vocab_size
        neutral = 0.0 if config.norm_plus_one else 1.0
        params: dict[str, Any] = {
            "embed": {"w": jax.random.normal(embed_key, (v, d), dtype) * d**-0.5},
            "layers": tuple(
                block.init_params(config, i, layer_keys[i], dtype) for i in range(config.num_layers)
            ),
            "final_norm": {"scale": jnp.full((d,), neutral, dtype)},
        }
        if not config.tie_word_embeddings:
            params["lm_head"] = {"w": jax.random.normal(head_key, (d, v), dtype) * d**-0.5}
        return params

    def abstract_params(self, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Returns the params tree of `init` with jax.ShapeDtypeStruct leaves."""
        config = self.config
        d, v = config.hidden_size, config.vocab_size
        shape = jax.ShapeDtypeStruct
        params: dict[str, Any] = {
            "embed": {"w": shape((v, d), dtype)},
            "layers": tuple(
                block.abstract_params(config, i, dtype) for i in range(config.num_layers)
            ),
            "final_norm": {"scale": shape((d,), dtype)},
        }
        if not config.tie_word_embeddings:
            params["lm_head"] = {"w": shape((d, v), dtype)}
        return params

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "*B T"],
        positions: Int[Array, "*B T"],
        attend: Attend,
        cache: Any,
        *,
        context_lens: Int[Array, "*B T"] | None = None,
        trace_once: Callable | None = None,
    ) -> tuple[Float[Array, "*B T D"], Any]:
        """Runs the blocks over tokens at given positions, with the caller's attention.

        Args:
          params: weights.
          tokens: ids in 0..V-1.
          positions: place of each token in its sequence.
          attend: attend(layer, q, k, v, cache, window=) -> (out, cache) with q [..., T, N, H] and
            k [..., T, K, H] normed and rotated; `layer` is an int, or traced under a scan and with
            `trace_once`; `window` is the layer's sliding window in tokens, or None.
          cache: any pytree, threaded through the layers.
          context_lens: see the class; may be None for the other rope scalings.
          trace_once: `jax.jit`, to trace alike blocks of a tuple of layers once: XLA gets one
            function that is called for each of them. For callers under `jit`.

        Returns:
          Hidden states after the final norm, in the embedding's dtype, and the cache.
        """
        x = self.embed(params, tokens)
        ropes = self._ropes(positions, context_lens)
        layers = params["layers"]
        if isinstance(layers, Mapping):
            x, cache = self._scan(layers, x, ropes, attend, cache)
        else:
            self._check_count(len(layers))

            def run_block(kind: int, layer: Any, layer_params: Params, x: Array, cache: Any):
                x, cache, _ = self._block(kind, layer, layer_params, x, ropes, attend, cache)
                return x, cache

            if trace_once is not None:
                run_block = trace_once(run_block, static_argnums=0)
            for i, layer_params in enumerate(layers):
                if trace_once is None:
                    kind, layer = i, i
                else:
                    kind, layer = self.config.kind_of(i), jnp.int32(i)
                x, cache = run_block(kind, layer, layer_params, x, cache)
        return self.final_norm(params, x), cache

    def block_with_taps(
        self,
        layer: int,
        layer_params: Mapping[str, Any],
        x: Float[Array, "*B T D"],
        positions: Int[Array, "*B T"],
        attend: Attend,
        cache: Any,
        *,
        context_lens: Int[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T D"], Any, Taps]:
        """Runs one block and returns (x, cache, taps), the inputs of its linears: for calibration.

        `embed`, this for every layer, `final_norm` and `unembed` together are `logits`.
        """
        ropes = self._ropes(positions, context_lens)
        return self._block(layer, layer, layer_params, x, ropes, attend, cache)

    def embed(self, params: Params, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns the input of the first block."""
        x = ops.embed(tokens, params["embed"]["w"])
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x

    def final_norm(self, params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the last block's output, normed: what `unembed` takes."""
        config = self.config
        scale = params["final_norm"]["scale"]
        return ops.rms_norm(x, scale, config.norm_eps, plus_one=config.norm_plus_one)

    def unembed(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns float32 logits of hidden states, soft cap included."""
        is_tied = self.config.tie_word_embeddings
        w = params["embed"]["w"] if is_tied else params["lm_head"]["w"]
        return ops.soft_cap(ops.head(hidden, w, is_tied=is_tied), self.config.final_soft_cap)

    def logits(self, params: Params, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T V"]:
        """Returns float32 logits for whole texts: causal attention, no cache.

        Pure, and safe under jit, vmap and grad. Texts of unequal lengths may be padded on the
        right: what stands after a token never changes it, save under the two rope scalings that
        look at the length T.

        Raises:
          TypeError: `tokens` are no integers.
          ValueError: they have no axis, or one that is not traced is outside the vocabulary.
        """
        tokens = inputs.read_tokens(tokens, self.config.vocab_size)
        params = inputs.examine(self, params)
        if tokens.ndim == 0 or tokens.size == 0:
            raise ValueError(f"tokens must be [..., T] with T >= 1, got {list(tokens.shape)}")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        context_lens = jnp.full_like(positions, tokens.shape[-1])
        hidden, _ = self.apply(
            params, tokens, positions, self.attend_densely, None, context_lens=context_lens
        )
        return self.unembed(params, hidden)

    def attend_densely(
        self, layer: Any, q: Array, k: Array, v: Array, cache: None, *, window: int | None
    ) -> tuple[Array, None]:
        """An `attend` over whole texts whose positions are 0..T-1; passes `cache` through."""
        config = self.config
        out = ops.dense_attention(
            q,
            k,
            v,
            sm_scale=config.sm_scale,
            window=window,
            cap=config.attention_soft_cap,
        )
        return out, cache

    @property
    def needs_context_lens(self) -> bool:
        """Whether `apply` wants `context_lens`."""
        ropes = (self.config.rope, self.config.rope_local)
        return any(r is not None and rope.needs_context_lens(r) for r in ropes)

    def _ropes(self, positions: Array, context_lens: Array | None) -> dict[str, Rope]:
        """Rope tables by layer type, each computed once."""
        config = self.config
        full = rope.tables(config.rope, config.head_dim, positions, context_lens)
        if config.rope_local is None:
            return {"full": full, "sliding": full}
        local = rope.tables(config.rope_local, config.head_dim, positions, context_lens)
        return {"full": full, "sliding": local}

    def _block(
        self,
        kind: int,
        layer: Any,
        layer_params: Mapping[str, Any],
        x: Array,
        ropes: dict[str, Rope],
        attend: Attend,
        cache: Any,
    ) -> tuple[Array, Any, Taps]:
        """Runs `layer` (perhaps traced) as a block of the same kind as layer `kind`."""
        bound = block.bind(self.config, kind, layer_params)

        def attend_here(q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
            return attend(layer, q, k, v, cache, window=self.config.window(kind))

        with jax.named_scope(f"layer{kind}" if isinstance(layer, int) else "layer"):
            return bound(x, ropes[self.config.layer_types[kind]], attend_here, cache)

    def _scan(
        self,
        layers: Mapping[str, Any],
        x: Array,
        ropes: dict[str, Rope],
        attend: Attend,
        cache: Any,
    ) -> tuple[Array, Any]:
        inputs.check_uniform(self.config)
        self._check_count(jax.tree.leaves(layers)[0].shape[0])

        def step(carry, xs):
            layer, layer_params = xs
            x, cache, _ = self._block(0, layer, layer_params, carry[0], ropes, attend, carry[1])
            return (x, cache), None

        indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(step, (x, cache), (indices, layers))
        return x, cache

    def _check_count(self, num_layers: int) -> None:
        if num_layers != self.config.num_layers:
            raise ValueError(
                f'params["layers"] has {num_layers} layers, the model {self.config.num_layers}'
            )


def stack_layers(config: ModelConfig, params: Params) -> dict[str, Any]:
    """Returns `params` with its tuple of layers stacked into [L, ...] leaves (a copy of them)."""
    inputs.check_uniform(config)
    forms = [_forms(layer) for layer in params["layers"]]
    for i, form in enumerate(forms):
        different = [name for name in form if form[name] != forms[0].get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"stacked layers must be alike, but {name} is {form[name]} in layer {i} and "
                f'{forms[0].get(name)} in layer 0; keep params["layers"] a tuple'
            )
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def _forms(layer: Params) -> dict[str, str]:
    """What each weight of a layer is kept in, by name: "int4-g32", "int4-g32 permuted", "float"."""
    forms = {}
    for path, leaf in flatten_weights(layer):
        form = str(format_of(leaf) or "float")
        if getattr(leaf, "perm", None) is not None:
            form += " permuted"
        forms[".".join(str(key.key) for key in path)] = form
    return forms

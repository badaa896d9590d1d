"""Laws of the Model class, on tiny random models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.model import RopeConfig
from jinfer.config.quant_format import QFormat
from jinfer.linear import ops
from jinfer.linear.qtensor import QTensor, dequantize, quantize
from jinfer.models.model import stack_layers

CLOSE = dict(rtol=1e-5, atol=1e-5)


def randomized(model, seed=0, dtype=jnp.float32):
    """Parameters with norms and biases off their neutral values."""
    params = model.init(jax.random.key(seed), dtype)
    rng = np.random.default_rng(seed)

    def shift(leaf):
        if leaf.ndim > 1:
            return leaf
        return leaf + jnp.asarray(rng.uniform(-0.4, 0.4, leaf.shape), dtype)

    return jax.tree.map(shift, params)


def logits_of(model, params, tokens):
    """Jitted: one program is much cheaper than its parts one by one."""
    return jax.jit(model.logits)(params, tokens)


def some_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, shape), jnp.int32)


def test_init_has_the_abstract_shapes_and_dtypes(tiny, variant):
    model = tiny(variant)
    for dtype in (jnp.float32, jnp.bfloat16):
        got = jax.eval_shape(lambda key, dtype=dtype: model.init(key, dtype), jax.random.key(0))
        assert got == model.abstract_params(dtype)
    params = model.init(jax.random.key(0), jnp.float32)
    got = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert got == model.abstract_params()


def test_layers_start_different(tiny):
    layers = tiny().init(jax.random.key(0))["layers"]
    assert not np.array_equal(layers[0]["attn"]["q"]["w"], layers[1]["attn"]["q"]["w"])
    assert not np.array_equal(layers[0]["attn"]["q"]["w"], layers[0]["attn"]["o"]["w"].T)


def test_the_model_is_a_static_argument(tiny):
    assert tiny() == tiny() and hash(tiny()) == hash(tiny())
    assert tiny() != tiny(num_layers=3)


def test_jit_compiles_once_and_equals_eager(tiny):
    model = tiny()
    params = randomized(model)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params, tokens):
        traces.append(tokens.shape)
        return model.logits(params, tokens)

    for seed in range(3):
        tokens = some_tokens(2, 9, seed=seed)
        # A new Model of the same config is the same program.
        got = logits(dataclasses.replace(model), params, tokens)
    assert got.shape == (2, 9, 61) and got.dtype == jnp.float32
    assert traces == [(2, 9)]
    np.testing.assert_allclose(got, model.logits(params, tokens), **CLOSE)


def test_stacked_layers_equal_a_tuple_of_them(tiny, variant):
    model = tiny(variant)
    params = randomized(model)
    tokens = some_tokens(2, 9)
    stacked = stack_layers(model.config, params)
    assert stacked["layers"]["attn"]["q"]["w"].shape == (2, 24, 32)
    np.testing.assert_allclose(
        logits_of(model, stacked, tokens), logits_of(model, params, tokens), **CLOSE
    )


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"sliding_window": 3, "layer_types": ("full", "sliding")},
            "alternates full and sliding",
        ),
        ({"dense_layers": (1,)}, r"layers \[1\] .* are dense"),
    ],
)
def test_layers_that_differ_cannot_be_stacked(tiny, overrides, reason):
    model = tiny("moe", **overrides)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=reason):
        stack_layers(model.config, params)
    alike = tiny("moe")
    stacked = stack_layers(alike.config, alike.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=reason):
        model.logits(stacked, some_tokens(1, 4))


def test_layers_quantized_in_different_forms_cannot_be_stacked(tiny):
    model = tiny("moe")
    params = model.init(jax.random.key(0))
    mlp = params["layers"][1]["mlp"]
    mlp["up"] = {"w": quantize(mlp["up"]["w"], QFormat.parse("int8-channel"))}
    with pytest.raises(
        ValueError, match=r"mlp\.up\.w is int8-channel in layer 1 and float in layer 0"
    ):
        stack_layers(model.config, params)
    params["layers"][0]["mlp"]["up"] = mlp["up"]
    assert stack_layers(model.config, params)["layers"]["mlp"]["up"]["w"].q.ndim == 4


def test_a_wrong_number_of_layers_is_refused(tiny):
    params = tiny().init(jax.random.key(0))
    with pytest.raises(ValueError, match="2 layers, the model 3"):
        tiny(num_layers=3).logits(params, some_tokens(1, 4))
    with pytest.raises(ValueError, match="2 layers, the model 3"):
        stacked = stack_layers(tiny().config, params)
        tiny(num_layers=3).logits(stacked, some_tokens(1, 4))


def test_parameters_that_do_not_fit_are_named(tiny):
    params = tiny("biased").init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"\['layers'\]\[0\]\['attn'\].* unknown \['b'\]"):
        tiny().logits(params, some_tokens(1, 4))
    with pytest.raises(ValueError, match=r"\['layers'\]\[0\]\['attn'\].* missing \['b'\]"):
        tiny("biased").logits(tiny().init(jax.random.key(0)), some_tokens(1, 4))


def test_vmap_equals_leading_axes(tiny, variant):
    model = tiny(variant)
    params = randomized(model)
    tokens = some_tokens(2, 3, 7)
    whole = logits_of(model, params, tokens)
    mapped = jax.jit(jax.vmap(jax.vmap(model.logits, (None, 0)), (None, 0)))(params, tokens)
    np.testing.assert_allclose(mapped, whole, **CLOSE)
    np.testing.assert_allclose(logits_of(model, params, tokens[1, 2]), whole[1, 2], **CLOSE)


def test_vmap_over_parameters(tiny):
    model = tiny()
    several = [randomized(model, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    tokens = some_tokens(2, 5)
    mapped = jax.jit(jax.vmap(model.logits, (0, None)))(stacked, tokens)
    for got, params in zip(mapped, several):
        np.testing.assert_allclose(got, logits_of(model, params, tokens), **CLOSE)


@pytest.mark.parametrize("variant", ["biased", "gemma"])  # experts: see test_moe.py
def test_gradients_equal_finite_differences(tiny, variant):
    model = tiny(variant)
    params = randomized(model)
    tokens = some_tokens(2, 6)
    direction = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape), leaf.dtype),
        params,
    )
    weights = jax.random.normal(jax.random.key(9), (2, 6, 61))

    @jax.jit
    def loss(params):
        return jnp.mean(model.logits(params, tokens) * weights)

    grads = jax.jit(jax.grad(loss))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert all(bool(jnp.abs(leaf).max() > 0) for leaf in jax.tree.leaves(grads["layers"][0]))
    slope = sum(
        float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction))
    )
    step = 3e-3
    ahead, behind = (
        float(loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)))
        for s in (step, -step)
    )
    # Third-order terms and float32 noise.
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=0.05, atol=2e-3)


def test_bfloat16_parameters_run_and_stay_near(tiny, variant):
    model = tiny(variant)
    params = randomized(model)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens = some_tokens(2, 9)
    hidden = jax.eval_shape(
        lambda p: model.apply(p, tokens, positions_of(tokens), model.attend_densely, None)[0], low
    )
    assert hidden.dtype == jnp.bfloat16
    got, want = logits_of(model, low, tokens), logits_of(model, params, tokens)
    assert got.dtype == jnp.float32
    error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    assert error < 0.1  # eight bits a weight, two layers; a switched expert costs more
    grads = jax.eval_shape(jax.grad(lambda p: model.logits(p, tokens).sum()), low)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


def test_chunks_with_a_cache_equal_the_whole(tiny, variant):
    """What the engine does, with a dense buffer in place of pages."""
    rope = RopeConfig(scaling="dynamic", factor=4.0, original_max_position=5)
    model = tiny(variant, **({"rope": rope} if variant == "biased" else {}))
    config = model.config
    params = randomized(model)
    tokens = some_tokens(1, 13)[0]

    def attend(layer, q, k, v, cache, *, window):
        keys, values, positions = cache
        keys = keys.at[layer, positions].set(k)
        values = values.at[layer, positions].set(v)
        out = ops.dense_attention(
            q,
            keys[layer],
            values[layer],
            sm_scale=config.sm_scale,
            window=window,
            cap=config.attention_soft_cap,
            q_positions=positions,
        )
        return out, (keys, values, positions)

    @jax.jit
    def run(params, tokens, positions, buffers):
        lens = jnp.full_like(positions, 13)
        return model.apply(
            params, tokens, positions, attend, (*buffers, positions), context_lens=lens
        )

    hidden = []
    buffers = [jnp.full((2, 20, 2, 8), 7.0) for _ in "kv"]  # what is not yet written must not count
    for chunk in (slice(0, 5), slice(5, 6), slice(6, 13)):
        positions = jnp.arange(13)[chunk]
        out, (*buffers, _) = run(params, tokens[chunk], positions, buffers)
        hidden.append(out)
    got = model.unembed(params, jnp.concatenate(hidden))
    np.testing.assert_allclose(got, logits_of(model, params, tokens), **CLOSE)


MIXED = {
    "gemma": {"layer_types": ("sliding", "full", "sliding", "full", "sliding")},
    "moe": {"dense_layers": (1, 3)},
}


@pytest.mark.parametrize("variant", MIXED)
def test_alike_blocks_are_traced_once(tiny, variant):
    """Windows and experts are those of each layer, the traced number finds its own cache."""
    model = tiny(variant, num_layers=5, **MIXED[variant])
    params = randomized(model)
    tokens = some_tokens(1, 11)[0]
    positions = positions_of(tokens)
    traced = []

    def attend(layer, q, k, v, cache, *, window):
        traced.append(window)
        out, _ = model.attend_densely(layer, q, k, v, None, window=window)
        return out, cache.at[layer].set(k)

    def run(params, **options):
        empty = jnp.zeros((5, 11, 2, 8))
        return model.apply(params, tokens, positions, attend, empty, **options)

    expected = jax.jit(run)(params)
    assert len(traced) == 5
    traced.clear()
    got = jax.jit(functools.partial(run, trace_once=jax.jit))(params)
    assert len(traced) == 2
    assert set(traced) == ({4, None} if variant == "gemma" else {None})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, expected)


def test_what_follows_a_token_does_not_change_it(tiny, variant):
    model = tiny(variant)
    params = randomized(model)
    tokens = some_tokens(1, 12)
    np.testing.assert_allclose(
        logits_of(model, params, tokens)[:, :5], logits_of(model, params, tokens[:, :5]), **CLOSE
    )


def test_a_window_hides_what_lies_before_it(tiny):
    """Layer 0 sees 4 tokens back, so that after one layer token 9 knows nothing of token 5."""
    model = tiny(num_layers=1, sliding_window=4)
    params = randomized(model)
    tokens = some_tokens(12)
    before = logits_of(model, params, tokens)
    for position, is_seen in ((5, False), (6, True)):
        changed = logits_of(model, params, tokens.at[position].set((tokens[position] + 1) % 61))
        assert bool(jnp.any(changed[9] != before[9])) is is_seen


def test_taps_are_the_inputs_of_the_linears(tiny, variant):
    model = tiny(variant)
    params = randomized(model)
    tokens = some_tokens(2, 9)

    @jax.jit
    def run(params):
        all_taps = []
        x = model.embed(params, tokens)
        for layer, layer_params in enumerate(params["layers"]):
            x, cache, taps = model.block_with_taps(
                layer, layer_params, x, positions_of(tokens), model.attend_densely, None
            )
            assert cache is None
            all_taps.append(taps)
        return model.unembed(params, model.final_norm(params, x)), all_taps

    got, all_taps = run(params)
    np.testing.assert_allclose(got, logits_of(model, params, tokens), **CLOSE)
    for layer_params, taps in zip(params["layers"], all_taps):
        check_taps(model.config, layer_params, taps)


def check_taps(config, params, taps):
    """Every weight has a tap that fits it, and "down" is what gate and up make of theirs."""
    names = {name for name in taps["mlp"] if name != "expert_ids"}
    assert names == set(params["mlp"])
    assert set(taps["attn"]) == {name for name in params["attn"] if "norm" not in name}
    for part in ("attn", "mlp"):
        for name in set(taps[part]) - {"expert_ids"}:
            assert taps[part][name].shape[-1] == params[part][name]["w"].shape[-2]
    mlp = params["mlp"]
    if "expert_ids" in taps["mlp"]:
        ids = taps["mlp"]["expert_ids"]
        assert ids.shape == (2, 9, 2)
        gate, up = (
            jnp.einsum("btd,btkdf->btkf", taps["mlp"][n], mlp[n]["w"][ids]) for n in ("gate", "up")
        )
    else:
        gate, up = (
            ops.linear(taps["mlp"][n], mlp[n]["w"], mlp[n].get("b")) for n in ("gate", "up")
        )
    np.testing.assert_allclose(taps["mlp"]["down"], ops.gated(config.activation, gate, up), **CLOSE)


@pytest.mark.parametrize("text", ["int8-channel", "int4-g8"])
def test_quantized_weights_compute_what_their_dense_values_do(tiny, text):
    """Every linear, experts and head too; a block of experts slices its QTensors."""
    model = tiny("moe", attention_bias=True, dense_layers=(0,))
    params = randomized(model)
    fmt = QFormat.parse(text)
    quantized = jax.tree.map_with_path(
        lambda path, leaf: (
            quantize(leaf, fmt) if path[-1].key == "w" and path[0].key != "embed" else leaf
        ),
        params,
    )
    dense = jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, QTensor) else leaf,
        quantized,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    assert isinstance(quantized["layers"][1]["mlp"]["down"]["w"], QTensor)
    tokens = some_tokens(2, 9)
    got, want = logits_of(model, quantized, tokens), logits_of(model, dense, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert jnp.abs(want - logits_of(model, params, tokens)).max() > 1e-3


def test_a_rope_that_needs_the_length_says_so_in_apply(tiny):
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_max_position=4)
    model = tiny(rope=rope)
    assert model.needs_context_lens and not tiny().needs_context_lens
    tokens = some_tokens(1, 6)
    with pytest.raises(ValueError, match="context_lens"):
        model.apply(
            model.init(jax.random.key(0)), tokens, positions_of(tokens), model.attend_densely, None
        )


def test_tracing_leaves_nothing_behind(tiny):
    """Blocks are bound inside the trace: no tracer outlives it, whatever order traces come in."""
    model = tiny("gemma", num_layers=1)
    params = model.init(jax.random.key(0))
    tokens = some_tokens(1, 5)
    with jax.checking_leaks():
        jitted = jax.jit(model.logits)(params, tokens)
    np.testing.assert_allclose(model.logits(params, tokens), jitted, **CLOSE)

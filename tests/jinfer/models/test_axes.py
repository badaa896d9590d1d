"""Every array of every model's parameters says what its axes are, quantized or not."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny_models import HF_COMMON, HF_FAMILIES, make_model

from jinfer.checkpoints.hf_config import config_from_hf
from jinfer.config.quant_format import QFormat
from jinfer.linear.placement import lay_out
from jinfer.linear.qtensor import quantize
from jinfer.models.axes import logical_axes
from jinfer.models.model import Model, stack_layers
from pallas_kernels import target

FORMATS = ("int4-g32", "int3-g32-asym", "int8-channel:dyn", "fp8-e4m3-block32", "nf4-g32-dq")


def family_model(family):
    return Model(config_from_hf({"model_type": family, **HF_COMMON, **HF_FAMILIES[family]}))


def sizes(config):
    """What each name stands for."""
    return {
        "vocab": {config.vocab_size},
        "embed": {config.hidden_size},
        "heads": {config.num_heads * config.head_dim},
        "kv_heads": {config.num_kv_heads * config.head_dim},
        "head_dim": {config.head_dim},
        "mlp": {config.intermediate_size, config.expert_intermediate_size},
        "experts": {config.num_experts},
        "layers": {config.num_layers},
    }


def pairs(params):
    """(path, array, its axes), for every array."""
    axes = jax.tree_util.tree_leaves_with_path(logical_axes(params))
    arrays = jax.tree.leaves(params)
    assert len(axes) == len(arrays)
    for (path, spec), x in zip(axes, arrays, strict=True):
        assert isinstance(spec, PartitionSpec) and len(spec) == x.ndim, path
        yield jax.tree_util.keystr(path), x, spec


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_every_axis_of_every_parameter_has_the_name_of_its_dimension(family):
    model = family_model(family)
    expected = sizes(model.config)
    for path, x, spec in pairs(model.abstract_params()):
        for name, size in zip(spec, x.shape, strict=True):
            assert size in expected[name], (path, spec)


def test_stacked_layers_have_their_axis_first():
    model = make_model(96)
    params = jax.eval_shape(
        lambda key: stack_layers(model.config, model.init(key)), jax.random.key(0)
    )
    specs = {path: spec for path, _, spec in pairs(params)}
    assert specs["['layers']['mlp']['down']['w']"] == PartitionSpec("layers", "mlp", "embed")
    assert specs["['layers']['attn_norm']['scale']"] == PartitionSpec("layers", "embed")
    moe = make_model(96, num_experts=4, num_experts_per_token=2, expert_intermediate_size=16)
    params = jax.eval_shape(lambda key: stack_layers(moe.config, moe.init(key)), jax.random.key(0))
    specs = {path: spec for path, _, spec in pairs(params)}
    up = PartitionSpec("layers", "experts", "embed", "mlp")
    assert specs["['layers']['mlp']['up']['w']"] == up


def rounded(family, text, where=None):
    """A family's params as shapes, linears quantized."""
    model = family_model(family)

    def visit(path, x):
        is_linear = path[0].key == "layers" and x.ndim >= 2 and "router" not in str(path)
        if not is_linear:
            return x
        # One expert after the other, as `quant` does it.
        one = functools.partial(quantize, fmt=QFormat.parse(text))
        return jax.vmap(one)(x) if x.ndim == 3 else one(x)

    def make(params):
        params = jax.tree_util.tree_map_with_path(visit, params)
        return params if where is None else lay_out(params, target.TARGETS[where])

    return model, jax.eval_shape(make, model.abstract_params())


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_arrays_of_quantized_weights_lie_along_the_axes_of_the_weight(family, text):
    model, params = rounded(family, text)
    expected = sizes(model.config)
    num_scales = 0
    for path, x, spec in pairs(params):
        if ".scale" not in path and ".zero" not in path and not path.endswith("w'].q"):
            continue
        num_scales += ".scale" in path
        for name, size in zip(spec, x.shape, strict=True):
            whole = expected[name] if name else {x.size}
            # Groups of inputs, blocks of outputs and bytes of bit streams are fewer than all.
            assert any(size <= n and (size == n or n > 1) for n in whole), (path, spec)
        if path.endswith("w'].q") and text != "int3-g32-asym":
            assert all(size in expected[name] for name, size in zip(spec, x.shape)), path
    assert num_scales


def test_scales_and_codes_of_one_weight():
    specs = {path: spec for path, _, spec in pairs(rounded("mixtral", "int4-g32")[1])}
    down = "['layers'][0]['mlp']['down']['w']"
    assert specs[down + ".q"] == specs[down + ".scale"] == PartitionSpec("experts", "mlp", "embed")
    specs = {path: spec for path, _, spec in pairs(rounded("llama", "int8-channel:dyn")[1])}
    o = "['layers'][0]['attn']['o']['w']"
    assert specs[o + ".q"] == PartitionSpec("heads", "embed")
    assert specs[o + ".scale"] == PartitionSpec(None, "embed")
    specs = {path: spec for path, _, spec in pairs(rounded("llama", "int4-g32", "h100")[1])}
    assert specs[o + ".q"] == PartitionSpec("embed", "heads")  # transposed for the kernel
    assert specs[o + ".scale"] == PartitionSpec("heads", "embed")
    specs = {path: spec for path, _, spec in pairs(rounded("llama", "nf4-g32-dq")[1])}
    assert specs[o + ".scale.codes"] == PartitionSpec("heads", "embed")
    assert specs[o + ".scale.absmax"] == PartitionSpec(None)
    assert specs[o + ".scale.offset"] == PartitionSpec()


def test_a_parameter_without_names_is_refused():
    with pytest.raises(ValueError, match=r"\['bias'\] of shape \[3\] has no named axes; add it"):
        logical_axes({"lm_head": {"bias": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"\['w'\] of shape \[3\] has no named axes"):
        logical_axes({"lm_head": {"w": jnp.ones(3)}})

"""Whole steps of a Llama-3-8B, weights to sampled tokens: `compile_kernels.py --model-step`.

Nothing is allocated: weights, pool and batch are shapes, in the layouts that an engine would give
them. Each case says which weights are quantized, so that no program may write a dense copy of one,
and that the KV pool must be updated in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import kv_write_cases

from jinfer.config import memory
from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.quant_format import QFormat
from jinfer.engine.device.programs import EngineSpec, Program, largest_steps
from jinfer.kv import cache as kv_cache
from jinfer.linear import placement, qtensor, weight
from jinfer.models.model import Model
from jinfer.steps.inputs import Weights
from pallas_kernels import hlo
from pallas_kernels.compile_only import CompileCase
from pallas_kernels.target import Target

MODEL = "llama-3-8b"
# Name, format of the linears, format of the KV pool, tokens a page.
VARIANTS = (
    ("bf16", None, "bfloat16", 64),
    ("int4", "int4-g128", "bfloat16", 64),
    ("fp8 + fp8 KV", "fp8-e4m3-channel:dyn", "float8_e4m3fn", 128),
)
DECODE_SEQS, DECODE_STEPS = (1, 64), 8
PREFILL_TOKENS, PREFILL_SEQS = (512, 2048), 8
POOL_TOKENS, MAX_TOKENS = 32768, 4096
QUICK_LAYERS = 2
HBM_BYTES = {"h100": 80e9, "v5e": 16e9, "v6e": 32e9, "tpu7x": 96e9}  # of one device
MAX_TEMP_BYTES = 1 << 30


def compile_cases(target: Target, *, quick: bool = False) -> tuple[CompileCase, ...]:
    """Returns the steps that fit the target's memory; quick: the largest, of two layers."""
    cases = []
    for name, linears, kv_dtype, page_size in VARIANTS:
        config = memory.PRESETS[MODEL]
        if quick:
            config = dataclasses.replace(
                config, num_layers=QUICK_LAYERS, layer_types=config.layer_types[:QUICK_LAYERS]
            )
        model = Model(config)
        params = abstract_params(model, linears)
        cache = CacheConfig(num_pages=POOL_TOKENS // page_size, page_size=page_size, dtype=kv_dtype)
        kv = jax.eval_shape(functools.partial(kv_cache.init, model.config, cache))
        resident = weight.num_bytes((params, kv))
        if resident + MAX_TEMP_BYTES > HBM_BYTES[target.name]:
            continue
        layouts = placement.layouts(params, target)
        sizes = [("decode", num_seqs, num_seqs) for num_seqs in DECODE_SEQS]
        sizes += [("forward", PREFILL_SEQS, num_tokens) for num_tokens in PREFILL_TOKENS]
        for kind, *limits in [sizes[1], sizes[-1]] if quick else sizes:
            program = largest_step(model, params, cache, kind, *limits)
            cases.append(_case(program, name, layouts))
    return tuple(cases)


def abstract_params(model: Model, linears: str | None) -> Any:
    """Returns the params tree as shapes, linears quantized and laid out for the current target."""

    def quantized(path: Any, x: jax.Array) -> Any:
        is_linear = "layers" in jax.tree_util.keystr(path) and x.ndim == 2
        if linears is None or not is_linear:
            return x
        return qtensor.quantize(x, QFormat.parse(linears), scale_dtype=jnp.bfloat16)

    def make(params: Any) -> Any:
        return placement.lay_out(jax.tree_util.tree_map_with_path(quantized, params))

    return jax.eval_shape(make, model.abstract_params(jnp.bfloat16))


def largest_step(
    model: Model, params: Any, cache: CacheConfig, kind: str, num_seqs: int, num_tokens: int
) -> Program:
    """Returns the largest step of a kind that an engine of these limits can need."""
    config = EngineConfig(
        max_model_len=MAX_TOKENS,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        num_decode_steps=DECODE_STEPS,
    )
    steps = largest_steps(EngineSpec(model, config, cache, Weights(params, None)))
    return next(step for step in steps if step.kind == kind)


def _case(program: Program, variant: str, layouts: Any) -> CompileCase:
    model, params, pool, inputs = program.args
    weights = {w.shape for w in weight.weights(params) if weight.is_weight(w)}
    names = {"decode": f"decode {program.sizes} steps={DECODE_STEPS}"}

    def call(params: Any, pool: Any, inputs: Any) -> Any:
        return program.fn(model, params, pool, inputs, **program.static)

    return CompileCase(
        name=f"{MODEL} x{model.config.num_layers} {variant}, "
        + names.get(program.kind, f"prefill {program.sizes}"),
        fn=jax.jit(call, donate_argnums=1),
        abstract_args=(params, pool, inputs),
        max_temp_bytes=MAX_TEMP_BYTES,
        never_written=hlo.dense_types(*weights) + kv_write_cases.dense_copies(pool.kv),
        min_alias_bytes=weight.num_bytes(pool.kv),
        never_copied=kv_write_cases.hlo_types(pool.kv),
        layouts=layouts,
    )

"""Whole steps of a Llama-3-8B, weights to sampled tokens: `compile_kernels.py --model-step`.

Nothing is allocated: weights, pool and batch are shapes, in the layouts that an engine would give
them. Each case says which weights are quantized, so that no program may write a dense copy of one,
and that the KV pool must be updated in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kv_write_cases
import numpy as np

from jinfer.config import memory
from jinfer.config.cache import CacheConfig
from jinfer.config.quant_format import QFormat
from jinfer.kv import cache as kv_cache
from jinfer.linear import layouts as formats
from jinfer.linear import prepared as qkernels
from jinfer.linear import qtensor, weight
from jinfer.models.model import Model
from jinfer.sampling.args import pack_args
from jinfer.sampling.state import init_state
from jinfer.steps import decode
from jinfer.steps import forward as steps
from jinfer.steps.batch import DecodeBatch, StepBatch
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
        make = functools.partial(_case, model, params, formats.layouts(params, target), kv, name)
        for num_seqs in DECODE_SEQS[-1:] if quick else DECODE_SEQS:
            cases.append(make("decode", *decode_call(model, kv, num_seqs)))
        for num_tokens in PREFILL_TOKENS[-1:] if quick else PREFILL_TOKENS:
            cases.append(make("prefill", *prefill_call(model, kv, num_tokens)))
    return tuple(cases)


def abstract_params(model: Model, linears: str | None) -> Any:
    """Returns the params tree as shapes, linears quantized and laid out for the current target."""

    def quantized(path: Any, x: jax.Array) -> Any:
        is_linear = "layers" in jax.tree_util.keystr(path) and x.ndim == 2
        if linears is None or not is_linear:
            return x
        return qtensor.quantize(x, QFormat.parse(linears), scale_dtype=jnp.bfloat16)

    def make(params: Any) -> Any:
        return qkernels.prepare_params(jax.tree_util.tree_map_with_path(quantized, params))

    return jax.eval_shape(make, model.abstract_params(jnp.bfloat16))


def decode_call(model: Model, kv: Any, num_seqs: int) -> tuple[str, Callable[..., Any], tuple]:
    def call(params: Any, kv: Any, state: Any, batch: Any, args: Any, num_steps: Any) -> Any:
        return decode.decode_loop(
            *(model, params, kv, state, batch, args, num_steps), max_steps=DECODE_STEPS
        )

    batch = DecodeBatch.padding(num_seqs, max_pages=MAX_TOKENS // kv.page_size, num_rows=num_seqs)
    state = _state(model, num_seqs)
    args = (state, batch, pack_args([], num_seqs), np.int32(1))
    return f"S={num_seqs} steps={DECODE_STEPS}", call, args


def prefill_call(model: Model, kv: Any, num_tokens: int) -> tuple[str, Callable[..., Any], tuple]:
    def call(params: Any, kv: Any, state: Any, batch: Any, args: Any, sampled: Any) -> Any:
        return steps.forward_step(model, params, kv, state, batch, args, sampled)

    batch = StepBatch.padding(
        num_tokens,
        PREFILL_SEQS,
        max_pages=MAX_TOKENS // kv.page_size,
        num_slots=kv.num_slots,
        num_rows=PREFILL_SEQS,
    )
    state = _state(model, PREFILL_SEQS)
    args = (state, batch, pack_args([], PREFILL_SEQS), np.zeros(PREFILL_SEQS, np.bool_))
    return f"T={num_tokens} S={PREFILL_SEQS}", call, args


def _state(model: Model, num_rows: int) -> Any:
    make = functools.partial(init_state, num_rows, model.config.vocab_size)
    return jax.eval_shape(make)


def _case(
    model: Model,
    params: Any,
    layouts: Any,
    kv: Any,
    variant: str,
    kind: str,
    shape: str,
    call: Callable[..., Any],
    rest: tuple,
) -> CompileCase:
    weights = {w.shape for w in weight.weights(params) if weight.is_weight(w)}
    return CompileCase(
        name=f"{MODEL} x{model.config.num_layers} {variant}, {kind} {shape}",
        fn=jax.jit(call, donate_argnums=(1, 2)),
        abstract_args=(params, kv, *rest),
        max_temp_bytes=MAX_TEMP_BYTES,
        never_written=hlo.dense_types(*weights) + kv_write_cases.dense_copies(kv),
        min_alias_bytes=weight.num_bytes(kv),
        never_copied=kv_write_cases.hlo_types(kv),
        layouts=layouts,
    )

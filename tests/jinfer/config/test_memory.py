"""The planner's arithmetic against published parameter counts and hand-worked bytes."""

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinfer.config import memory
from jinfer.config.memory import PRESETS
from jinfer.linear import qtensor

GIB = 2**30

# Published parameter counts (model cards and safetensors headers on the hub).
NUM_PARAMS = {
    "smollm2": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


def test_every_preset_has_its_published_parameter_count():
    assert {name: memory.num_params(config) for name, config in PRESETS.items()} == NUM_PARAMS


def test_llama_2_7b_at_4096_tokens_in_bf16_takes_2_gib():
    assert memory.kv_bytes(PRESETS["llama-2-7b"], 4096, "bfloat16") == 2 * GIB


def test_llama_2_70b_with_8_kv_heads_takes_1_25_gib():
    assert PRESETS["llama-2-70b"].num_kv_heads == 8
    assert memory.kv_bytes(PRESETS["llama-2-70b"], 4096, "bfloat16") == 1.25 * GIB


def test_smollm2_takes_23040_bytes_a_token_in_16_bits():
    assert memory.kv_bytes(PRESETS["smollm2"], 1, "float16") == 23040


def test_int4_group_128_takes_half_a_byte_and_a_scale_per_group():
    assert memory.quantized_bytes((256, 10), "int4-g128") == 256 * 10 // 2 + 2 * 10 * 2
    assert memory.quantized_bytes((256, 10), "int4-g128-asym") == 1280 + 40 + 2 * 10 // 2
    per_param = memory.quantized_bytes((4096, 4096), "int4-g128") / 4096**2
    assert per_param == 0.5 + 2 / 128


def test_a_short_last_group_has_its_own_scale():
    assert memory.quantized_bytes((576, 8), "int4-g128") == 576 * 8 // 2 + 5 * 8 * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8-channel", 64 * 32 + 32 * 2),
        ("int8-tensor", 64 * 32 + 2),
        ("fp8-e4m3-channel:dyn", 64 * 32 + 32 * 2),
        ("int3-g32", 64 * 32 * 3 // 8 + 2 * 32 * 2),
        ("nf4-g64", 64 * 32 // 2 + 32 * 2),
    ],
)
def test_formats_by_hand(text, expected):
    assert memory.quantized_bytes((64, 32), text) == expected
    assert memory.quantized_bytes((5, 64, 32), text) == 5 * expected  # experts


@pytest.mark.parametrize(
    "text", ["int4-g0", "int9-g128", "int4-g", "awq", "", "int4-g128-", "nf4-g64-db"]
)
def test_an_unknown_format_is_refused_by_name(text):
    with pytest.raises(ValueError, match="quantization must be fp8, int8, nf4, or read like"):
        memory.quantized_bytes((64, 32), text)


@pytest.mark.parametrize(
    "text",
    [
        "int4-g128",
        "int4-g64-asym",
        "int8-channel:dyn",
        "int8-tensor",
        "int3-g32",
        "int3-g32-asym",
        "int5-channel",
        "fp8-e4m3-channel:dyn",
        "fp8-e5m2-tensor",
        "fp8-e4m3-block32",
        "nf4-g64",
    ],
)
def test_the_planner_and_the_quantized_tensor_agree(text):
    fmt = qtensor.QFormat.parse(text)
    w = jnp.ones((100, 48), jnp.float32)
    stored = qtensor.quantize(w, fmt, scale_dtype=jnp.bfloat16)
    assert memory.quantized_bytes(w.shape, text) == stored.nbytes


def test_quantization_leaves_embeddings_norms_and_head_alone():
    config = PRESETS["llama-3-8b"]
    dense = memory.part_bytes(config, "bfloat16")
    int4 = memory.part_bytes(config, "bfloat16", "int4-g128")
    changed = {part for part in dense if dense[part] != int4[part]}
    assert changed == {"attention", "mlp"}
    assert int4["mlp"] / dense["mlp"] == pytest.approx((0.5 + 2 / 128) / 2)


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match=r"dtype must be one of .*got 'bf17'"):
        memory.weight_bytes(PRESETS["smollm2"], "bf17")


@given(
    budget=st.integers(0, 10**11),
    page_size=st.sampled_from([1, 16, 64]),
    name=st.sampled_from(sorted(PRESETS)),
)
def test_as_many_pages_as_fit_and_no_more(budget, page_size, name):
    config = PRESETS[name]
    pages = memory.num_pages(config, page_size=page_size, dtype="bfloat16", budget_bytes=budget)
    one = memory.kv_bytes(config, page_size, "bfloat16")
    assert pages * one <= budget < (pages + 1) * one


def test_no_more_pages_than_the_tokens_that_can_be_live():
    pages = memory.num_pages(
        PRESETS["smollm2"], page_size=16, dtype="float32", budget_bytes=10 * GIB, max_tokens=100
    )
    assert pages == 7


def test_the_budget_of_an_accelerator_is_its_share_less_what_is_used():
    budget = memory.kv_budget_bytes(
        device_bytes=80 * GIB, used_bytes=16 * GIB, gpu_memory_utilization=0.9
    )
    assert budget == 56 * GIB
    assert (
        memory.kv_budget_bytes(device_bytes=10 * GIB, used_bytes=16 * GIB, reserved_bytes=GIB) < 0
    )
    with pytest.raises(ValueError, match="gpu_memory_utilization must lie in"):
        memory.kv_budget_bytes(device_bytes=GIB, used_bytes=0, gpu_memory_utilization=1.5)


@pytest.mark.parametrize(
    ("host_gib", "used_gib", "budget_gib"), [(32, 0.5, 1), (32, 6, 6), (32, 16, 8), (2, 0.5, 0.5)]
)
def test_a_cpu_gives_the_pool_as_much_as_the_weights_within_a_quarter_of_its_memory(
    monkeypatch, host_gib, used_gib, budget_gib
):
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: host_gib * GIB)
    budget = memory.kv_budget_bytes(device_bytes=None, used_bytes=int(used_gib * GIB))
    assert budget == budget_gib * GIB


def test_the_host_has_memory():
    assert memory.host_memory_bytes() > 2**28


def test_a_plan_adds_up():
    config = PRESETS["llama-3-8b"]
    plan = memory.plan(config, context=4096, batch=8, quantization="int4-g128")
    assert plan.num_params == NUM_PARAMS["llama-3-8b"]
    assert plan.weight_bytes == sum(plan.part_bytes.values())
    assert plan.kv_bytes == 8 * plan.kv_bytes_per_sequence == 8 * 4096 * plan.kv_bytes_per_token
    assert plan.kv_bytes_per_token == 131072
    assert plan.total_bytes == plan.weight_bytes + plan.kv_bytes + plan.temp_bytes
    half = memory.plan(config, context=4096, batch=8, kv_dtype="int8")
    assert half.kv_bytes / plan.kv_bytes == (128 + 4) / 256  # a scale beside 128 codes


def test_dense_layers_of_a_mixture_count_as_dense():
    moe = PRESETS["mixtral-8x7b"]
    mixed = dataclasses.replace(moe, dense_layers=(0,))
    router, expert = 8 * 4096, 3 * 4096 * 14336
    assert memory.num_params(moe) - memory.num_params(mixed) == router + 7 * expert


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("80GiB", 80 * GIB), ("1.5 gib", 1.5 * GIB), ("2G", 2 * 10**9), ("1kb", 1000)],
)
def test_sizes_read_as_written(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "80 GiBB", "1T"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="a size must read like"):
        memory.parse_size(text)


def test_sizes_print_in_binary_units():
    assert memory.format_size(2 * GIB) == "2.00 GiB"
    assert memory.format_size(23040) == "22.50 KiB"
    assert memory.format_size(12) == "12 B"

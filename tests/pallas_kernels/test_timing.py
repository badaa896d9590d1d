"""The stopwatch: every call is made, none is merged with another or optimized away."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compile_only, timing
from pallas_kernels.quant_matmul import quant_matmul


def test_a_chain_calls_as_often_as_asked_and_walks_over_the_inputs():
    seen = []

    def f(x, i):
        jax.debug.callback(lambda i: seen.append(int(i)), i)
        return x + 1.0

    sets = [(jnp.zeros(4), jnp.int32(i)) for i in range(3)]
    timed = timing.measure(f, sets, calls=2, samples=3)
    jax.effects_barrier()
    assert len(seen) == (2 + 8) * (2 + 3)  # short and long, twice to warm up and three samples
    assert {i: seen.count(i) for i in range(3)} == {0: 20, 1: 20, 2: 10}
    assert timed.samples == 3 and timed.low <= timed.seconds <= timed.high


@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_equal_calls_are_neither_merged_nor_dropped(name, monkeypatch):
    if reason := compile_only.why_not_compile(name):
        pytest.skip(reason)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    layout = "nk" if name == "h100" else "kn"
    args = (
        jax.ShapeDtypeStruct((16, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((256, 256), jnp.int4),
        jax.ShapeDtypeStruct((2, 256), jnp.bfloat16),
    )
    with compile_only.compile_target(name) as compiler:
        program = timing.chain(functools.partial(quant_matmul, layout=layout), 5)
        text = compiler.compile(program, [args]).executable.as_text()
    calls = re.findall(r'custom_call_target="(?:mosaic_gpu|tpu_custom_call)', text)
    assert len(calls) == 5


def test_the_number_of_calls_follows_the_time_of_one():
    sets = [(jnp.zeros((8, 8)),), (jnp.ones((8, 8)),)]
    assert timing.measure(lambda x: x + 1.0, sets, samples=2).samples == 2


def test_a_cpu_is_no_accelerator():
    assert timing.describe_accelerator() is None


def test_what_is_timed_is_traced_once_a_program_however_often_it_is_called():
    traced = []

    def f(x):
        traced.append(x)
        return x + 1.0

    timing.measure(f, [(jnp.zeros(4),)], calls=4, samples=2)
    assert len(traced) <= 2

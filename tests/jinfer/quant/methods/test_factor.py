"""Gram matrices and inverse Cholesky factors: accuracy, retries, and the same bits every time."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.quant.methods.factor import DAMP_RETRIES, gram, inverse_cholesky, inverse_factor

factor = jax.jit(inverse_factor, static_argnums=1)


def activations(tokens, width, seed=0):
    """Correlated inputs with features of very different size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    return (rng.normal(size=(tokens, width)) @ mix * np.exp(rng.normal(size=width))).astype("f4")


def test_gram_sums_every_token_once():
    x = activations(1100, 40).reshape(2, 550, 40)
    expected = np.einsum("bti,btj->ij", x.astype("f8"), x.astype("f8"))
    np.testing.assert_allclose(jax.jit(gram)(x), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", [5, 128, 200, 300])
def test_the_factor_is_that_of_the_damped_inverse(size):
    h = gram(activations(2 * size, size))
    upper, damp, retries, fell_back = factor(h, 0.01)
    h64 = np.asarray(h, np.float64)
    damped = h64 + 0.01 * np.mean(np.diag(h64)) * np.eye(size)
    # The textbook's route: factor, invert, factor again. Units: H / mean(diag H).
    expected = np.linalg.cholesky(np.linalg.inv(damped / np.mean(np.diag(h64)))).T
    np.testing.assert_allclose(upper, expected, atol=2e-5 * np.abs(expected).max())
    assert np.all(np.asarray(upper)[np.tril_indices(size, -1)] == 0)
    assert (float(damp), int(retries), bool(fell_back)) == (pytest.approx(0.01), 0, False)


def test_inverse_cholesky_says_nan_where_there_is_none():
    bad = jnp.eye(200).at[150, 150].set(-1.0)
    assert not np.all(np.isfinite(np.asarray(inverse_cholesky(bad))))


def test_an_indefinite_hessian_gets_more_damping():
    h = np.eye(64, dtype="f4")
    h[3, 3] = -0.03  # positive again once 5 % is added
    _, damp, retries, fell_back = factor(jnp.asarray(h), 0.01)
    assert int(retries) == 1 and not bool(fell_back)
    assert float(damp) == pytest.approx(0.05)


def test_the_last_try_lifts_the_diagonal():
    h = np.eye(64, dtype="f4")
    h[3, 3] = -5.0
    _, _, retries, fell_back = factor(jnp.asarray(h), 0.01)
    assert int(retries) == len(DAMP_RETRIES) - 1 and not bool(fell_back)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_hopeless_hessian_falls_back_to_the_identity(bad):
    h = jnp.eye(64).at[0, 1].set(bad)
    upper, _, _, fell_back = factor(h, 0.01)
    assert bool(fell_back)
    np.testing.assert_array_equal(upper, np.eye(64))


SAME_BITS = """
import hashlib
import jax, numpy as np
from jinfer.config.quant_format import QFormat
from jinfer.quant.methods.awq import search_scales
from jinfer.quant.calibrate import measure, measure_drift
from jinfer.quant.methods.factor import dot_transposed, gram
from jinfer.quant.methods.gptq import quantize_gptq
rng = np.random.default_rng(0)
x = rng.normal(size=(2048, 384)).astype("f4") * np.exp(rng.normal(size=384)).astype("f4")
h = jax.jit(gram)(x)
w = rng.normal(size=(384, 320)).astype("f4")
fmt = QFormat.parse("int4-g64-asym")
q, info = quantize_gptq(w, h, fmt, scales="hessian")
chunks = x.reshape(2, 8, 128, 384)
stats = measure(chunks)
drift = measure_drift(chunks, np.tanh(chunks))
scales = search_scales(w, h, stats.mean_abs, fmt)
# [K, N] x [K, M], where XLA's product of a^T as it lies has other last bits on two threads: the
# first three with AVX2, the last with AVX-512.
shapes = [(128, 128, 192), (32, 640, 192), (512, 128, 1024), (384, 384, 576)]
products = [
    jax.jit(dot_transposed)(*(rng.normal(size=(k, s)).astype("f4") for s in (n, m)))
    for k, n, m in shapes
]
for leaf in [h, *jax.tree.leaves((q, stats, drift, scales)), *products]:
    print(hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest())
"""


def same_bits(script, num_threads, isa):
    """What a script prints in a new process with so many threads (XLA reads NPROC, not the mask of
    CPUs) and the matmuls of such CPUs."""
    env = {"JAX_PLATFORMS": "cpu", "NPROC": str(num_threads), "DNNL_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])  # at most: a lesser CPU uses what it has
@pytest.mark.thorough
def test_one_thread_and_more_give_the_same_bits(isa):
    one, two, three = (same_bits(SAME_BITS, threads, isa) for threads in (1, 2, 3))
    assert one == two == three
    assert len(one) == 16

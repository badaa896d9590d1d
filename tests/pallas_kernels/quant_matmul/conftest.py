"""One list of cases for every rung, and the specification in float64 numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One product; `gpu`, `tpu` are tile fields for the kernels, `cores` what shares the work."""

    name: str
    num_rows: int = 8
    num_inputs: int = 256
    num_outputs: int = 128
    group: int | None = 128  # None: per channel
    codes: str = "int4"
    zeros: str | None = None  # dtype of the zero points
    scales: str = "bfloat16"
    gpu: dict = dataclasses.field(default_factory=dict)
    tpu: dict = dataclasses.field(default_factory=dict)
    cores: int = 132

    @property
    def num_groups(self) -> int:
        return 1 if self.group is None else -(-self.num_inputs // self.group)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """x [M, K] f64 values that bf16 holds; q [K, N], scale, zero as the op takes them."""

    x: np.ndarray
    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    group: int

    def arrays(self, x_dtype="bfloat16"):
        x = jnp.asarray(self.x.astype(np.dtype(getattr(ml_dtypes, x_dtype, x_dtype))))
        zero = None if self.zero is None else jnp.asarray(self.zero)
        return x, jnp.asarray(self.q), jnp.asarray(self.scale), zero

    def expected(self) -> np.ndarray:
        return self.x @ self.weight()

    def weight(self) -> np.ndarray:
        w = np.zeros(self.q.shape)
        for k in range(w.shape[0]):
            g = k // self.group
            zero = 0 if self.zero is None else self.zero[g].astype(np.float64)
            w[k] = (self.q[k].astype(np.float64) - zero) * self.scale[g].astype(np.float64)
        return w


CASES = (
    Case(name="one row", num_rows=1),
    Case(name="one group", num_inputs=128, num_rows=2),
    Case(name="rows past the tile", num_rows=13, gpu={"block_m": 8}, tpu={"block_m": 8}),
    Case(name="several row tiles", num_rows=40, gpu={"block_m": 16}, tpu={"block_m": 16}),
    Case(name="outputs past the tile", num_outputs=160),
    Case(name="K not a multiple of the split", num_inputs=640, num_outputs=256, cores=3,
         gpu={"splits": 4, "stages": 2}),
    Case(name="more tiles than blocks", num_rows=16, num_inputs=384, num_outputs=384, cores=2,
         gpu={"stages": 2}),
    Case(name="blocks that end inside a tile", num_rows=24, num_inputs=384, num_outputs=384,
         cores=4, gpu={"splits": 8, "block_m": 16}),
    Case(name="K not a multiple of the stage", num_inputs=320, group=64, gpu={"block_k": 128}),
    Case(name="groups of 32", group=32),
    Case(name="groups of 64", group=64, gpu={"block_k": 256}),
    Case(name="groups of 256", group=256, gpu={"block_k": 64}),
    Case(name="last group is short", num_inputs=320, group=128, gpu={"block_k": 128}),
    Case(name="per channel", group=None),
    Case(name="per channel with zeros", group=None, zeros="int8"),
    Case(name="zeros", zeros="int8"),
    Case(name="float zeros", group=64, zeros="float32", scales="float32"),
    Case(name="zeros of unsigned codes", codes="uint4", zeros="uint8"),
    Case(name="unsigned codes without zeros", codes="uint4"),
    Case(name="int8", codes="int8"),
    Case(name="int8 with zeros", codes="int8", group=64, zeros="int8"),
    Case(name="int8 in groups of 32", codes="int8", group=32, num_rows=3),
    Case(name="e4m3", codes="float8_e4m3fn", scales="float32"),
    Case(name="e4m3 in groups of 32", codes="float8_e4m3fn", group=32, num_rows=3),
    Case(name="e4m3 in groups of 64", codes="float8_e4m3fn", group=64, num_rows=3),
    Case(name="e5m2", codes="float8_e5m2"),
    Case(name="e4m3 per channel", codes="float8_e4m3fn", group=None),
    Case(name="f16 scales", scales="float16"),
    Case(name="scaled weights", num_rows=24, group=32, zeros="int8", cores=2,
         gpu={"scale_weights": True, "splits": 3, "block_m": 16}, tpu={"scale_weights": True}),
    Case(name="three warpgroups", num_outputs=192, gpu={"warpgroups": 3}),
)  # fmt: skip


def build(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    k, n, g = case.num_inputs, case.num_outputs, case.num_groups
    x = rng.standard_normal((case.num_rows, k)).astype(ml_dtypes.bfloat16).astype(np.float64)
    x[0, :3] *= 50  # an outlier, as activations have
    codes = np.dtype(getattr(ml_dtypes, case.codes, case.codes))
    if case.codes.startswith("float8"):
        q = rng.standard_normal((k, n)) * 2
    else:
        info = ml_dtypes.iinfo(codes)
        q = rng.integers(info.min, info.max + 1, (k, n))
    scale = rng.uniform(0.5, 1.5, (g, n)) * 10.0 ** rng.integers(-3, 1, (g, 1))
    zero = None
    if case.zeros == "float32":
        zero = rng.uniform(-4, 4, (g, n)).astype(np.float32)
    elif case.zeros is not None:
        low, high = (0, 16) if case.zeros == "uint8" else (-8, 8)
        zero = rng.integers(low, high, (g, n)).astype(case.zeros)
    scales = np.dtype(getattr(ml_dtypes, case.scales, case.scales))
    return Inputs(x, q.astype(codes), scale.astype(scales), zero, case.group or k)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))


@pytest.fixture
def inputs(case):
    return build(case)


@pytest.fixture
def relative_error():
    def measure(y, expected) -> float:
        y = np.asarray(y).astype(np.float64)
        assert y.shape == expected.shape
        return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

    return measure

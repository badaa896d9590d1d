"""One list of cases for every rung, and the specification in float64 numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One product; scales "tensor", "channel", "block" (128 x 128) or "rows" (128 x 1)."""

    name: str
    num_rows: int = 8
    num_inputs: int = 256
    num_outputs: int = 256
    scales: str = "block"
    dtypes: tuple[str, str] = ("float8_e4m3fn", "float8_e4m3fn")
    gpu: dict = dataclasses.field(default_factory=dict)
    tpu: dict = dataclasses.field(default_factory=dict)
    cores: int = 132

    @property
    def block(self) -> int | None:
        return 128 if self.scales in ("block", "rows") else None


@dataclasses.dataclass(frozen=True)
class Inputs:
    x: np.ndarray
    w: np.ndarray
    x_scale: np.ndarray
    w_scale: np.ndarray
    block: int | None

    def arrays(self):
        return tuple(map(jnp.asarray, (self.x, self.w, self.x_scale, self.w_scale)))

    def expected(self) -> np.ndarray:
        x, w = self.x.astype(np.float64), self.w.astype(np.float64)
        if self.block is None:
            return (x * self.x_scale) @ (w * self.w_scale)
        sums = np.zeros((x.shape[0], w.shape[1]))
        for k in range(x.shape[1]):
            b = k // self.block
            for n in range(w.shape[1]):
                column = n if self.w_scale.shape[1] == w.shape[1] else n // self.block
                sums[:, n] += x[:, k] * self.x_scale[:, b] * w[k, n] * self.w_scale[b, column]
        return sums


CASES = (
    Case(name="one row", num_rows=1),
    Case(name="rows past the tile", num_rows=13, gpu={"block_m": 8}),
    Case(name="several row tiles", num_rows=40, num_inputs=128, gpu={"block_m": 16},
         tpu={"block_m": 32}),
    Case(name="one block", num_inputs=128, num_outputs=128),
    Case(name="scales expanded along the outputs", scales="rows"),
    Case(name="outputs past the block", num_outputs=160),
    Case(name="K not a multiple of the split", num_inputs=640, cores=3,
         gpu={"splits": 4, "stages": 2}),
    Case(name="more tiles than blocks", num_rows=16, num_inputs=384, num_outputs=384, cores=2,
         gpu={"stages": 2}),
    Case(name="per tensor", scales="tensor"),
    Case(name="per token and channel", scales="channel", num_rows=12),
    Case(name="e5m2 weights", scales="channel", dtypes=("float8_e4m3fn", "float8_e5m2")),
    Case(name="e5m2 weights in blocks", dtypes=("float8_e4m3fn", "float8_e5m2")),
    Case(name="last block is short", num_inputs=192, num_outputs=64),
    Case(name="many rows", num_rows=100),
)  # fmt: skip


def build(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    m, k, n = case.num_rows, case.num_inputs, case.num_outputs
    x_type, w_type = (np.dtype(getattr(ml_dtypes, t)) for t in case.dtypes)
    x = (rng.standard_normal((m, k)) * 40).astype(x_type)
    w = (rng.standard_normal((k, n)) * 4).astype(w_type)
    blocks, columns = -(-k // 128), -(-n // 128)
    x_shape, w_shape = {
        "tensor": ((), ()),
        "channel": ((m, 1), (1, n)),
        "block": ((m, blocks), (blocks, columns)),
        "rows": ((m, blocks), (blocks, n)),
    }[case.scales]
    x_scale, w_scale = (
        np.asarray(rng.uniform(0.5, 1.5, s) * 10.0 ** rng.integers(-2, 2, s), np.float32)
        for s in (x_shape, w_shape)
    )
    return Inputs(x, w, x_scale, w_scale, case.block)


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

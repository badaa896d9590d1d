"""Rotary tables: laws that hold without an oracle (test_parity.py has the values)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.config.model import RopeConfig
from jinfer.models import rope

POSITIONS = jnp.array([[0, 1, 2, 7, 30]])
PLAIN = RopeConfig(theta=100.0)
SCALED = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0, original_max_position=8),
    "llama3": dict(factor=8.0, original_max_position=32),
    "yarn": dict(factor=8.0, original_max_position=32),
    "longrope": dict(
        factor=4.0, original_max_position=8, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4
    ),
}


def angle_tables(config, lens=None, positions=POSITIONS):
    if lens is not None:
        lens = jnp.broadcast_to(jnp.asarray(lens), positions.shape)
    cos, sin = rope.tables(config, 8, positions, lens)
    return np.asarray(cos), np.asarray(sin)


def test_plain_tables_are_the_textbooks():
    cos, sin = angle_tables(PLAIN)
    angles = np.asarray(POSITIONS)[..., None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)
    assert cos.dtype == np.float32


def test_partial_rotation_has_fewer_columns():
    cos, _ = angle_tables(dataclasses.replace(PLAIN, partial_factor=0.5))
    assert cos.shape == (1, 5, 2)


@pytest.mark.parametrize("scaling", SCALED)
def test_position_zero_is_not_turned(scaling):
    config = RopeConfig(theta=100.0, scaling=scaling, **SCALED[scaling])
    cos, sin = angle_tables(config, lens=31)
    np.testing.assert_allclose(cos[0, 0], rope.attention_factor(config), rtol=1e-6)
    np.testing.assert_array_equal(sin[0, 0], 0)


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(scaling):
    config = RopeConfig(theta=100.0, scaling=scaling, **{**SCALED[scaling], "factor": 1.0})
    for got, want in zip(angle_tables(config), angle_tables(PLAIN)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_linear_stretches_positions():
    config = RopeConfig(theta=100.0, scaling="linear", factor=4.0)
    want = angle_tables(PLAIN, positions=POSITIONS)
    got = angle_tables(config, positions=POSITIONS * 4)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_scalings_by_length_act_only_beyond_the_trained_length(scaling):
    config = RopeConfig(theta=100.0, scaling=scaling, **SCALED[scaling])
    factor = rope.attention_factor(config)
    plain = angle_tables(PLAIN)[0] * factor
    np.testing.assert_allclose(angle_tables(config, lens=8)[0], plain, atol=1e-5)
    assert np.abs(angle_tables(config, lens=9)[0] - plain).max() > 1e-2


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_a_tokens_table_depends_on_its_own_length_alone(scaling):
    config = RopeConfig(theta=100.0, scaling=scaling, **SCALED[scaling])
    mixed = angle_tables(config, lens=[[3, 40, 8, 9, 31]])[1]
    for i, length in enumerate([3, 40, 8, 9, 31]):
        np.testing.assert_array_equal(mixed[0, i], angle_tables(config, lens=length)[1][0, i])


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_scalings_by_length_ask_for_the_length(scaling):
    config = RopeConfig(theta=100.0, scaling=scaling, **SCALED[scaling])
    with pytest.raises(ValueError, match="context_lens"):
        angle_tables(config)


def test_longrope_lists_must_fit_the_head():
    config = RopeConfig(scaling="longrope", **{**SCALED["longrope"], "long_factor": (2.0,) * 3})
    with pytest.raises(ValueError, match="long_factor must have 4 entries, got 3"):
        angle_tables(config, lens=31)


def test_a_stated_attention_factor_wins():
    for scaling in ("yarn", "longrope"):
        config = RopeConfig(scaling=scaling, **SCALED[scaling], attention_factor=1.7)
        assert rope.attention_factor(config) == 1.7

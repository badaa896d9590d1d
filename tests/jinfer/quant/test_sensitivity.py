"""Widths by sensitivity: bytes go where they take away most, and never more than there are."""

import itertools
import math

import jax
import numpy as np
import pytest

from jinfer.quant import sensitivity
from jinfer.quant.evaluate import evaluate
from jinfer.quant.pipeline import quantize_model
from jinfer.quant.recipe import Recipe, make_method
from jinfer.quant.sensitivity import WIDTHS, Unit, grow

WINDOWS = np.random.default_rng(0).integers(0, 96, (2, 32)).astype(np.int32)


def test_bytes_go_first_where_one_takes_away_most():
    small = Unit(("a",), (10, 20, 40), (1.0, 0.1, 0.0))
    large = Unit(("b",), (100, 200, 400), (2.0, 0.2, 0.0))
    idle = Unit(("c",), (10, 20, 40), (0.0, 0.0, 0.0))
    units = [small, large, idle]
    # KL for a byte: a 0.9 / 10, then b 1.8 / 100, then a 0.1 / 20, then b 0.2 / 200; c never.
    assert grow(units, 120) == [0, 0, 0]
    assert grow(units, 139) == [1, 0, 0]
    assert grow(units, 160) == [2, 0, 0]  # b does not fit yet
    assert grow(units, 230) == [1, 1, 0]
    assert grow(units, 250) == [2, 1, 0]
    assert grow(units, 1000) == [2, 2, 0]
    with pytest.raises(ValueError, match="lowest widths take 120 bytes, more than 119"):
        grow(units, 119)


def test_growing_is_close_to_the_best_of_all_choices():
    rng = np.random.default_rng(1)
    shrink = np.array([1.0, 0.25, 0.06, 0.015, 0.001])
    units = [
        Unit((str(i),), tuple(int(b * n) for b in WIDTHS), tuple(kl * shrink))
        for i, (n, kl) in enumerate(zip(rng.integers(1, 9, 5), rng.exponential(size=5)))
    ]
    budget = 4.5 * sum(unit.num_bytes[0] for unit in units) / WIDTHS[0]

    def cost(places):
        return sum(unit.kl[p] for unit, p in zip(units, places))

    def num_bytes(places):
        return sum(unit.num_bytes[p] for unit, p in zip(units, places))

    got = grow(units, budget)
    every = itertools.product(range(len(WIDTHS)), repeat=len(units))
    best = min(cost(places) for places in every if num_bytes(places) <= budget)
    assert num_bytes(got) <= budget and best <= cost(got) <= 1.2 * best


@pytest.mark.slow
def test_chosen_widths_beat_one_width_at_the_same_bytes(make_model, monkeypatch):
    model, params = make_model("llama")
    # One group that matters little: its outputs hardly reach the residual stream.
    layers = jax.tree.map(lambda a: a, params["layers"])
    for part in ("gate", "up", "down"):
        layers[0]["mlp"][part]["w"] = layers[0]["mlp"][part]["w"] * 0.05
    params = {**params, "layers": layers}
    method = make_method("rtn", "int4-g32")
    seen = []
    units = sensitivity.measure(model, params, method, WINDOWS, on_unit=seen.append)
    assert seen == list(range(1, 9))
    last = units[-1]  # alone in its width, and measured from its own layer on
    assert last.modules == ("layers.1.mlp.down",)
    alone = Recipe(((last.modules[0], make_method("rtn", "int3-g32")),))
    expected = evaluate(
        model, quantize_model(model, params, alone)[0], WINDOWS, against=(model, params)
    )
    assert last.kl[0] == pytest.approx(expected.kl, rel=0.02)
    monkeypatch.setattr(sensitivity, "measure", lambda *args, **kwargs: units)
    recipe, choices = sensitivity.choose(model, params, method, 4.5, WINDOWS)
    assert [choice.modules for choice in choices] == [unit.modules for unit in units]
    assert {m for c in choices for m in c.modules if "layers.0.mlp" in m and "int3" in c.format}
    quantized, rows = quantize_model(model, params, recipe)
    uniform, same = quantize_model(model, params, Recipe.uniform(method))
    for unit in units:
        assert all(a >= b for a, b in itertools.pairwise(unit.kl))
        sizes = [row.bits * math.prod(row.shape) / 8 for row in same if row.module in unit.modules]
        assert unit.num_bytes[1] == sum(sizes)

    def bits(rows):
        sizes = [math.prod(row.shape) for row in rows]
        return sum(row.bits * n for row, n in zip(rows, sizes)) / sum(sizes)

    assert bits(rows) <= bits(same) == pytest.approx(4.5)
    fresh = np.random.default_rng(1).integers(0, 96, (4, 32)).astype(np.int32)
    kl, plain = (
        evaluate(model, p, fresh, against=(model, params)).kl for p in (quantized, uniform)
    )
    assert kl < 0.9 * plain
    assert [row["match"] for row in recipe.to_rows()] == [row.module for row in rows]


@pytest.mark.parametrize(
    ("method", "fmt", "bits", "message"),
    [
        ("rtn", "int4-g32", 3.4, r"must lie in 3.50..8.50 for int4-g32 .* got 3.4"),
        ("rtn", "int4-g32", 9, "got 9"),
        ("nf4", "nf4-g32", 4.5, "integer widths of weights such as int4-g64, got nf4-g32"),
        ("rtn", "int8-channel:dyn", 4.5, "got int8-channel:dyn"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_measured(
    make_model, method, fmt, bits, message
):
    model, _ = make_model("llama")
    with pytest.raises(ValueError, match=message):
        sensitivity.check(model, make_method(method, fmt), bits)


def test_a_recipe_is_read_as_it_was_written(tmp_path):
    import json

    recipe = Recipe(
        (
            ("layers.0.*", make_method("gptq", "int3-g64", scales="mse", damp=0.05)),
            ("layers.1.*", None),
            ("layers.*", make_method("smoothquant", alpha=0.8)),
        )
    )
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"rules": recipe.to_rows()}))
    assert Recipe.read(path) == recipe

"""Choosing a backend: named choices are used or refused, automatic ones take what can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, target


def _hopper_only(where, x):
    return None if where.is_hopper else f"needs a Hopper GPU, the target is {where.name}"


def _even_only(where, x):
    return None if x.shape[0] % 2 == 0 else f"needs an even length, got {x.shape[0]}"


IMPLS = (
    dispatch.Impl("mosaic_gpu", _hopper_only, lambda x: x + 1),
    dispatch.Impl("even", _even_only, lambda x: x + 2),
    dispatch.Impl("xla", lambda where, x: None, lambda x: x + 3),
)


def op(x, impl="auto"):
    return dispatch.pick("quant_matmul", IMPLS, impl, x).run(x)


def test_auto_takes_the_first_backend_that_can_run():
    assert op(jnp.zeros(4))[0] == 2
    assert op(jnp.zeros(3))[0] == 3
    with target.state("h100"):
        assert op(jnp.zeros(3))[0] == 1


def test_a_named_backend_that_cannot_run_gives_its_own_reason():
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU, the target is cpu"):
        op(jnp.zeros(4), impl="mosaic_gpu")


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"\['auto', 'mosaic_gpu', 'even', 'xla'\], got 'triton'"):
        op(jnp.zeros(4), impl="triton")


def test_no_backend_at_all_gives_every_reason():
    with pytest.raises(
        NotImplementedError, match=r"mosaic_gpu: needs a Hopper.*even: needs an even"
    ):
        dispatch.pick("quant_matmul", IMPLS[:2], "auto", jnp.zeros(3))


def test_use_impl_names_the_backend_and_the_innermost_wins():
    with dispatch.use_impl("xla"):
        assert op(jnp.zeros(4))[0] == 3
        with dispatch.use_impl(quant_matmul="even"):
            assert op(jnp.zeros(4))[0] == 2
        with dispatch.use_impl(fp8_matmul="even"):
            assert op(jnp.zeros(4))[0] == 3
        assert op(jnp.zeros(4), impl="even")[0] == 2
    assert op(jnp.zeros(4))[0] == 2


def test_use_impl_is_not_ignored_by_a_function_jitted_before():
    f = jax.jit(op)
    assert f(jnp.zeros(4))[0] == 2
    with dispatch.use_impl("xla"):
        assert f(jnp.zeros(4))[0] == 3
    assert f(jnp.zeros(4))[0] == 2


def test_use_impl_refuses_an_op_that_does_not_exist():
    with pytest.raises(ValueError, match="atention"), dispatch.use_impl(atention="xla"):
        pass


def test_explain_tells_what_was_chosen_and_why_not_the_others():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    (decision,) = dispatch.explain(op, x)
    assert decision.chosen == "xla"
    assert dict(decision.reasons)["even"] == "needs an even length, got 3"
    text = str(dispatch.explain(op, x, impl="even"))
    assert "cannot run: needs an even length, got 3" in text
    assert "could run, not named" in text


def test_explain_leaves_numpy_numbers_as_they_are():
    """1 / np.sqrt(64) is a number to an op, not an array to be traced."""

    def scaled(x, scale, *, width):
        return op(x * float(scale)).reshape(int(width), -1)

    half = np.float64(0.5)
    (decision,) = dispatch.explain(scaled, jnp.zeros(4), half, width=np.int32(2))
    assert decision.chosen == "even"


def test_explain_sees_through_jitted_functions_and_reports_each_decision_once():
    @jax.jit
    def f(x, y):
        return op(x).sum() + op(x).sum() + op(y).sum()

    f(jnp.zeros(4), jnp.zeros(3))  # a cached trace must not hide the ops
    found = dispatch.explain(f, jnp.zeros(4), jnp.zeros(3))
    assert [d.chosen for d in found] == ["even", "xla"]
    assert str(dispatch.explain(lambda x: x, jnp.zeros(3))) == "no dispatched op was called"

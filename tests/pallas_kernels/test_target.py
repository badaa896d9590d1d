"""Targets: stated or found, and compiling for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat, compile_only, target


def test_the_default_target_is_the_default_device():
    assert target.current() == target.TARGETS["cpu"]


def test_a_stated_target_holds_inside_its_context_only():
    with target.state("h100") as stated:
        assert target.current() is stated
        assert stated.is_hopper and stated.num_cores == 132
        with target.state("v6e"):
            assert target.current().kind == "tpu"
        assert target.current() is stated
    assert target.current().kind == "cpu"


def test_a_function_jitted_before_is_traced_anew_for_a_stated_target():
    seen = []

    @jax.jit
    def f(x):
        seen.append(target.current().name)
        return x

    f(jnp.zeros(2))
    with target.state("v5e"):
        f(jnp.zeros(2))
    assert seen == ["cpu", "v5e"]


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'h100', 'tpu7x', 'v5e', 'v6e'\], got 'b200'"):
        target.state("b200").__enter__()


def test_interpreting_is_off_outside_its_context():
    assert not compat.is_interpreting()
    assert compat.tpu_interpret_params() is False
    with compat.interpret(detect_races=True):
        assert compat.is_interpreting()
        assert compat.tpu_interpret_params().detect_races
    assert not compat.is_interpreting()


@pytest.mark.parametrize("name", ["h100", "v5e", "v6e", "tpu7x"])
def test_a_program_compiles_for_a_chip_that_is_not_there(name):
    if reason := compile_only.why_not_compile(name):
        with pytest.raises(NotImplementedError, match="not installed"):
            compile_only.compile_target(name).__enter__()
        pytest.skip(reason)
    with compile_only.compile_target(name) as compiler:
        assert target.current() == target.TARGETS[name]
        x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
        compiled = compiler.compile(lambda x: (x @ x.T).sum(axis=0), x)
    assert 0 <= compiled.temp_bytes < 1 << 23
    assert compiled.executable.as_text()
    assert target.current().kind == "cpu"


def test_compiling_for_an_absent_chip_leaves_the_cache_on_disk_alone(tmp_path):
    """An entry for a chip that is not there could be written, but never read."""
    if reason := compile_only.why_not_compile("h100"):
        pytest.skip(reason)
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: jax.config.values[key] for key in keys}
    try:
        for key, value in zip(keys, (str(tmp_path), 0.0)):
            jax.config.update(key, value)
        for _ in range(2):
            with compile_only.compile_target("h100") as compiler:
                compiler.compile(lambda x: x * 3, jax.ShapeDtypeStruct((8,), jnp.float32))
            jax.clear_caches()
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x * 5)(jnp.ones(8)).block_until_ready()
        assert list(tmp_path.iterdir()), "the host's own programs go there again"
    finally:
        for key, value in before.items():
            jax.config.update(key, value)

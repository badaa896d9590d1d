"""Strict JAX on the CPU for every test: no silent dtype or rank promotion, warnings are errors."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two thirds of a test's time went to compiling what then runs for milliseconds: less optimized
# programs are compiled in under half of it. Other devices get real code, but XLA times none of its
# own choices there. XLA_FLAGS of your own (also empty) take their place.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
else:
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the device

import hypothesis
import jax
import pytest

# The simulator of GPU kernels (used from jax 0.11 on) blocks a CPU thread per warpgroup: with fewer
# threads than warpgroups, as on two cores, it waits for itself forever.
if jax.__version_info__ >= (0, 11):
    os.environ.setdefault("NPROC", "8")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A loaded machine is no reason to fail: examples take as long as they take.
hypothesis.settings.register_profile(
    "jinfer",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jinfer")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the programs that a file of tests compiled.

    XLA on CPUs maps each program into memory in many pieces, and Linux allows a process 65,530 of
    them (vm.max_map_count): a whole suite in one process would end in a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def default_model():
    """Fetches the default model into the cache if need be; skips the test where that fails."""
    from jinfer.checkpoints.default_model import default_model_path

    try:
        return default_model_path()
    except (OSError, ValueError) as error:
        pytest.skip(f"the default model cannot be had: {error}")


@pytest.fixture
def users_jax():
    """JAX as users have it: values of different dtypes and ranks are promoted."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield

"""Weights that a caller hands in: brought to the engine's device, or refused by name."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import make_model

from jinfer import LLM, BeamSearchParams, SamplingParams, generate
from jinfer.engine.device.compile_counter import compile_counter

VOCAB = 96
MODEL = make_model(VOCAB)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 17, 3, 60]


@functools.cache
def init(seed):
    return MODEL.init(jax.random.key(seed))


def make_llm(params, **options):
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 16}
    return LLM(
        MODEL,
        params=params,
        skip_tokenizer_init=True,
        **{**limits, "num_gpu_blocks_override": 24, **options},
    )


@pytest.fixture(scope="module")
def shared_llm():
    """Every test that uses it brings its own weights first."""
    llm = make_llm(init(0))
    answer(llm)
    return llm


def answer(llm):
    return llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@functools.cache
def expected(seed):
    """Greedy tokens of the model without an engine."""
    text = list(PROMPT)
    for _ in range(GREEDY.max_tokens):
        text.append(int(MODEL.logits(init(seed), jnp.asarray(text, jnp.int32))[-1].argmax()))
    return text[len(PROMPT) :]


def aligned(x):
    """A copy in numpy whose memory JAX on CPUs would take for its own."""
    x = np.asarray(x)
    memory = np.empty(x.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def placed(sharding):
    return lambda x: jax.device_put(x, sharding)


def kinds():
    device = jax.devices()[0]
    mesh = jax.make_mesh((1,), ("x",))
    return {
        "numpy": aligned,
        "loose": lambda x: jnp.array(x, copy=True),
        "bound": placed(device),
        "named": placed(NamedSharding(mesh, PartitionSpec())),
        "split": placed(NamedSharding(mesh, PartitionSpec("x"))),
    }


KINDS = ("numpy", "loose", "bound", "named", "split")


@pytest.mark.parametrize("way", ["made with", "updated to"])
@pytest.mark.thorough
def test_what_is_written_into_numpy_arrays_later_changes_nothing(shared_llm, way):
    leaves = jax.tree.map(aligned, init(1))
    if way == "made with":
        llm = make_llm(leaves)
    else:
        llm = shared_llm
        llm.update_weights(leaves)
    for leaf in jax.tree.leaves(leaves):
        leaf[...] = 0
    assert all(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(llm.loop.engine.runner.params)
    )
    assert answer(llm) == expected(1)


@pytest.mark.parametrize("first", KINDS)
def test_no_step_compiles_whatever_the_weights_lie_in(shared_llm, first):
    llm = make_llm(jax.tree.map(kinds()[first], init(0)))
    assert answer(llm) == expected(0)
    for seed, second in enumerate(KINDS, start=1):
        new = jax.tree.map(kinds()[second], init(seed))
        before = compile_counter.count
        llm.update_weights(new)
        assert answer(llm) == expected(seed)
        assert compile_counter.count == before, second


@pytest.mark.thorough
def test_no_step_compiles_with_pages_on_the_host_and_another_model_that_drafts():
    spec = {"method": "draft", "model": MODEL, "params": jax.tree.map(aligned, init(2))}
    for options in ({"cpu_offload_gb": 1e-4}, {"speculative_config": spec}):
        llm = make_llm(jax.tree.map(aligned, init(0)), max_num_seqs=1, **options)
        answer(llm)
        for second in KINDS:
            new = jax.tree.map(kinds()[second], init(1))
            before = compile_counter.count
            llm.update_weights(new)
            assert answer(llm) == expected(1)
            assert compile_counter.count == before, (options, second)


def donate(x):
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)


@pytest.mark.parametrize("give_away", [donate, lambda x: x.delete()])
def test_weights_that_were_given_away_are_named(shared_llm, give_away):
    llm = shared_llm
    named = r"weight \['layers'\]\[1\]\['mlp'\]\['up'\]\['w'\] was donated or deleted"

    def fresh():
        return jax.tree.map(lambda x: jnp.array(x, copy=True), init(1))

    gone = fresh()
    give_away(gone["layers"][1]["mlp"]["up"]["w"])
    with pytest.raises(ValueError, match=named):
        llm.update_weights(gone)
    with pytest.raises(ValueError, match=named):
        make_llm(gone)
    llm.update_weights(served := fresh())
    give_away(served["layers"][1]["mlp"]["up"]["w"])
    for call in (
        lambda: answer(llm),
        lambda: list(llm.stream([PROMPT], GREEDY)),
        lambda: llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=4)),
        lambda: llm.add_request("x", PROMPT, GREEDY),
    ):
        with pytest.raises(ValueError, match=named) as error:
            call()
        assert "\n" not in str(error.value)


def test_weights_given_away_under_way_are_named_and_the_request_goes_on_with_new_ones(shared_llm):
    llm, new = shared_llm, jax.tree.map(lambda x: jnp.array(x, copy=True), init(1))
    llm.update_weights(new)
    llm.add_request("under way", PROMPT, GREEDY)
    llm.step()
    new["final_norm"]["scale"].delete()
    with pytest.raises(ValueError, match=r"'final_norm'.* was donated or deleted"):
        for _ in range(GREEDY.max_tokens):
            llm.step()
    llm.update_weights(init(1))
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[-1].outputs[0].token_ids == expected(1)
    llm.check_integrity()


def change(path, make):
    """Returns init(1) with one leaf or subtree made anew; None leaves it out."""

    def walk(tree, path):
        if isinstance(tree, tuple):
            return tuple(walk(t, path[1:]) if i == path[0] else t for i, t in enumerate(tree))
        tree = dict(tree)
        if len(path) > 1:
            tree[path[0]] = walk(tree[path[0]], path[1:])
        elif make is None:
            del tree[path[0]]
        else:
            tree[path[0]] = make(tree.get(path[0]))
        return tree

    return walk(init(1), path)


Q = ("layers", 0, "attn", "q", "w")
WRONG = {
    "no dict": (lambda: None, (ValueError, TypeError), "needs its weights"),
    "a list": (lambda: [1, 2], TypeError, "params must be a dict .*, got list"),
    "one layer": (
        lambda: {**init(1), "layers": init(1)["layers"][:1]},
        ValueError,
        r"params\['layers'\] has 1 layers, the model 2",
    ),
    "missing": (lambda: change(Q, None), ValueError, r"missing \['w'\]"),
    "unknown": (lambda: change((*Q[:-1], "bb"), lambda _: 1), ValueError, r"unknown \['bb'\]"),
    "shape": (
        lambda: change(Q, lambda w: w[:-1]),
        ValueError,
        r"params\['layers'\]\[0\]\['attn'\]\['q'\]\['w'\] must be of shape \[32, 32\], got \[31",
    ),
    "list": (lambda: change(Q, lambda w: w.tolist()), TypeError, "must be an array .*, got list"),
    "number": (lambda: change(Q, lambda w: 1.0), TypeError, "must be an array .*, got float"),
    "integers": (lambda: change(Q, lambda w: w.astype(int)), ValueError, "floats, got int32"),
    "float64": (
        lambda: change(Q, lambda w: np.asarray(w, np.float64)),
        ValueError,
        r"\['q'\]\['w'\] must be of float32, bfloat16, float16, got float64",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_trees_that_do_not_fit_are_refused_by_name(shared_llm, make, kind, message):
    shared_llm.update_weights(init(0))
    for call in (shared_llm.update_weights, make_llm):
        with pytest.raises(kind, match=message) as error:
            call(make())
        assert "\n" not in str(error.value)
    if "float64" not in message:  # of any floats
        text = jnp.asarray([PROMPT])
        for call in (MODEL.logits, functools.partial(generate, MODEL, max_new_tokens=2)):
            with pytest.raises((ValueError, TypeError), match="params") as error:
                call(make(), text)
            assert "\n" not in str(error.value)
    assert answer(shared_llm) == expected(0)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_pure_functions_take_numpy_arrays_and_leave_them_alone(dtype):
    given = jax.tree.map(lambda x: np.asarray(x, dtype), init(1))
    copy = jax.tree.map(np.array, given)
    own = jax.tree.map(jnp.asarray, given)
    text = np.asarray([PROMPT])
    assert np.array_equal(MODEL.logits(given, text), MODEL.logits(own, text))
    key = jax.random.key(0)
    run = functools.partial(generate, MODEL, max_new_tokens=3, temperature=1.0, key=key)
    for call in (run, jax.jit(run)):
        assert np.array_equal(call(given, text).tokens, call(own, text).tokens)
    jax.tree.map(np.testing.assert_array_equal, given, copy)


def test_another_dtype_or_format_than_the_present_one_is_refused(shared_llm):
    from jinfer.quant.on_load import quantize_params

    shared_llm.update_weights(init(0))
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), init(0))
    with pytest.raises(
        ValueError, match=r"weight \['embed'\]\['w'\] must be float32\[96, 32\], got"
    ):
        shared_llm.update_weights(half)
    with pytest.raises(ValueError, match="not of the present ones' form"):
        shared_llm.update_weights(quantize_params(init(0), "int8"))
    assert answer(shared_llm) == expected(0)


def test_layers_may_be_a_list(shared_llm):
    shared_llm.update_weights({**init(1), "layers": list(init(1)["layers"])})
    assert answer(shared_llm) == expected(1)


TWO_DEVICES = """
import jax
from jax.sharding import NamedSharding, PartitionSpec
from test_weights import MODEL, answer, compile_counter, expected, init, make_llm

first, second = jax.devices()
split = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
for where, home in ((split, first), (second, second)):
    llm = make_llm(jax.device_put(init(0), where), cpu_offload_gb=1e-4)
    runner = llm.loop.engine.runner
    arrays = jax.tree.leaves((runner.params, runner.pool))
    assert all(x.devices() == {home} for x in arrays)
    assert answer(llm) == expected(0)
    for other in (split, first, second):
        new = jax.device_put(init(1), other)
        before = compile_counter.count
        llm.update_weights(new)
        assert answer(llm) == expected(1)
        assert compile_counter.count == before, (where, other)
print("both")
"""


@pytest.mark.thorough
def test_weights_on_several_devices_are_brought_to_one():
    here = pathlib.Path(__file__).resolve().parent
    paths = [here, here.parents[1] / "helpers", here.parents[2]]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", TWO_DEVICES]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "both", done.stderr[-3000:]

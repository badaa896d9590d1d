"""What research code hands to pure functions: arrays of any kind, shape and range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_model

import jinfer
from jinfer.checkpoints.fill import resolve_dtype
from jinfer.checkpoints.formats.detect import QuantizedModules, open_reader
from jinfer.checkpoints.hf_files import read_safetensors_header
from jinfer.cli.terminal import one_line
from jinfer.config.model import ModelConfig, RopeConfig
from jinfer.config.quant_format import QFormat
from jinfer.config.speculative import SpeculativeConfig
from jinfer.linear import qtensor
from jinfer.quant.methods.gptq import quantize_gptq
from jinfer.quant.methods.hqq import quantize_hqq
from jinfer.quant.methods.rtn import quantize_rtn
from jinfer.quant.pipeline import quantize_model
from jinfer.quant.recipe import Method, Recipe, make_method, parse_quantization

VOCAB = 31
KEY = jax.random.key(0)
MODEL = make_model(VOCAB, num_layers=1)
W = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
FMT = QFormat.parse("int4-g32")
ODD = [None, True, 5, "", "ab", len, {}, [[1, "a"]], 1 + 2j, np.array(["a"]), np.zeros((2, 0))]
ODD += [b"ab", [], [[1], [2, 3]], np.array([None]), np.ones((2, 3), bool), jnp.zeros((0, 2))]


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def refused(call, *names):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    text = str(error.value)
    assert type(error.value) in (ValueError, TypeError), text
    assert len(text.splitlines()) == 1 and len(text) < 1500 and any(n in text for n in names), text


@pytest.mark.parametrize("tokens", [[[VOCAB]], [[-1]], [[2**40]], [[1.0]], *ODD], ids=str)
def test_tokens_that_are_none_are_named(params, tokens):
    if isinstance(tokens, int) and not isinstance(tokens, bool):
        tokens = np.zeros((), int)
    refused(lambda: MODEL.logits(params, tokens), "tokens")
    refused(lambda: jinfer.generate(MODEL, params, tokens, max_new_tokens=1), "tokens")


def test_tokens_of_all_kinds_of_integers_give_the_same_logits(params):
    expected = MODEL.logits(params, jnp.array([[1, 2, 3]]))
    for tokens in ([[1, 2, 3]], ((1, 2, 3),), np.array([[1, 2, 3]], np.uint8)):
        assert np.array_equal(MODEL.logits(params, tokens), expected)
    traced = jax.jit(lambda a, b, c: MODEL.logits(params, [[a, b, c]]))(1, 2, 3)
    np.testing.assert_allclose(traced, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1.0, np.nan, np.inf, [0.5, 0.5, 0.5], "1", True, None, [[1.0]], 1j]),
        ("top_p", [0.0, -1, 1.5, np.nan, "a", None]),
        ("min_p", [-0.1, 1.1, np.nan, [], None]),
        ("top_k", [-1, 1.5, 2**40, 10**30, "a", None, [1, 2, 3], True]),
        ("prompt_lens", [[0, 1], [1, 4], [1], 2, [1.0, 2.0], "ab", [[1, 2]]]),
        ("max_new_tokens", [0, -1, 1.0, True, None, "3", np.array([1, 2])]),
        ("eos_token_ids", [5, "a", [1.5], [None], None, [[1]], [-1], {1: 2}]),
        (
            "key",
            [7, "a", jnp.zeros(2), np.zeros(3, np.uint32), jax.random.split(KEY)],
        ),
    ],
)
def test_an_argument_of_generate_is_refused_by_its_name(params, name, values):
    fields = {"tokens": [[1, 2, 3], [4, 5, 6]], "max_new_tokens": 1, "key": KEY}
    fields |= {"temperature": 1.0}
    for value in values:
        refused(lambda v=value: jinfer.generate(MODEL, params, **{**fields, name: v}), name)


@pytest.mark.parametrize("quantize", [qtensor.quantize, quantize_rtn, quantize_hqq, quantize_gptq])
def test_a_quantizer_names_what_it_cannot_take(quantize):
    fmt = QFormat.parse("int4-g32-asym" if quantize is quantize_hqq else "int4-g32")
    rest = {"hessian": np.eye(32, dtype=np.float32)} if quantize is quantize_gptq else {}
    for w in [*ODD, W[0], W.astype(np.int32), W.astype(complex), W * np.nan]:
        refused(lambda w=w: quantize(w=w, fmt=fmt, **rest), "weight")
    for odd in ("int4-g32", None, 4):
        refused(lambda odd=odd: quantize(w=W, fmt=odd, **rest), "fmt")
    for odd in ("int8", "x", None, W, [], object(), float):
        refused(lambda odd=odd: quantize(w=W, fmt=fmt, scale_dtype=odd, **rest), "scale_dtype")
    if quantize is not quantize_hqq:
        for odd in ("half", None, W):
            refused(lambda odd=odd: quantize(w=W, fmt=fmt, grid=odd, **rest), "grid")
    if rest:
        for odd in (None, "a", W, rest["hessian"] * np.nan, rest["hessian"].astype(int)):
            refused(lambda odd=odd: quantize(w=W, fmt=fmt, hessian=odd), "hessian")
        for name, odd in (("damp", W), ("damp", np.nan), ("order", W), ("scales", [])):
            refused(lambda n=name, o=odd: quantize(w=W, fmt=fmt, **rest, **{n: o}), name)


def test_formats_and_methods_name_values_of_another_kind():
    odd = [1.5, True, "a", [], {}, W, jnp.ones(3), object(), 10**30]
    for name in QFormat.__dataclass_fields__:
        is_flag = name in ("symmetric", "float_zero", "double_quant")
        for value in odd:
            if not (is_flag and value is True) and not (name == "group" and value is odd[-1]):
                refused(lambda n=name, v=value: QFormat(**{n: v}), name, "zero", "bits", "blocks")
    for value in [*odd, None, "int4-g0", "int4-g٣", "int4-g" + "9" * 5000]:
        refused(lambda v=value: QFormat.parse(v), "format")
        refused(lambda v=value: parse_quantization(v), "quantization")
    for name in ("fold", "solver", "order", "scales", "grid", "scale_dtype", "damp", "alpha"):
        for value in [W, [], {}, object(), float("nan"), jnp.ones(3)]:
            refused(lambda n=name, v=value: Method(name="x", format=FMT, **{n: v}), name)
    for value in (W, [], None, 5):
        refused(lambda v=value: make_method(v), "method")


def test_dtypes_of_all_spellings_load_and_arrays_are_none():
    for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.dtype("bfloat16")):
        assert resolve_dtype(dtype, "float32").name == "bfloat16"
    for odd in (jnp.ones(3), W, 5, [], {}, object(), "int8", "x", 1j):
        refused(lambda odd=odd: resolve_dtype(odd, "float32"), "dtype")


def test_a_model_config_names_values_of_another_kind():
    """Fields are kept as they are: they must be hashable, and numbers that arrays can hold."""
    odd = ["a", [], [1], {}, {1: [1]}, W, jnp.ones(3), object(), float("nan")]
    fields = set(ModelConfig.__dataclass_fields__) - {"family", "vocab_size"}
    for name in fields:
        for value in odd:
            refused(lambda n=name, v=value: make_model(VOCAB, **{n: v}), name)
        if "bool" not in str(ModelConfig.__dataclass_fields__[name].type):
            refused(lambda n=name: make_model(VOCAB, **{n: True}), name)
    for name in ("norm_eps", "final_soft_cap", "embedding_scale"):
        refused(lambda n=name: make_model(VOCAB, **{n: 2**200}), name)
    assert type(make_model(VOCAB, final_soft_cap=2**40).config.final_soft_cap) is float
    for name in RopeConfig.__dataclass_fields__.keys() - {"scaling"}:
        for value in ([], W, "a", {}, object()):
            refused(lambda n=name, v=value: RopeConfig(**{n: v}), name)


@pytest.mark.parametrize("quantize", [qtensor.quantize, quantize_rtn, quantize_hqq, quantize_gptq])
def test_scales_that_do_not_hold_a_weight_are_refused(quantize):
    fmt = QFormat.parse("int4-g32-asym" if quantize is quantize_hqq else "int4-g32")
    rest = {"hessian": np.eye(32, dtype=np.float32)} if quantize is quantize_gptq else {}
    with pytest.raises(ValueError, match="weight is too large for scales of float16"):
        quantize(w=W * 1e7, fmt=fmt, scale_dtype="float16", **rest)
    quantize(w=W * 1e7, fmt=fmt, scale_dtype="float32", **rest)


def test_sizes_beyond_the_model_or_the_memory_are_refused(params, tmp_path):
    with pytest.raises(ValueError, match=r"max_new_tokens are 1 \+ 2147483647, more than the 128"):
        jinfer.generate(MODEL, params, [[1]], max_new_tokens=2**31 - 1)
    with pytest.raises(ValueError, match="num_gpu_blocks_override=9223372036854775808 pages"):
        jinfer.LLM(MODEL, params=params, skip_tokenizer_init=True, num_gpu_blocks_override=2**63)
    for name in ("revision", "quantization"):
        for value in (W, 5, [], -1e308):
            refused(lambda n=name, v=value: jinfer.load(tmp_path, **{n: v}), name)
    refused(lambda: make_model(VOCAB, head_dim=7), "head_dim must be even")
    refused(lambda: QFormat(block=-1), "block must be positive")
    for tree in (1e308, "ab", W):
        config = {"method": "medusa", "heads": "nowhere", "tree": tree}
        refused(lambda config=config: SpeculativeConfig.of(config), "tree")


@pytest.mark.parametrize("quantize", [qtensor.quantize, quantize_rtn, quantize_hqq, quantize_gptq])
def test_a_deleted_weight_is_named(quantize):
    w = jnp.array(W)
    w.delete()
    rest = {"hessian": np.eye(32, dtype=np.float32)} if quantize is quantize_gptq else {}
    refused(lambda: quantize(w=w, fmt=FMT, **rest), "weight was donated or deleted")


def test_a_folder_in_the_place_of_safetensors_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not a file"):
        read_safetensors_header(tmp_path / "model.safetensors")


def test_a_path_with_a_line_break_is_one_line_of_error():
    error = FileNotFoundError(2, "No such file or directory", "a\nb")
    assert one_line(error) == "a b: No such file or directory"


def test_a_quantization_config_with_values_of_another_kind_is_named():
    for method in ([None], {}, 7, True):
        with pytest.raises(ValueError, match=r"folder is quantized by .*, which is not supported"):
            open_reader({"quant_method": method}, "folder")
    weights = {"num_bits": 8, "type": "int", "strategy": "group", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": "\0"}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    tensors = {
        "a.weight": np.zeros((4, 32), np.int8),
        "a.weight_scale": np.ones((4, 2), np.float32),
    }
    with pytest.raises(ValueError, match=r"folder: .*(a: its quantization_config|group_size)"):
        QuantizedModules(
            {**config, "config_groups": {"g": group}}, tensors, tensors.__getitem__, "folder"
        ).read("a.weight")


@pytest.mark.parametrize("call", ["logits", "generate", "quantize_model"])
def test_a_deleted_weight_of_a_model_is_named(call):
    params = MODEL.init(KEY)
    params["layers"][0]["attn"]["v"]["w"].delete()
    calls = {
        "logits": lambda: MODEL.logits(params, [[1]]),
        "generate": lambda: jinfer.generate(MODEL, params, [[1]], max_new_tokens=1),
        "quantize_model": lambda: quantize_model(MODEL, params, Recipe.uniform(make_method("rtn"))),
    }
    refused(calls[call], "weight ['layers'][0]['attn']['v']['w'] was donated or deleted")


def test_sizes_beyond_what_programs_and_names_of_formats_hold_are_refused():
    refused(lambda: make_model(VOCAB, num_layers=1, sliding_window=2**31), "sliding_window")
    for field in ({"group": 2**64}, {"group": 10**9, "block": 10**9, "kind": "fp8-e4m3"}):
        refused(lambda field=field: QFormat(bits=8, **field), "group and block")

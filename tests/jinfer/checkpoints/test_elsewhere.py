"""What we write loads in transformers, compressed-tensors, bitsandbytes and GPTQModel, with our
logits.

Those libraries are no part of the [test] extra; docs/explanation/file-formats.md says how to get
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import load
from jinfer.checkpoints.save import save_folder
from jinfer.models.model import Model
from jinfer.quant.on_load import quantize_params

pytestmark = pytest.mark.slow
WEIGHTS_ONLY = 1e-5  # of the largest logit: f32 forwards of the same weights
ROUNDED_TO_HALF = 5e-4  # likewise, where the library decodes to the scales' f16
GPTQMODEL = 1e-3  # likewise, and only half precision is taken: 1.5e-4 of 0.31 was seen
# With quantized inputs a different rounding propagates: the mean difference as a
# share of what quantizing the inputs does. ":dyn" is amax / 127 here, amax / 127.5 there: two
# roundings.
QUANTIZED_INPUTS = {
    "int8-channel:dyn-full": 0.1,
    "fp8-e4m3-channel:dyn": 0.1,
    "int8-channel:dyn": 1.5,
}
CASES = [
    ("compressed-tensors", "int4-g32:rtn", "compressed_tensors"),
    ("compressed-tensors", "int4-g32-asym:rtn", "compressed_tensors"),
    ("compressed-tensors", "int3-g64:rtn", "compressed_tensors"),
    ("compressed-tensors", "int8-channel:rtn", "compressed_tensors"),
    ("compressed-tensors", "int8-channel:dyn-full", "compressed_tensors"),
    ("compressed-tensors", "int8-channel:dyn", "compressed_tensors"),
    ("compressed-tensors", "fp8-e4m3-channel:dyn", "compressed_tensors"),
    ("bitsandbytes", "nf4-g64:rtn", "bitsandbytes"),
    ("bitsandbytes", "nf4-g64-dq:rtn", "bitsandbytes"),
    ("bitsandbytes", "fp4-g64:rtn", "bitsandbytes"),
]


@pytest.mark.parametrize(("export", "quantization", "library"), CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_gives_our_logits(
    export, quantization, library, family, tiny, tmp_path, dense
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip(
        library, reason=f"{library} is not installed: see docs/explanation/file-formats.md"
    )
    made = tiny(family, hidden_size=128, intermediate_size=192)
    model = Model(made.config)
    params = jax.tree.map(jnp.asarray, made.params)
    params = quantize_params(params, quantization)
    save_folder(tmp_path / "m", model, params, made.hf, export=export, dtype="float32")
    tokens = np.random.default_rng(0).integers(3, 96, (2, 24))
    if "asym" in quantization:
        theirs = _decompressed(tmp_path / "m")
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", dtype=torch.float32, attn_implementation="eager"
        )
    if export == "bitsandbytes":
        _dequantize(theirs)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.float().numpy()
    loaded, own = load(tmp_path / "m", dtype="float32")
    logits = jax.jit(loaded.logits)
    got = np.asarray(logits(own, jnp.asarray(tokens, jnp.int32)))
    difference, largest = np.abs(got - want), np.abs(want).max()
    print(f"{family} {export} {quantization}: max {difference.max():.1e} of {largest:.2f}")
    if quantization not in QUANTIZED_INPUTS:
        share = ROUNDED_TO_HALF if "asym" in quantization else WEIGHTS_ONLY
        assert difference.max() <= share * largest
        return
    plain = np.asarray(logits(dense(own), jnp.asarray(tokens, jnp.int32)))
    effect = np.abs(want - plain).mean()
    print(f"  mean {difference.mean():.1e}, quantized inputs do {effect:.1e}")
    assert difference.mean() <= QUANTIZED_INPUTS[quantization] * effect


@pytest.mark.parametrize(
    ("export", "quantization"),
    [
        ("gptq", "int4-g64:rtn"),
        ("gptq", "int4-g32-asym:rtn"),
        ("gptq", "int4-g128:rtn"),  # 1.5 groups in 192 inputs
        ("gptq", "int4-channel:rtn"),
        ("gptq", "int3-g64:rtn"),
        ("gptq", "int8-g64:rtn"),
        ("awq", "int4-g64-asym:rtn"),
        ("awq", "int4-g32:rtn"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore")  # theirs, at import
def test_gptqmodel_gives_our_logits(export, quantization, family, tiny, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip(
        "gptqmodel", reason="gptqmodel is not installed: see docs/explanation/file-formats.md"
    )
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    made = tiny(family, hidden_size=128, intermediate_size=192)
    model = Model(made.config)
    params = quantize_params(jax.tree.map(jnp.asarray, made.params), quantization)
    save_folder(tmp_path / "m", model, params, made.hf, export=export, dtype="float16")
    _save_tokenizer(tmp_path / "m")
    tokens = np.random.default_rng(0).integers(3, 96, (2, 24))
    theirs = _by_gptqmodel(tmp_path / "m")
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
    loaded, own = load(tmp_path / "m", dtype="float32")
    got = np.asarray(jax.jit(loaded.logits)(own, jnp.asarray(tokens, jnp.int32)))
    difference, largest = np.abs(got - want).max(), np.abs(want).max()
    print(f"{family} {export} {quantization}: max {difference:.1e} of {largest:.2f}")
    assert difference <= GPTQMODEL * largest


def _save_tokenizer(folder):
    """A tokenizer without which GPTQModel loads nothing."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({str(i): i for i in range(96)}, unk_token="0")
    special = {"unk_token": "0", "bos_token": "1", "eos_token": "2", "pad_token": "0"}
    inner = tokenizers.Tokenizer(words)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def _by_gptqmodel(folder):
    """The model as GPTQModel loads it, each linear replaced by the weight that it multiplies with.

    Its kernels for CPUs compute in half precision only, so a weight is what it makes of the unit
    matrix, rounded to f16 once, and the products are f32.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel

    options = {"dtype": torch.float16, "attn_implementation": "eager"}
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, **options).model
    replaced = 0
    for name, module in list(model.named_modules()):
        if hasattr(module, "qweight"):
            bias, module.bias = module.bias, None
            with torch.no_grad():
                weight = module(torch.eye(module.in_features, dtype=torch.float16)).T
            plain = torch.nn.Linear(module.in_features, module.out_features, bias is not None)
            plain.weight = torch.nn.Parameter(weight.float().contiguous())
            if bias is not None:
                plain.bias = torch.nn.Parameter(bias.float())
            model.set_submodule(name, plain)
            replaced += 1
    assert replaced == 14
    return model.float().eval()


def _decompressed(folder):
    """The model with weights that compressed-tensors itself decodes, module by module.

    transformers 5.24 expects zero points unpacked: it loads no asymmetric file, neither of theirs.
    """
    import torch
    import transformers
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    scheme = QuantizationConfig.model_validate(config.quantization_config)
    scheme = scheme.config_groups["group_0"]
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if n.endswith(".weight_packed")]:
        prefix = name.removesuffix("weight_packed")
        own = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
        if "bias" in own:
            state[prefix + "bias"] = own.pop("bias")
        weight = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        state[prefix + "weight"] = weight.float()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model.eval()


def _dequantize(model):
    """Puts plain linears in the place of 4-bit ones, whose CPU kernel computes in bfloat16."""
    import bitsandbytes
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            assert weight.quant_state is not None, name
            plain = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            plain.weight = torch.nn.Parameter(values.float())
            plain.bias = module.bias
            model.set_submodule(name, plain)

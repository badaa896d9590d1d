"""`LLM`'s arguments become one frozen value, and its configs hold no weights."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_model

from jinfer import LLM, SamplingParams
from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.speculative import SpeculativeConfig
from jinfer.models.model import Model
from jinfer.setup.options import LLMOptions
from jinfer.setup.resolve import resolve
from jinfer.setup.speculation import DraftSource, Speculation

MODEL = make_model(96)


def arguments():
    """The keyword arguments of `LLM` with their defaults."""
    found = inspect.signature(LLM.__init__).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}


def test_options_have_the_arguments_of_llm_and_their_defaults():
    beside = {"params", "tokenizer", "speculative_config"}
    fields = {f.name: f.default for f in dataclasses.fields(LLMOptions)}
    assert fields.pop("speculation") is None
    assert fields == {name: x for name, x in arguments().items() if name not in beside}
    assert LLMOptions.of(arguments()) == LLMOptions()


def test_options_are_frozen_hashable_and_checked():
    options = LLMOptions.of({**arguments(), "seed": 3, "dtype": jnp.bfloat16})
    assert options == LLMOptions(seed=3, dtype="bfloat16") and hash(options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 4
    for name, value, message in (
        ("seed", "3", "seed must be an integer"),
        ("block_size", 1.5, "block_size must be an integer"),
        ("cpu_offload_gb", None, "cpu_offload_gb must be a finite number"),
        ("enable_prefix_caching", 1, "enable_prefix_caching must be True or False"),
        ("revision", 1, "revision must be a string"),
    ):
        for call in (LLMOptions.of, lambda given: LLM(MODEL, **given)):
            with pytest.raises(ValueError, match=message):
                call({**arguments(), name: value})


def arrays_in(value):
    """Whether an array, a model or a tokenizer lies anywhere in a config."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Model):
        return any(arrays_in(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, (dict, tuple, list)):
        return any(map(arrays_in, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (int, float, str, bool, type(None)))


def test_a_draft_model_and_its_weights_travel_beside_the_configs():
    params = MODEL.init(jax.random.key(0))
    spec = {"method": "draft", "model": MODEL, "params": params, "num_speculative_tokens": 2}
    config = SpeculativeConfig.of(spec)
    assert config == SpeculativeConfig(method="draft", num_speculative_tokens=2) and hash(config)
    source = DraftSource.of(spec)
    assert source.model is MODEL and source.params is params and source.tokenizer is None
    assert DraftSource.of(None) == DraftSource.of({"method": "ngram"}) == DraftSource()
    options = LLMOptions.of({**arguments(), "speculative_config": spec})
    llm = LLM(
        MODEL,
        params=params,
        skip_tokenizer_init=True,
        speculative_config=spec,
        num_gpu_blocks_override=4,
    )
    assert llm.config.speculation == config
    for value in (config, options, llm.config):
        assert not arrays_in(value), value
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": [5, 9]}], sampling, use_tqdm=False)[0]
    text = [5, 9]
    for _ in range(6):
        text.append(int(MODEL.logits(params, jnp.asarray(text, jnp.int32))[-1].argmax()))
    assert output.outputs[0].token_ids == text[2:]
    assert llm.get_metrics()["num_accepted_tokens"] > 0


def test_a_draft_method_without_a_model_is_refused():
    for fields in ({}, {"model": None}, {"params": {}}):
        with pytest.raises(ValueError, match='"draft" needs a "model"'):
            SpeculativeConfig.of({"method": "draft", **fields})
    with pytest.raises(ValueError, match="\"ngram\" has no 'model'"):
        SpeculativeConfig.of({"method": "ngram", "model": MODEL})


def test_options_are_resolved_into_configs():
    params = {"embed": {"w": np.zeros((96, 32), np.float32)}}
    options = LLMOptions(max_num_seqs=3, max_model_len=40, block_size=16, max_logprobs=-1)
    config, cache = resolve(options, MODEL.config, params, Speculation())
    assert config == EngineConfig(
        max_model_len=40,
        max_num_seqs=3,
        max_num_batched_tokens=512,
        block_size=16,
        num_decode_steps=1,
        max_logprobs=96,
    )
    # Three sequences of three pages each are all that can ever be used.
    assert cache == CacheConfig(num_pages=9, page_size=16, dtype="float32")
    with pytest.raises(ValueError, match="max_model_len=129 exceeds the model's 128"):
        resolve(
            dataclasses.replace(options, max_model_len=129), MODEL.config, params, Speculation()
        )
    with pytest.raises(ValueError, match="num_gpu_blocks_override must be a positive integer"):
        bad = dataclasses.replace(options, num_gpu_blocks_override=0)
        resolve(bad, MODEL.config, params, Speculation())

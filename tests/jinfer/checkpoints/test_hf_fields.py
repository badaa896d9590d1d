"""Whatever the JSON files of a folder say, it loads as it should or is refused by field."""

import itertools
import json
import random

import numpy as np
import pytest
from tiny_models import byte_tokenizer

from jinfer import load
from jinfer.checkpoints.fill import fill
from jinfer.checkpoints.hf import HFCheckpoint
from jinfer.checkpoints.hf_fields import FIELDS, FIELDS_OF, ROPE_FIELDS
from jinfer.checkpoints.load import load_config
from jinfer.checkpoints.tokenizer import load_tokenizer

VALUES = [
    *(None, True, False, 0, 1, 2, -1, 3, 100, 10_000, 2**31, 2**70, 0.0, -1.0, 0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "2", "False", "x" * 5000, "llama", "full_attention"),
    *([], [1], [1, 2], [None], ["a"] * 2, [[1]], [2**70], [-1], [0.5] * 16, {}, {"a": 1}, [{}]),
    *({"rope_type": []}, {"factor": "2"}, {"full_attention": 5}, {"rope_type": "linear"}),
]
YARN = {
    **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    **{"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0},
}
FAMILIES = ("llama", "gemma3_text", "qwen3_moe", "phi3")


def outcome(folder):
    """None if the folder loads, else its error, which must be one line about the folder."""
    try:
        fill(HFCheckpoint(folder), np.dtype(np.float32))
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message[:3000]
        assert str(folder) in message, message
        return message
    return None


def cases() -> list[tuple[str, str, str, int]]:
    """Family, the object with the field, the field's name, and the index of the value in VALUES."""
    found = []
    for family in FAMILIES:
        own = ["model_type", "architectures", *FIELDS, *FIELDS_OF.get(family, ())]
        places = [("", name) for name in own] + [("rope_scaling", name) for name in ROPE_FIELDS]
        found += [(family, *at, i) for at in places for i in range(len(VALUES))]
    return found


def check_field(folder, hf, family: str, outer: str, name: str, i: int) -> None:
    change = {name: VALUES[i]}
    if outer:
        change = {outer: {**YARN, **change}}
    (folder / "config.json").write_text(json.dumps({**hf, **change}))
    message = outcome(folder)
    kind = FIELDS.get(name) or FIELDS_OF.get(family, {}).get(name)
    kind = ROPE_FIELDS[name] if outer else kind
    if kind is not None and not kind.holds(VALUES[i]):
        assert message is not None, f"{name} = {VALUES[i]!r} was taken"
        assert "config.json: " in message and name in message, message


@pytest.fixture
def folders(tiny, write_hf, tmp_path):
    """Family -> a sound folder of it, and its config.json."""
    found = {}
    for family in FAMILIES:
        model = tiny(family)
        folder = write_hf(tmp_path / family, model.hf, model.tensors())
        assert outcome(folder) is None
        found[family] = folder, model.hf
    return found


def test_a_field_of_any_kind_and_size_loads_or_is_refused_by_name(folders):
    """A draw of all cases; the next test has all."""
    for case in random.Random(0).sample(cases(), 200):
        check_field(*folders[case[0]], *case)


@pytest.mark.slow
def test_every_value_of_every_field_loads_or_is_refused_by_name(folders):
    for case in cases():
        check_field(*folders[case[0]], *case)


def test_a_layer_count_beyond_the_files_is_refused_before_layers_are_built(folders):
    folder, hf = folders["llama"]
    (folder / "config.json").write_text(json.dumps({**hf, "num_hidden_layers": 1}))
    assert "no place for" in str(outcome(folder))
    for count in (3, 10_000, 16_384):
        (folder / "config.json").write_text(json.dumps({**hf, "num_hidden_layers": count}))
        message = outcome(folder)
        assert f"num_hidden_layers is {count}, but the safetensors files have 2" in str(message)
    (folder / "config.json").write_text(json.dumps({**hf, "num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match=r"config.json: num_hidden_layers must be"):
        load_config(folder)


@pytest.mark.parametrize("value", ["2", -1, True, 2.0, [2, "3"], [-1], {"a": 1}, [[2]], 2**70])
def test_ends_in_generation_config_that_are_no_tokens_are_refused(value, folders, one_line):
    folder, _ = folders["llama"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, str(folder / "generation_config.json"), "eos_token_id must be")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "x.index.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "5", "null", "{", "\0"])
def test_a_file_that_holds_no_json_object_is_named(name, text, folders, one_line):
    folder, _ = folders["llama"]
    name = "model.safetensors.index.json" if name == "x.index.json" else name
    (folder / name).write_text(text)
    with pytest.raises(ValueError) as error:
        load(folder)
    one_line(error.value, str(folder / name))


@pytest.mark.parametrize(
    "name", ["a" * 300, "./" + "a" * 5000, "b" * 300 + ".gguf", "~nobody-here/m"]
)
def test_a_name_that_no_file_can_have_is_not_found(name, one_line):
    for read in (load, load_config, load_tokenizer):
        with pytest.raises(FileNotFoundError) as error:
            read(name)
        one_line(error.value, "no model at", "no file can be there")
        assert len(str(error.value)) < 300


TOKENIZER_FIELDS = (
    *("tokenizer_class", "bos_token", "eos_token", "pad_token", "unk_token", "chat_template"),
    *("model_max_length", "added_tokens_decoder", "add_bos_token", "extra_special_tokens"),
    *("clean_up_tokenization_spaces", "padding_side", "auto_map", "backend"),
)


def test_a_tokenizer_config_of_any_kind_loads_or_is_refused_in_one_line(tmp_path):
    tokenizer = byte_tokenizer(300)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    sound = json.loads(file.read_text())
    every = list(itertools.product(TOKENIZER_FIELDS, VALUES))
    texts = [json.dumps({**sound, k: v}) for k, v in random.Random(0).sample(every, 60)]
    for text in [*texts, "[" * 100_000, '{"a":' * 100_000, "[]", "5", "{"]:
        file.write_text(text)
        try:
            load_tokenizer(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error

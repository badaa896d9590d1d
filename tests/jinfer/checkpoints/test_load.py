"""What `load` takes: paths before names, and one line for whatever is not there."""

import subprocess
import sys

import pytest

from jinfer import load
from jinfer.checkpoints import default_model, locate
from jinfer.checkpoints.load import load_config, open_checkpoint


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/folder", "~/no-such-folder", "nothing.gguf", "a/b/c", ""]
)
def test_a_path_that_is_not_there_is_named(name, one_line):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    one_line(error.value, f"no model at {name!r}")


@pytest.mark.parametrize("name", ["some-org/no-such-model", "not-a-model", "bad name!", "a--b/c.."])
def test_a_name_that_the_hub_does_not_give_is_one_line(name, one_line, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for function in (load, load_config):
        with pytest.raises(FileNotFoundError) as error:
            function(name)
        one_line(error.value, repr(name), "'smollm2'")


def test_a_hub_name_is_loaded_from_its_snapshot(tiny, write_hf, tmp_path, monkeypatch):
    import huggingface_hub

    model = tiny("llama")
    folder = write_hf(tmp_path / "snapshot", model.hf, model.tensors())
    asked, fetched = [], []
    there = [
        *("config.json", "generation_config.json", "model-00001-of-00001.safetensors"),
        *("model.safetensors.index.json", "quantize_config.json", "hf_quant_config.json"),
        *("README.md", "consolidated.safetensors", "original/model.safetensors", "tf_model.h5"),
    ]

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        fetched.append(
            list(
                huggingface_hub.utils.filter_repo_objects(
                    there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
                )
            )
        )
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("org/model", revision="v1")[0].config == model.config
    assert load_config("org/model") == model.config
    assert asked == [("org/model", "v1"), ("org/model", None)]
    assert fetched == [there[:6], there[:2]]  # what says how weights are quantized too


def test_a_revision_of_something_local_is_refused(tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    for name in (folder, "smollm2"):
        with pytest.raises(ValueError) as error:
            load(name, revision="main")
        one_line(error.value, "revision='main'")


def test_files_of_other_kinds_are_refused(tiny, write_hf, tmp_path, one_line):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    with pytest.raises(ValueError) as error:
        load(folder / "model.safetensors")
    one_line(error.value, "not a .gguf file", "folder")


def test_an_empty_folder_is_no_model(tmp_path, one_line):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    one_line(error.value, "no config.json")


def test_what_is_on_disk_goes_before_the_default(tiny, write_hf, tmp_path, monkeypatch):
    model = tiny("llama")
    write_hf(tmp_path / "smollm2", model.hf, model.tensors())
    monkeypatch.chdir(tmp_path)
    assert load("smollm2")[0].config == model.config


def test_the_default_name_is_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "cache" / "model.gguf"
    monkeypatch.setattr(locate, "default_model_path", lambda: target)
    assert locate.locate("smollm2") == target
    assert default_model.DEFAULT_MODEL == "smollm2"


def test_a_checkpoint_opens_without_reading_tensors(tiny, write_hf, tmp_path):
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == model.config
    assert checkpoint.shapes["model.norm.weight"] == (64,)


def test_loading_needs_no_torch(tiny, write_hf, tmp_path):
    """Loads in a process where torch cannot be imported."""
    model = tiny("llama")
    folder = write_hf(tmp_path / "model", model.hf, model.tensors())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jinfer import load\n"
        f"print(load({str(folder)!r})[0].config.family)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "llama", done.stderr

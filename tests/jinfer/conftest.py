"""What tests of several folders share: the default model and the reference data."""

import pathlib

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> pathlib.Path:
    """The GGUF file of the default model, fetched into the cache if need be."""
    from jinfer.checkpoints.default_model import default_model_path

    try:
        return default_model_path()
    except (OSError, ValueError) as error:
        pytest.skip(f"the default model cannot be had: {error}")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """../shared/data: golden checkpoints, texts and prompts, not part of the project."""
    path = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no reference data: ../shared/data is absent")
    return path

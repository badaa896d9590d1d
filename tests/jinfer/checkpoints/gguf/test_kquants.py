"""GGUF encoders: what they write decodes to what they meant, and importance lowers its error."""

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from jinfer.checkpoints.gguf.kquants import BLOCK, encode_rows, fitting_type

# Relative error of the whole on normal weights: what each width can do, and little more.
ERRORS = {"Q8_0": 0.0065, "Q4_0": 0.09, "Q4_1": 0.085, "Q5_0": 0.045, "Q4_K": 0.075, "Q6_K": 0.02}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((48, 512)).astype(np.float32) * 0.05
    w[3] = 0
    w[4, :256] = 0
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)
    importance[7] = 0
    return w, importance


def decode(packed, name):
    return gguf.dequantize(packed, GGMLQuantizationType[name])


@pytest.mark.parametrize("name", BLOCK)
def test_importance_lowers_the_error_that_it_weighs(name, rows):
    w, importance = rows
    plain, weighted = encode_rows(w, name), encode_rows(w, name, importance)
    block, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert plain.shape == weighted.shape == (48, 512 // block * num_bytes)
    assert plain.dtype == weighted.dtype == np.uint8

    def error(packed):
        return float((importance * (decode(packed, name) - w) ** 2).sum())

    assert error(weighted) < 0.97 * error(plain)
    whole = np.linalg.norm(decode(plain, name) - w) / np.linalg.norm(w)
    assert whole < ERRORS[name]
    assert not decode(plain, name)[3].any() and not decode(weighted, name)[4, :256].any()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_weights_on_the_grid_are_met(name, rows):
    """What decodes exactly is nearly a fixed point: every field is where the decoder reads it."""
    on_grid = decode(encode_rows(rows[0], name), name)
    again = decode(encode_rows(on_grid, name), name)
    assert np.linalg.norm(again - on_grid) < 0.01 * np.linalg.norm(on_grid)


def test_rows_of_576_fall_back_as_llama_cpp_does():
    assert fitting_type("Q4_K", 576) == "Q5_0" and fitting_type("Q6_K", 576) == "Q8_0"
    assert fitting_type("Q4_K", 1536) == "Q4_K" and fitting_type("Q4_0", 576) == "Q4_0"
    for name, words in (("Q4_K", "Q5_0 holds rows of whole blocks of 32, got 100"), ("Q3", "'Q3'")):
        with pytest.raises(ValueError, match=words):
            fitting_type(name, 100)


def test_chunks_do_not_show(rows, monkeypatch):
    w, importance = rows
    whole = encode_rows(w, "Q4_K", importance)
    monkeypatch.setattr("jinfer.checkpoints.gguf.kquants.CHUNK_BLOCKS", 40)
    np.testing.assert_array_equal(encode_rows(w, "Q4_K", importance), whole)


@pytest.mark.parametrize("name", sorted(BLOCK))
def test_weights_past_f16_are_refused_rather_than_written_as_nan(name, rows):
    spoilt = rows[0].copy()
    spoilt[0, 0] = 1e8
    with pytest.raises(ValueError, match=f"{name} takes weights up to 65504"):
        encode_rows(spoilt, name)


def test_nan_is_no_code():
    w = np.zeros((1, 256), np.float32)
    w[0, 3] = np.nan
    with pytest.raises(ValueError, match="Q6_K takes finite weights only"):
        encode_rows(w, "Q6_K")

"""The embedded default model end to end, against transformers with the same weights."""

import json
import math
import os

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")

import transformers  # noqa: E402

from jinfer import LLM, BeamSearchParams, SamplingParams  # noqa: E402
from jinfer.cli import main as cli  # noqa: E402

NUM_NEW_TOKENS = 24
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a paper clip.",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Name the planets of the solar system.",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the river,",
    "The three laws of thermodynamics are",
    "Summarize: The quick brown fox jumps over the lazy dog.",
    "What does HTTP stand for?",
    "Tell me a joke about computers.",
    "How do I sort a list in Python?",
    "日本の首都はどこですか。",
    "Complete the sequence: 2, 4, 8, 16,",
    "What are the benefits of regular exercise for older adults who live alone?",
]


@pytest.fixture(scope="module")
def llm(smollm2_path):
    return LLM(smollm2_path, max_model_len=256, max_num_seqs=20, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def oracle(llm, smollm2_path):
    """transformers' Llama with our float weights, renamed and transposed back."""
    config = llm.model.config
    hf = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope.theta,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf)
    model.load_state_dict(
        dict(torch_names(llm.loop.engine.runner.params)), strict=False, assign=True
    )
    model.tie_weights()
    # Buffers made on the meta device have no values yet.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf)
    assert all(not p.is_meta for p in model.parameters())
    model.generation_config.eos_token_id = None  # or else it would end rows at config.eos_token_id
    return model.eval()


def torch_names(params):
    def tensor(x):
        return torch.from_numpy(np.asarray(jax.device_get(x)).T.copy())

    yield "model.embed_tokens.weight", tensor(params["embed"]["w"].T)
    yield "model.norm.weight", tensor(params["final_norm"]["scale"])
    for i, layer in enumerate(params["layers"]):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", tensor(layer["attn_norm"]["scale"])
        yield prefix + "post_attention_layernorm.weight", tensor(layer["mlp_norm"]["scale"])
        for name in "qkvo":
            yield prefix + f"self_attn.{name}_proj.weight", tensor(layer["attn"][name]["w"])
        for name in ("gate", "up", "down"):
            yield prefix + f"mlp.{name}_proj.weight", tensor(layer["mlp"][name]["w"])


@pytest.mark.thorough
def test_greedy_tokens_of_twenty_prompts_equal_those_of_transformers(llm, oracle):
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.inference_mode():
        rows = oracle.generate(
            tokens,
            attention_mask=mask,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0
            ),
        )
    expected = rows[:, longest:].tolist()
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_search_equals_that_of_transformers(llm, oracle, early_stopping):
    tokenizer = llm.get_tokenizer()
    for beam_width, length_penalty, question in ((2, 0.5, 0), (4, 1.0, 4), (4, 2.0, 12)):
        params = BeamSearchParams(
            beam_width=beam_width,
            max_tokens=12,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        ids = tokenizer.encode(QUESTIONS[question])
        (output,) = llm.beam_search([{"prompt_token_ids": ids}], params)
        with torch.inference_mode():
            want = oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                generation_config=transformers.GenerationConfig(
                    num_beams=beam_width,
                    num_return_sequences=beam_width,
                    max_new_tokens=12,
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=2,
                    return_dict_in_generate=True,
                    output_scores=True,
                ),
            )
        found = [text.tokens for text in output.sequences]
        assert found == [
            row[: len(text)] for row, text in zip(want.sequences.tolist(), found, strict=True)
        ]
        scores = [text.score for text in output.sequences]
        np.testing.assert_allclose(scores, want.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_a_bad_word_comes_in_none_of_its_spellings(llm):
    """ "Tokyo" is two tokens at the start of a text and one after a space, which came."""
    prompts = ["The capital of Japan is", "Cities of Japan:\n*"]
    for bad_words, is_met in ([], True), (["Tokyo"], False):
        params = SamplingParams(temperature=0, max_tokens=12, bad_words=bad_words)
        for output in llm.generate(prompts, params, use_tqdm=False):
            assert ("Tokyo" in output.outputs[0].text) == is_met, output.outputs[0].text
            assert output.outputs[0].error is None


def test_it_answers_in_a_chat(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    out = llm.chat(messages, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)[0]
    assert "Paris" in out.outputs[0].text
    assert out.outputs[0].finish_reason == "stop"  # its end token is 2
    assert out.outputs[0].token_ids[-1] == 2


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(llm, oracle, smollm2_path, shared_data, tmp_path):
    num_windows = int(os.environ.get("JINFER_TEST_WINDOWS", "2"))
    text, report = shared_data / "text" / "wiki.test.raw", tmp_path / "report.json"
    argv = ["eval", "--model", str(smollm2_path), "--text", str(text), "--json", str(report)]
    assert cli.main([*argv, "--windows", str(num_windows)]) == 0
    tokens = llm.get_tokenizer().encode(text.read_text(), add_special_tokens=False)
    losses = []
    for i in range(num_windows):
        window = torch.tensor([tokens[1024 * i : 1024 * (i + 1)]])
        with torch.no_grad():
            losses.append(float(oracle(input_ids=window, labels=window).loss))
    expected = math.exp(sum(losses) / num_windows)
    assert json.loads(report.read_text())["perplexity"] == pytest.approx(expected, abs=0.01)

"""The engine from outside: laws that hold for any mix of requests, on a tiny random model."""

import dataclasses
import json
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import byte_tokenizer, make_model

from jinfer import LLM, BeamSearchParams, RequestOutputKind, SamplingParams
from jinfer.checkpoints import tokenizer
from jinfer.config import memory
from jinfer.setup.options import sampling_defaults, take_tokenizer

VOCAB = 300
MODEL = make_model(VOCAB, max_position_embeddings=256, eos_token_ids=(7,))
LIMITS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 24, "block_size": 8}


def make_tokenizer():
    tokenizer = byte_tokenizer(VOCAB)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def make_llm(params):
    def make(**options):
        return LLM(MODEL, params=params, tokenizer=make_tokenizer(), **{**LIMITS, **options})

    return make


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm()


@pytest.fixture(autouse=True)
def pages_are_whole(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert not llm.has_unfinished_requests()
        while llm.loop.engine.has_work():
            llm.step()
        llm.check_integrity()
        metrics = llm.get_metrics()
        assert metrics["num_free_pages"] + metrics["num_cached_pages"] == metrics["num_pages"]


def make_prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(10, VOCAB, n).tolist() for n in lengths]


MIXED_LENGTHS = (1, 3, 7, 8, 9, 16, 23, 24, 25, 40, 70)  # around pages of 8 and chunks of 24
MIXED_PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=1.0, seed=5, max_tokens=17),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=6, max_tokens=9),
    SamplingParams(temperature=1.2, min_p=0.05, seed=7, max_tokens=30, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=25, presence_penalty=0.7, frequency_penalty=0.4),
    SamplingParams(temperature=0, max_tokens=12, min_tokens=12, logit_bias={7: 5.0}),
    SamplingParams(temperature=1.0, seed=8, max_tokens=15, allowed_token_ids=list(range(40, 90))),
    SamplingParams(temperature=0, max_tokens=10, logprobs=3),
    SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2),
    SamplingParams(temperature=0.5, seed=9, max_tokens=22, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=10, max_tokens=14, bad_words=["ab", "c"]),
]


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(make_llm):
    """Each of the mixed requests, run by itself."""
    llm = make_llm()
    prompts = make_prompts(0, MIXED_LENGTHS)
    return [
        llm.generate([prompt], params, use_tqdm=False)[0]
        for prompt, params in zip(prompts, MIXED_PARAMS)
    ]


def run_mixed(llm, order=None):
    prompts = make_prompts(0, MIXED_LENGTHS)
    order = list(range(len(prompts))) if order is None else order
    outputs = llm.generate(
        [prompts[i] for i in order], [MIXED_PARAMS[i] for i in order], use_tqdm=False
    )
    by_place = dict(zip(order, outputs))
    return [by_place[i] for i in range(len(prompts))]


def test_greedy_tokens_are_those_of_the_dense_forward_pass(llm, params):
    prompt = make_prompts(1, [19])[0]
    out = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    text = jnp.asarray(prompt + out[0].outputs[0].token_ids, jnp.int32)
    best = np.asarray(MODEL.logits(params, text)).argmax(-1)
    assert best[18:-1].tolist() == out[0].outputs[0].token_ids


@pytest.mark.parametrize("seed", [0, 1])
def test_a_request_gets_the_same_tokens_with_any_batch_mates(llm, alone, seed):
    order = np.random.default_rng(seed).permutation(len(MIXED_LENGTHS)).tolist()
    assert tokens_of(run_mixed(llm, order)) == tokens_of(alone)
    assert len({tuple(tokens) for tokens in tokens_of(alone)}) == len(alone)


def test_preempted_requests_give_the_same_tokens(make_llm, alone):
    llm = make_llm(num_gpu_blocks_override=17)
    assert tokens_of(run_mixed(llm)) == tokens_of(alone)
    assert llm.get_metrics()["num_preemptions"] > 0


def test_chunked_prefill_gives_the_tokens_of_whole_prefill(make_llm, alone):
    llm = make_llm(enable_chunked_prefill=False, max_num_batched_tokens=128)
    assert tokens_of(run_mixed(llm)) == tokens_of(alone)


def test_several_steps_on_the_device_give_the_tokens_of_single_steps(make_llm, alone):
    llm = make_llm(num_decode_steps=5)
    assert tokens_of(run_mixed(llm)) == tokens_of(alone)
    greedy = SamplingParams(temperature=0, max_tokens=23, ignore_eos=True)
    before = llm.get_metrics()["num_plans"]
    llm.generate(make_prompts(2, [5]), greedy)
    assert llm.get_metrics()["num_plans"] - before == 1 + 5  # a prefill and ceil(22 / 5) programs


def test_nothing_compiles_after_warmup(make_llm):
    llm = make_llm(num_decode_steps=2, max_logprobs=4)
    llm.warmup()
    before = llm.num_compilations
    run_mixed(llm)
    everything = SamplingParams(
        temperature=0.9,
        top_k=5,
        top_p=0.8,
        min_p=0.01,
        seed=1,
        max_tokens=6,
        min_tokens=2,
        logprobs=-1,
        prompt_logprobs=-1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias={3: 1.0},
        bad_words=["zz"],
        stop=["never to be seen"],
        n=3,
    )
    llm.generate(make_prompts(3, [1, 9, 30, 100]), everything, use_tqdm=False)
    assert llm.num_compilations == before
    # The counter counts: another shape is one more program.
    jax.jit(lambda x: x * 2)(jnp.zeros(before + 3)).block_until_ready()
    assert llm.num_compilations > before


def test_steps_run_ahead_of_the_host(make_llm, monkeypatch):
    llm = make_llm()
    runner = llm.loop.engine.runner
    events = []
    launch, fetch = runner.launch, runner.fetch
    monkeypatch.setattr(
        runner, "launch", lambda plan: (events.append(("launch", plan.step_id)), launch(plan))[1]
    )
    monkeypatch.setattr(
        runner, "fetch", lambda l: (events.append(("fetch", l.plan.step_id)), fetch(l))[1]
    )
    llm.generate(make_prompts(4, [5]), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert events.index(("launch", 3)) < events.index(("fetch", 2))
    assert [step for kind, step in events if kind == "fetch"] == list(range(8))


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_every_output_kind_ends_with_the_same_text(llm, kind):
    prompt = make_prompts(5, [6])[0]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    whole = llm.generate([prompt], params)[0].outputs[0]
    llm.add_request("a", prompt, dataclasses.replace(params, output_kind=kind))
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    texts = [output.outputs[0].text for output in outputs]
    token_ids = [output.outputs[0].token_ids for output in outputs]
    if kind is RequestOutputKind.DELTA:
        assert len(texts) > 1
        assert "".join(texts) == whole.text
        assert [t for ids in token_ids for t in ids] == whole.token_ids
    else:
        assert (texts[-1], token_ids[-1]) == (whole.text, whole.token_ids)
        assert len(texts) == (1 if kind is RequestOutputKind.FINAL_ONLY else 12)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_streams_join_to_the_final_text(llm):
    prompts = make_prompts(6, [4, 30])
    params = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=25, n=2),
        SamplingParams(temperature=0, max_tokens=40, stop=["b"]),
    ]
    whole = llm.generate(prompts, params)
    texts = {}
    for output in llm.stream(prompts, params):
        for completion in output.outputs:
            key = (output.request_id, completion.index)
            texts[key] = texts.get(key, "") + completion.text
    expected = [completion.text for output in whole for completion in output.outputs]
    assert [texts[key] for key in sorted(texts)] == expected
    assert any(expected)


def test_closing_a_stream_frees_the_request(llm):
    stream = llm.stream("hello", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.has_unfinished_requests()


def test_n_samples_differ_and_the_first_is_that_of_n_1(llm):
    prompt = make_prompts(7, [9])[0]
    one = SamplingParams(temperature=1.0, seed=11, max_tokens=12)
    single = llm.generate([prompt], one)[0].outputs[0].token_ids
    several = llm.generate([prompt], dataclasses.replace(one, n=3))[0].outputs
    assert [completion.index for completion in several] == [0, 1, 2]
    assert several[0].token_ids == single
    assert len({tuple(completion.token_ids) for completion in several}) == 3


def test_logprobs_are_those_of_the_dense_forward_pass(llm, params):
    prompt = make_prompts(8, [31])[0]  # more than a chunk
    out = llm.generate(
        [prompt], SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    )[0]
    completion = out.outputs[0]
    text = jnp.asarray(prompt + completion.token_ids, jnp.int32)
    expected = np.asarray(jax.nn.log_softmax(MODEL.logits(params, text)))
    assert out.prompt_logprobs[0] is None
    rows = out.prompt_logprobs[1:] + completion.logprobs
    assert len(rows) == len(text) - 1
    for place, (row, k) in enumerate(zip(rows, [2] * 30 + [3] * 5)):
        token = int(text[place + 1])
        assert next(iter(row)) == token
        best = np.argsort(-expected[place], kind="stable")[:k]
        assert set(row) == {token, *best.tolist()}
        for token, logprob in row.items():
            assert logprob.logprob == pytest.approx(expected[place, token], abs=1e-4)
            assert logprob.rank == 1 + (expected[place] > expected[place, token]).sum()
            assert logprob.decoded_token == llm.get_tokenizer().decode([token])
    assert completion.cumulative_logprob == pytest.approx(
        sum(row[t].logprob for row, t in zip(completion.logprobs, completion.token_ids))
    )


def test_minus_one_asks_for_the_logprobs_of_the_whole_vocabulary(llm):
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    out = llm.generate(make_prompts(9, [3]), params)[0]
    for row in out.prompt_logprobs[1:] + out.outputs[0].logprobs:
        assert set(row) == set(range(VOCAB))
        assert sum(np.exp(x.logprob) for x in row.values()) == pytest.approx(1.0, abs=1e-4)
        others = list(row.values())[1:]  # the token itself comes first
        assert others == sorted(others, key=lambda x: (-x.logprob, x.rank))
        values = np.array([x.logprob for x in row.values()])
        for x in row.values():
            assert (values > x.logprob).sum() < x.rank <= (values >= x.logprob).sum()


@pytest.mark.parametrize("ask", ["generate", "stream", "step"])
def test_logprobs_are_formatted_once_however_many_steps_there_are(llm, monkeypatch, ask):
    num_formatted = 0

    def count(entry, params, formatter=llm.client.format_logprobs):
        nonlocal num_formatted
        num_formatted += 1
        return formatter(entry, params)

    monkeypatch.setattr(llm.client, "format_logprobs", count)
    prompt = make_prompts(15, [40])[0]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1)
    params = dataclasses.replace(params, ignore_eos=True)
    if ask == "step":
        llm.add_request("mine", prompt, params)
        outputs = []
        while llm.has_unfinished_requests():
            outputs += llm.step()
    else:
        outputs = list(getattr(llm, ask)([prompt], params))
    assert num_formatted == 39 + 12
    last, whole = outputs[-1], llm.generate([prompt], params)[0]
    assert last.prompt_logprobs == whole.prompt_logprobs
    rows = [row for output in outputs for row in output.outputs[0].logprobs]
    rows = last.outputs[0].logprobs if ask == "step" else rows
    assert rows == whole.outputs[0].logprobs
    assert last.outputs[0].cumulative_logprob == whole.outputs[0].cumulative_logprob


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, BeamSearchParams(beam_width=2, max_tokens=2)])
def test_params_of_another_kind_are_named(llm, wrong):
    for ask in (llm.generate, llm.stream):
        with pytest.raises(TypeError, match=f"must be SamplingParams, got {type(wrong).__name__}"):
            list(ask([[11]], wrong))


@pytest.mark.parametrize("most", [VOCAB, 2 * VOCAB, -1])
def test_max_logprobs_up_to_the_vocabulary_still_give_the_likeliest(llm, make_llm, most):
    prompt = make_prompts(16, [5])
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=3, prompt_logprobs=20)
    expected = llm.generate(prompt, params)[0]
    roomy = make_llm(max_logprobs=most)
    out = roomy.generate(prompt, params)[0]
    assert out.outputs[0].logprobs == expected.outputs[0].logprobs
    assert out.prompt_logprobs == expected.prompt_logprobs
    every = roomy.generate(prompt, dataclasses.replace(params, logprobs=VOCAB))[0]
    assert len(every.outputs[0].logprobs[0]) == VOCAB


@pytest.mark.parametrize("name", ["{folder}", "~/model", "some/model"])
def test_defaults_of_sampling_come_from_the_models_folder_however_it_is_named(
    tmp_path, monkeypatch, name
):
    folder = tmp_path / "model"
    folder.mkdir()
    given = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "eos_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(given))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: folder)
    name = name.format(folder=folder)
    expected = {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert sampling_defaults(name, "auto") == expected
    assert sampling_defaults(name, "none") == {}


@pytest.mark.parametrize("others", [0, 2**20])
def test_the_pool_leaves_room_for_what_others_hold_on_the_device(monkeypatch, params, others):
    """What is in use counts the weights, too; a runtime that does not tell counts nothing."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    stats = {"bytes_limit": 2**24, "bytes_in_use": weights + others if others else 0}
    real = jax.local_devices()[0]
    device = types.SimpleNamespace(platform=real.platform, device_kind=real.device_kind)
    device.memory_stats = lambda: stats
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    found = {}
    monkeypatch.setattr(memory, "kv_budget_bytes", lambda **known: found.update(known) or 0)
    with pytest.raises(ValueError, match="no room for a KV cache"):
        LLM(MODEL, params=params, skip_tokenizer_init=True, **LIMITS)
    assert (found["device_bytes"], found["used_bytes"]) == (2**24, weights + others)


def test_by_default_the_pool_holds_as_many_of_the_longest_sequences_as_may_run(make_llm):
    llm = make_llm(max_model_len=9, block_size=8, max_num_seqs=4, max_num_batched_tokens=64)
    assert llm.get_metrics()["num_pages"] == 4 * 2
    for i, prompt in enumerate(make_prompts(16, [8] * 4)):
        llm.add_request(str(i), prompt, SamplingParams(temperature=0, ignore_eos=True))
    llm.step()
    assert llm.get_metrics()["num_admissions"] == 4
    while llm.has_unfinished_requests():
        llm.step()


def test_a_stop_string_ends_the_text_before_it(llm):
    prompt = make_prompts(10, [5])[0]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    text = llm.generate([prompt], params)[0].outputs[0].text
    stop = next(c for c in text[3:] if c.isascii() and text.index(c) > 0)
    out = llm.generate([prompt], dataclasses.replace(params, stop=[stop]))[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == (
        text[: text.index(stop)],
        "stop",
        stop,
    )


def test_chat_applies_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0, max_tokens=4)
    out = llm.chat(messages, params, use_tqdm=False)[0]
    assert out.prompt == llm.get_tokenizer().decode(out.prompt_token_ids) == "user: hi\n"
    assert tokens_of(llm.chat([messages, messages], params)) == [out.outputs[0].token_ids] * 2


def test_new_weights_serve_without_a_copy_or_a_compilation(make_llm, params):
    llm = make_llm()
    prompt = make_prompts(11, [6])
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    old = tokens_of(llm.generate(prompt, greedy))
    other = MODEL.init(jax.random.key(99))
    before = llm.num_compilations
    llm.update_weights(other)
    new = tokens_of(llm.generate(prompt, greedy))
    assert llm.num_compilations == before
    served, given = llm.loop.engine.runner.params["embed"]["w"], other["embed"]["w"]
    assert served.unsafe_buffer_pointer() == given.unsafe_buffer_pointer()
    text = jnp.asarray(prompt[0] + new[0], jnp.int32)
    assert np.asarray(MODEL.logits(other, text)).argmax(-1)[5:-1].tolist() == new[0] != old[0]
    for wrong in ({**other, "embed": {"w": other["embed"]["w"][:-1]}}, {"embed": other["embed"]}):
        with pytest.raises(ValueError, match="params"):
            llm.update_weights(wrong)


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        (list(range(128)), {}, "no room for output"),
        ([1, VOCAB], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"),
        ([1], {"logprobs": 21}, "max_logprobs"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "vocabulary"),
        ([1], {"allowed_token_ids": [7], "min_tokens": 3}, "no token to sample"),
        ({"text": "x"}, {}, "prompt_token_ids"),
        ({"prompt": "x", "prompt_token_ids": [1]}, {}, "prompt_token_ids"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(llm, prompt, fields, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([make_prompts(12, [4])[0], prompt], SamplingParams(**fields), use_tqdm=False)
    assert not llm.has_unfinished_requests()
    out = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(out[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 1000}, ValueError, "256 positions"),
        ({"max_model_len": 64, "num_gpu_blocks_override": 2}, ValueError, "KV pool of 16"),
        ({"kv_cache_memory_bytes": 10}, ValueError, "no room for a KV cache"),
        (
            {"max_model_len": -5},
            ValueError,
            "max_model_len must be a positive integer below .*, got -5",
        ),
        ({"max_model_len": "64"}, ValueError, "max_model_len must be an integer, got '64'"),
        (
            {"kv_cache_memory_bytes": 1e6},
            ValueError,
            "kv_cache_memory_bytes must be .*, got 1000000",
        ),
        (
            {"kv_cache_memory_bytes": "1GiB"},
            ValueError,
            "kv_cache_memory_bytes must be .*, got '1GiB'",
        ),
        (
            {"num_gpu_blocks_override": 40.5},
            ValueError,
            "num_gpu_blocks_override must be .*, got 40.5",
        ),
        ({"cpu_offload_gb": "1"}, ValueError, "cpu_offload_gb must be a finite number, got '1'"),
        (
            {"cpu_offload_gb": float("inf")},
            ValueError,
            "cpu_offload_gb must be a finite number, got inf",
        ),
        ({"block_size": 12}, ValueError, "power of two"),
        ({"max_num_seqs": 10**30}, ValueError, "max_num_seqs must be at most 65536, got 10"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs"),
        ({"max_logprobs": -2}, ValueError, "max_logprobs must be 0 or more"),
        ({"gpu_memory_utilization": 1.5}, ValueError, "gpu_memory_utilization must lie in"),
        ({"max_num_batched_tokens": 2}, ValueError, "at least max_num_seqs"),
        ({"kv_cache_dtype": "int3"}, ValueError, "kv_cache_dtype"),
        ({"tensor_parallel_size": 2}, ValueError, "one device"),
        ({"dtype": "bfloat16"}, ValueError, "served as they are, in float32"),
        ({"revision": "main"}, ValueError, "this model is in memory"),
        ({"skip_tokenizer_init": True}, ValueError, "skip_tokenizer_init"),
        ({"max_num_seq": 2}, TypeError, "did you mean max_num_seqs"),
    ],
)
def test_options_that_cannot_be_met_are_refused_by_name(make_llm, options, error, message):
    with pytest.raises(error, match=message):
        make_llm(**options)


def test_a_revision_is_of_the_model_not_of_a_tokenizer_from_elsewhere(monkeypatch):
    asked = []
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda name, revision: asked.append(revision))
    take_tokenizer(None, "org/model", "v1")
    take_tokenizer("org/other", "org/model", "v1")
    assert asked == ["v1", None]


def test_bfloat16_weights_and_kv_serve(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    llm = LLM(MODEL, params=half, skip_tokenizer_init=True, **LIMITS)
    assert llm.loop.engine.runner.pool.kv.dtype == "bfloat16"
    assert llm.loop.engine.runner.pool.kv.k.dtype.itemsize == 2
    out = llm.generate(make_prompts(13, [9, 30]), SamplingParams(temperature=0, max_tokens=8))
    assert all(1 <= len(tokens) <= 8 for tokens in tokens_of(out))

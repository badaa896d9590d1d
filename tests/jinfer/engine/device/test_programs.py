"""The table of programs is what an engine calls: no more, and no less."""

import functools
import itertools

import jax
import numpy as np
import pytest
from tiny_engines import VOCAB, add, make_engine, make_params, run

from jinfer.config.beam_params import BeamSearchParams
from jinfer.config.sampling_params import SamplingParams
from jinfer.engine.beam.searcher import BeamSearcher
from jinfer.engine.device.compile_counter import compile_counter
from jinfer.engine.device.programs import Program, compile_all
from jinfer.steps import beam, decode, draft, forward, logprobs, pool, tree, verify

POISON = 5  # the token whose embedding is NaN
JITTED = {
    beam: ["beam_step"],
    decode: ["decode_loop"],
    draft: ["draft_step", "feed_step"],
    forward: ["forward_step"],
    logprobs: ["top_logprobs", "log_softmax", "prompt_logprobs", "prompt_log_softmax"],
    pool: ["clear_pages", "copy_pages", "read_pages", "write_pages", "reset_row"],
    tree: ["tree_step"],
    verify: ["verify_step"],
}


@pytest.fixture(scope="module")
def params():
    params = make_params()
    embed = params["embed"]["w"].at[POISON].set(np.nan)
    return {**params, "embed": {**params["embed"], "w": embed}}


@pytest.fixture
def called(monkeypatch):
    """The keys of all programs that are called through the modules of `jinfer.steps`."""
    keys = set()

    class Spy:
        def __init__(self, fn):
            functools.update_wrapper(self, fn)
            self.lower, self.eval_shape = fn.lower, fn.eval_shape
            self._fn = fn

        def __call__(self, *args, **static):
            keys.add(Program("", "", self, args, static).key)
            return self._fn(*args, **static)

    for module, names in JITTED.items():
        for name in names:
            monkeypatch.setattr(module, name, Spy(getattr(module, name)))
    return keys


def texts(*lengths):
    """Prompts that repeat themselves, so that n-grams are found; all begin alike."""
    words = np.random.default_rng(0).integers(10, VOCAB, 3).tolist()
    return [(words * 20)[:length] for length in lengths]


def serve(engine, prompts, **fields):
    params = SamplingParams(detokenize=False, **{"max_tokens": 9, **fields})
    requests = [add(engine, f"request {i}", prompt, params) for i, prompt in enumerate(prompts)]
    run(engine)
    return [request.finish_reason for request in requests]


class EvenTokens:
    """Masks that allow every second token."""

    def mask(self, token_ids, drafts):
        return np.full(-(-VOCAB // 32), 0x55555555, np.uint32)


def serve_masked(engine):
    """A request with token masks, one without beside it."""
    params = SamplingParams(detokenize=False, max_tokens=9, temperature=0, ignore_eos=True)
    for lengths in ((3,), (3, 30)):
        first, *others = texts(*lengths)
        masked = add(engine, "masked", first, params, token_masks=EvenTokens())
        for prompt in others:
            add(engine, "free", prompt, params)
        run(engine)
        assert masked.finish_reason == "length"
        assert not any(token % 2 for token in masked.output_token_ids)


def serve_all_kinds(engine):
    """Requests alone and together, short and in chunks, with all logprobs and masks, with NaN."""
    plain = {"temperature": 0, "ignore_eos": True}
    every = {"logprobs": -1, "prompt_logprobs": -1}
    for length in (3, 13, 30):
        serve(engine, texts(length), **plain)
        serve(engine, texts(length), **plain, **every)
    serve(engine, texts(3, 13, 30), **plain, **every)
    serve(engine, texts(12, 40), **plain)
    serve(engine, texts(12, 40, 9), temperature=1.0, **every)
    for more in ({}, every):  # decodes that no drafts can follow, and drafts beside a chunk
        for lengths in ((3,), (3, 4)):
            serve(engine, texts(*lengths), **{**plain, "max_tokens": 2}, **more)
        params = SamplingParams(detokenize=False, max_tokens=20, **plain, **more)
        first = add(engine, "first", texts(14)[0], params)
        while len(first.output_token_ids) <= 8:
            engine.step()
        serve(engine, texts(40), **plain, **more)
    serve_masked(engine)
    assert serve(engine, [[1, 2, POISON]], **plain) == ["error"]
    known_in_part = [*texts(20)[0][:12], 7, 8, 9]
    assert serve(engine, [*texts(20), known_in_part], **plain) == ["length"] * 2


THOROUGH = ("ngram", "lookahead", "self", "draft", "medusa")
METHODS = [None, *(pytest.param(method, marks=pytest.mark.thorough) for method in THOROUGH)]


def warm_up(engine, table):
    """Compiles as `Runner.warmup` does, and checks that no program is compiled twice."""
    jax.clear_caches()
    before = compile_counter.count
    compile_all(table)
    assert compile_counter.count - before == len(table)


def check(engine, table, called, serve):
    warm_up(engine, table)
    before = compile_counter.count
    serve(engine)
    assert compile_counter.count == before
    names = {program.key: program.name for program in table}
    assert sorted(names[key] for key in names.keys() - called) == []
    assert called <= names.keys()


@pytest.mark.parametrize("method", METHODS)
def test_serving_calls_what_the_table_has_and_compiles_nothing(params, called, method):
    engine = make_engine(params, method)
    check(engine, engine.runner.programs(), called, serve_all_kinds)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["ngram", "medusa"])
def test_with_pauses_of_speculation_and_pages_on_the_host(params, called, method):
    """Without drafts steps are plain ones, also where drafts are trees."""
    fields = {"adaptive": True}
    engine = make_engine(params, method, fields=fields, num_pages=9, num_host_pages=20)
    length = engine.scheduler.speculation.length
    turns = itertools.cycle((0, 0, length.sizes[-1], length.sizes[-1]))
    length.choose = lambda lengths, may_try: next(turns) if any(lengths) else 0
    length.num_steps_without = lambda lengths: 2

    def serve(engine):
        for _ in range(2):
            serve_all_kinds(engine)

    check(engine, engine.runner.programs(), called, serve)


@pytest.mark.parametrize("method", [None, pytest.param("medusa", marks=pytest.mark.thorough)])
def test_beam_searches_call_what_the_table_has_for_them(params, called, method):
    engine = make_engine(params, method, max_num_seqs=4)
    search = BeamSearcher(engine, BeamSearchParams(beam_width=2, max_tokens=12))
    rest = {program.key for program in engine.runner.programs()}
    table = engine.runner.programs(search.sizes)

    def serve(engine):
        for prompts in (texts(9), texts(30, 50)):
            for prompt in prompts:
                search.add(prompt)
            while search.has_work():
                search.step()

    table = [p for p in table if p.key not in rest or p.name == "forward T=16 S=1"]
    own = [p for p in table if p.key not in rest]
    assert {p.kind for p in own} == {"beams", "copy beams"} | ({"forward"} if method else set())
    check(engine, table, called, serve)


@pytest.mark.thorough
def test_compiling_in_threads_keeps_the_contexts_of_the_caller(params):
    """A step traced for one matmul precision is not what another one calls."""
    engine = make_engine(params)
    with jax.default_matmul_precision("highest"):
        warm_up(engine, engine.runner.programs())
        before = compile_counter.count
        serve(engine, texts(3), temperature=0)
        assert compile_counter.count == before
    serve(engine, texts(3), temperature=0)
    assert compile_counter.count > before

"""The Python door: LLM(...), generate, chat, stream, beam_search, requests, on a tiny model."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tiny_models import byte_tokenizer, make_model

from fuzzing import python_fields as fields_of
from fuzzing import values
from fuzzing.oracle import Case, MismatchError, expect, shorten
from fuzzing.reference import (
    Reference,
    check_end,
    check_entry,
    check_logprobs,
    check_tokens,
    log_softmax,
)

VOCAB = 300
MAX_LEN = 64
EOS = (7,)
LIMITS = {
    "max_model_len": MAX_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "block_size": 8,
}
CONTROL = "control"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# name -> (options of LLM, whether its logits are those of the dense forward pass)
ENGINES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "small pool": ({"num_gpu_blocks_override": 10, "num_decode_steps": 3}, True),
    "n-grams": ({"speculative_config": {"method": "ngram", "adaptive": False}}, True),
    "self": ({"speculative_config": {"method": "self", "format": "int4-g32"}}, True),
    "lookahead": (
        {"speculative_config": {"method": "lookahead", "window": 3, "ngram_size": 3}},
        True,
    ),
    "int8 KV": ({"kv_cache_dtype": "int8"}, False),
    "no tokenizer": ({"skip_tokenizer_init": True}, True),
    "no cache": ({"enable_prefix_caching": False, "num_decode_steps": 4}, True),
}


def make_tokenizer() -> Any:
    """Returns a tokenizer of bytes with a chat template."""
    tokenizer = byte_tokenizer(VOCAB)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make() -> PythonDoor:
    """Returns the door."""
    return PythonDoor()


class PythonDoor:
    """Engines of all kinds over one tiny model."""

    name = "python"

    def __init__(self) -> None:
        self.model = make_model(VOCAB, max_position_embeddings=128, eos_token_ids=EOS)
        self.params = self.model.init(jax.random.key(0))
        self.tokenizer = make_tokenizer()
        self.reference = Reference(self.model, self.params, width=2 * MAX_LEN)
        self.expected = self.reference.greedy(self.tokenizer.encode(CONTROL), 6)
        self.engines: dict[str, Any] = {}
        self.last: Any = None  # the engine of the last case
        self.kinds = [
            (10, self._sampling_case),
            (3, self._prompt_case),
            (3, self._llm_case),
            (2, self._chat_case),
            (2, self._stream_case),
            (3, self._beam_case),
            (2, self._speculative_case),
            (2, self._request_case),
        ]

    # ------------------------------------------------------------------ the door

    def case(self, rng: random.Random) -> Case:
        """Returns a case of a kind drawn by weight."""
        make_case = rng.choices([k for _, k in self.kinds], [w for w, _ in self.kinds])[0]
        return make_case(rng)

    def make_llm(self, **options: Any) -> Any:
        """Returns an engine over the tiny model."""
        from jinfer import LLM

        own = {} if options.get("skip_tokenizer_init") is True else {"tokenizer": self.tokenizer}
        return LLM(self.model, params=self.params, **{**LIMITS, **own, **options})

    def engine(self, name: str) -> Any:
        """Returns the engine of this name, made when first asked for."""
        if name not in self.engines:
            self.engines[name] = self.make_llm(**ENGINES[name][0])
        self.last = self.engines[name]
        return self.last

    def _engine_name(self, rng: random.Random, without: str = "") -> str:
        """A name; the plain engine comes as often as all others together, it compiles the least."""
        others = [name for name in ENGINES if name not in ("plain", without)]
        return rng.choice(["plain", rng.choice(others)])

    def renew(self) -> None:
        """Forgets all engines."""
        self.engines.clear()
        self.last = None

    def control(self) -> None:
        """Asks the engine of the last case for a fixed greedy text."""
        if self.last is not None:
            self._control(self.last, is_exact=True)

    def _control(self, llm: Any, *, is_exact: bool) -> None:
        from jinfer import SamplingParams

        expect(not llm.has_unfinished_requests(), "requests are left behind")
        limit = llm.config.max_model_len
        if limit < 2:
            return  # room for a prompt or for an answer
        prompt = self.tokenizer.encode(CONTROL)[: max(1, limit - 1)]
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        found = list(output.outputs[0].token_ids)
        expect(len(found) == min(6, limit - len(prompt)), "the control is cut", len(found))
        kv_is_exact = llm.loop.engine.runner.cache.dtype == "float32"
        if is_exact and kv_is_exact and len(prompt) == len(CONTROL):
            expect(found == self.expected[: len(found)], "the control differs", found)
        while llm.loop.engine.has_work():
            llm.step()
        try:
            llm.check_integrity()
        except Exception as error:
            raise MismatchError("check_integrity fails", repr(error)) from error
        metrics = llm.get_metrics()
        free, cached = metrics["num_free_pages"], metrics["num_cached_pages"]
        expect(free + cached == metrics["num_pages"], "pages are lost", free, cached)

    # ------------------------------------------------------------------ sampling

    def _prompt(self, rng: random.Random) -> tuple[Any, list[int]]:
        """A valid prompt and its token ids."""
        text = rng.choice(["a", "hello", "ab" * 9, "été", "the cat the cat the", "x" * 40])
        ids = self.tokenizer.encode(text)
        if rng.random() < 0.3:
            ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 8, 9, 24, 25]))]
            return rng.choice([{"prompt_token_ids": ids}, ids, tuple(ids)]), ids
        return rng.choice([text, {"prompt": text}, {"prompt_token_ids": ids}]), ids

    def _sampling_case(self, rng: random.Random) -> Case:
        name = self._engine_name(rng)
        has_tokenizer = name != "no tokenizer"
        prompts = [self._prompt(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        given = [p if has_tokenizer else {"prompt_token_ids": ids} for p, ids in prompts]
        fields = fields_of.sampling(rng, VOCAB)
        repeats = rng.random() < 0.2

        def call(fields: dict[str, Any]) -> Any:
            from jinfer import SamplingParams

            params = SamplingParams(**fields)
            for key, value in fields.items():
                fields_of.check_kept(key, value, getattr(params, key, None))
            return params, self.engine(name).generate(given, params, use_tqdm=False)

        def check(fields: dict[str, Any], result: Any) -> None:
            params, outputs = result
            expect(len(outputs) == len(given), "another number of outputs")
            for output, (_, ids) in zip(outputs, prompts, strict=True):
                self._check_output(name, params, output, ids)
            if repeats and params.seed is not None and ENGINES[name][1] and has_tokenizer:
                again = self.engine("plain").generate(given, params, use_tqdm=False)
                for one, two in zip(outputs, again, strict=True):
                    for a, b in zip(one.outputs, two.outputs, strict=True):
                        expect(a.token_ids == b.token_ids, "a seed that gives other tokens", name)

        return Case(
            what="SamplingParams",
            fields=fields,
            call=call,
            check=check,
            show=lambda f: f"llm({name}).generate({shorten(given)}, SamplingParams({_kw(f)}))",
        )

    def _check_output(self, name: str, params: Any, output: Any, ids: list[int]) -> None:
        expect(output.finished, "an output that is not finished")
        expect(list(output.prompt_token_ids) == ids, "another prompt", output.prompt_token_ids)
        expect(len(output.outputs) == params.n, "another number of completions", params.n)
        is_exact = ENGINES[name][1]
        tokenizer = None if name == "no tokenizer" else self.tokenizer
        bad = []
        if tokenizer is not None:
            words = [word.lstrip() or word for word in params.bad_words]
            bad = [self.tokenizer.encode(word) for word in words]
        tolerance = 5e-3 if is_exact else 0.5
        for i, completion in enumerate(output.outputs):
            expect(completion.index == i, "completions in another order")
            check_tokens(
                self.reference, ids, params, completion, eos=EOS, bad=bad, is_exact=is_exact
            )
            check_logprobs(self.reference, ids, params, completion, tolerance)
            check_end(ids, params, completion, eos=EOS, tokenizer=tokenizer, max_model_len=MAX_LEN)
        self._check_prompt_logprobs(params, output, ids, tolerance)

    def _check_prompt_logprobs(self, params: Any, output: Any, ids: Any, tolerance: float) -> None:
        if params.prompt_logprobs is None:
            expect(output.prompt_logprobs is None, "prompt_logprobs that nobody asked for")
            return
        if any(c.finish_reason == "error" for c in output.outputs):
            return
        expect(output.prompt_logprobs is not None, "prompt_logprobs are missing")
        expect(len(output.prompt_logprobs) == len(ids), "prompt_logprobs of other length")
        expect(output.prompt_logprobs[0] is None, "a logprob of the first token")
        table = log_softmax(self.reference.logits(ids))
        for i, entry in enumerate(output.prompt_logprobs[1:], 1):
            expect(ids[i] in entry, "prompt_logprobs without the token", i)
            check_entry(table[i - 1], entry, params.prompt_logprobs, tolerance)

    # ------------------------------------------------------------------ prompts and requests

    def _prompt_case(self, rng: random.Random) -> Case:
        name = self._engine_name(rng)
        prompts = fields_of.prompts(rng, self.tokenizer, VOCAB)

        def call(fields: dict[str, Any]) -> Any:
            from jinfer import SamplingParams

            params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
            return self.engine(name).generate(fields["prompts"], params, use_tqdm=False)

        def check(fields: dict[str, Any], outputs: Any) -> None:
            wanted = fields_of.read_prompts(fields["prompts"], self.tokenizer)
            expect(wanted is not None, "a prompt taken that is none")
            expect(len(outputs) == len(wanted), "another number of outputs", len(outputs))
            for output, ids in zip(outputs, wanted, strict=True):
                found = list(output.prompt_token_ids)
                expect(found == ids, "another prompt", found[:20])
                expect(all(type(i) is int for i in found), "ids that are no ints")
                params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
                self._check_output(name, params, output, ids)

        from jinfer import SamplingParams

        return Case(
            what="prompts",
            fields={"prompts": prompts},
            call=call,
            check=check,
            names=("prompt", "token id", "cache_salt"),
            show=lambda f: f"llm({name}).generate({shorten(f.get('prompts'), 400)})",
        )

    def _request_case(self, rng: random.Random) -> Case:
        name = self._engine_name(rng)
        ids = [rng.randrange(VOCAB) for _ in range(5)]
        fields = {
            "request_id": values.pick(rng, values.one_of("a", "b", "7", "", values.LONE)),
            "priority": values.pick(rng, values.one_of(0, 1, -5, 10**30, np.int64(2))),
        }
        does_abort = rng.random() < 0.3
        num_live = rng.choice([0, 0, 1, 3])

        def call(fields: dict[str, Any]) -> Any:
            from jinfer import SamplingParams

            llm, found = self.engine(name), {}
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            others = [f"other-{i}" for i in range(num_live)]
            for other in others:
                llm.add_request(other, {"prompt_token_ids": ids}, params)
            try:
                prompt = {"prompt_token_ids": ids}
                llm.add_request(fields["request_id"], prompt, params, priority=fields["priority"])
                if does_abort:
                    llm.step()
                    llm.abort(fields["request_id"])
                while llm.has_unfinished_requests():
                    for output in llm.step():
                        if output.finished:
                            found[output.request_id] = output
            finally:
                for request_id in (*others, fields["request_id"]):
                    _abort(llm, request_id)
            return found

        def check(fields: dict[str, Any], found: Any) -> None:
            own = {fields["request_id"]} - ({fields["request_id"]} if does_abort else set())
            wanted = {f"other-{i}" for i in range(num_live)} | own
            expect(wanted <= set(found), "a request without output", set(found))
            tokens = {tuple(found[r].outputs[0].token_ids) for r in wanted}
            expect(len(tokens) <= 1 or not ENGINES[name][1], "equal requests differ", tokens)

        return Case(
            what="add_request",
            fields=fields,
            call=call,
            check=check,
            names=("request id",),
            show=lambda f: f"llm({name}).add_request({_kw(f)}) beside {num_live}",
        )

    def _stream_case(self, rng: random.Random) -> Case:
        name = self._engine_name(rng, "no tokenizer")
        prompts = [self._prompt(rng)[0] for _ in range(rng.choice([1, 2]))]
        fields = fields_of.sampling(rng, VOCAB)
        fields["seed"] = rng.choice([0, 5, 2**63])

        def call(fields: dict[str, Any]) -> Any:
            from jinfer import SamplingParams

            params = SamplingParams(**fields)
            if params.output_kind.name == "DELTA":
                params = dataclasses.replace(params, output_kind="FINAL_ONLY")
            llm, found = self.engine(name), {}
            for output in llm.stream(prompts, params):
                for c in output.outputs:
                    text, tokens, _ = found.get((output.request_id, c.index), ("", [], None))
                    key = (output.request_id, c.index)
                    found[key] = (text + c.text, [*tokens, *c.token_ids], c.finish_reason)
            return found, llm.generate(prompts, params, use_tqdm=False)

        def check(fields: dict[str, Any], result: Any) -> None:
            found, outputs = result
            whole = [(c.text, c.token_ids, c.finish_reason) for o in outputs for c in o.outputs]
            order = sorted(found, key=lambda key: (int(key[0].split("-")[1]), key[1]))
            pieces = [found[key] for key in order]
            if ENGINES[name][1]:
                expect(pieces == whole, "a stream that is not generate", pieces, whole)
            if not any(c[2] == "error" for c in whole):
                expect(len(pieces) == len(whole), "a stream that ends early")

        return Case(
            what="stream",
            fields=fields,
            call=call,
            check=check,
            show=lambda f: f"llm({name}).stream({shorten(prompts)}, SamplingParams({_kw(f)}))",
        )

    # ------------------------------------------------------------------ chat

    def _chat_case(self, rng: random.Random) -> Case:
        fields = fields_of.chat(rng)

        def call(fields: dict[str, Any]) -> Any:
            from jinfer import SamplingParams

            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            return self.engine("plain").chat(
                **{"sampling_params": params, **fields}, use_tqdm=False
            )

        def check(fields: dict[str, Any], outputs: Any) -> None:
            wanted = fields_of.render_chat(fields)
            if wanted is not None:
                found = [output.prompt for output in outputs]
                expect(found == wanted, "another rendered chat", found, wanted)

        names = ("message", "role", "content", "tool", "template", "prompt", "params", "token")
        return Case(what="chat", fields=fields, call=call, check=check, names=names)

    # ------------------------------------------------------------------ engines

    def _llm_case(self, rng: random.Random) -> Case:
        return self._options_case(fields_of.llm_options(rng, MAX_LEN), "LLM")

    def _speculative_case(self, rng: random.Random) -> Case:
        config = fields_of.speculative(rng, self.model, self.params, self.tokenizer)
        return self._options_case({"speculative_config": config}, "speculative_config")

    def _options_case(self, fields: dict[str, Any], what: str) -> Case:
        def call(fields: dict[str, Any]) -> Any:
            self.last = None
            return self.make_llm(**fields)

        def check(fields: dict[str, Any], llm: Any) -> None:
            keys = ("quantization", "kv_cache_dtype", "dtype")
            is_exact = all(fields.get(key) in (None, "auto", "float32") for key in keys)
            for key, value in fields.items():
                is_flag = key.startswith(("enable_", "skip_", "enforce_"))
                expect(is_flag == isinstance(value, bool) or value is None, "another kind", key)
                kept = getattr(llm.config, key, None)
                if isinstance(value, (int, float)) and kept is not None and key != "max_logprobs":
                    expect(kept == value and type(kept) is type(value), "another option", key, kept)
            self._control(llm, is_exact=is_exact)

        names: tuple[str, ...] = ("impl ",) if "impl" in str(fields) else ()
        config = fields.get("speculative_config")
        if isinstance(config, Mapping):
            names += tuple(str(key) for key in config)
        return Case(what=what, fields=fields, call=call, check=check, names=names)

    # ------------------------------------------------------------------ beams

    def _beam_case(self, rng: random.Random) -> Case:
        name = self._engine_name(rng)
        ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 9]))]
        fields = fields_of.beams(rng, VOCAB)
        limit = values.pick(rng, values.one_of(None, 1, 2), 0.9)

        def call(fields: dict[str, Any]) -> Any:
            from jinfer import BeamSearchParams

            params = BeamSearchParams(**fields)
            prompt = {"prompt_token_ids": ids}
            return params, self.engine(name).beam_search([prompt], params, concurrency_limit=limit)

        def check(fields: dict[str, Any], result: Any) -> None:
            params, [output] = result
            self._check_beams(params, output, ids, ENGINES[name][1])

        return Case(
            what="BeamSearchParams",
            fields=fields,
            call=call,
            check=check,
            names=("concurrency_limit", "beam", "pages", "max_tokens"),
            show=lambda f: (
                f"llm({name}).beam_search([{ids}], BeamSearchParams({_kw(f)}), {limit!r})"
            ),
        )

    def _check_beams(self, params: Any, output: Any, ids: list[int], is_exact: bool) -> None:
        sequences = output.sequences
        scores = [s.score for s in sequences]
        expect(1 <= len(scores) <= params.num_returned, "another number of texts", len(scores))
        expect(scores == sorted(scores, reverse=True), "texts that are not ranked", scores)
        expect(len({tuple(s.tokens) for s in sequences}) == len(scores), "a text found twice")
        temperature = params.temperature or 1.0
        for s in sequences:
            found = list(s.tokens[len(ids) :])
            limit = min(params.max_tokens, MAX_LEN - len(ids))
            expect(s.tokens[: len(ids)] == ids, "another prompt")
            expect(1 <= len(found) <= limit, "a text of another length", len(found), limit)
            if params.allowed_token_ids is not None:
                expect(set(found) <= set(params.allowed_token_ids), "a token not allowed", found)
            ends = {*(() if params.ignore_eos else EOS), *params.stop_token_ids}
            expect(not ends & set(found[:-1]), "tokens after an end", found)
            wanted = "stop" if found[-1] in ends else "length"
            expect(s.finish_reason == wanted, "a wrong finish_reason", s.finish_reason, found)
            if wanted == "length":
                expect(len(found) == limit, "ended by length too early", len(found), limit)
            table = log_softmax(self.reference.logits(s.tokens)[len(ids) - 1 : -1] / temperature)
            total = float(sum(row[t] for row, t in zip(table, found, strict=True)))
            if is_exact:
                slack = 0.01 * len(found) * max(1.0, 1 / temperature)
                expect(abs(total - s.cum_logprob) < slack, "a wrong sum", total, s.cum_logprob)
            score = s.cum_logprob / len(found) ** params.length_penalty
            expect(np.isclose(score, s.score, rtol=1e-4), "a wrong score", score, s.score)


def _kw(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shorten(value)}" for name, value in fields.items())


def _abort(llm: Any, request_id: Any) -> None:
    with contextlib.suppress(TypeError):  # unhashable: it was never queued
        llm.abort(request_id)

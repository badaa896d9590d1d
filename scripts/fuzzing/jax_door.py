"""The JAX door: load, logits, generate, LLM(params=), update_weights, quantization functions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import make_config, make_model

from fuzzing.folders import Shelf, temporary_folder
from fuzzing.oracle import Case, MismatchError, expect, shorten
from fuzzing.reference import TOLERANCE, Reference, log_softmax
from fuzzing.values import one_of, pick, some, strange

VOCAB = 96
WIDTH = 24
LIMITS = {
    "max_model_len": 32,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "skip_tokenizer_init": True,
}
CONTROL = [3, 1, 4, 1, 5]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"sliding_window": 5, "layer_types": ("full", "sliding")},
    "gemma": {
        "norm_plus_one": True,
        "post_norms": True,
        "final_soft_cap": 30.0,
        "attention_soft_cap": 50.0,
        "tie_word_embeddings": True,
    },
    "experts": {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 32},
}


def make() -> JaxDoor:
    """Returns the door."""
    return JaxDoor()


class JaxDoor:
    """Pure functions over tiny models, and an engine that is handed their weights."""

    name = "jax"

    def __init__(self) -> None:
        self.models = {name: make_model(VOCAB, **changes) for name, changes in KINDS.items()}
        self.params = {name: m.init(jax.random.key(0)) for name, m in self.models.items()}
        self.other = {name: m.init(jax.random.key(1)) for name, m in self.models.items()}
        self._references: dict[tuple[str, str], Reference] = {}
        self.shelf = Shelf(temporary_folder(self))
        self.llm: Any = None
        self.uses_engine = False
        self.kinds: list[tuple[int, Callable[[random.Random], Case]]] = [
            (5, self._generate_case),
            (3, self._logits_case),
            (4, self._params_case),
            (4, self._update_case),
            (3, self._quantize_case),
            (2, self._quantize_model_case),
            (2, self._format_case),
            (2, self._config_case),
            (4, self._load_case),
            (1, self._init_case),
        ]

    def case(self, rng: random.Random) -> Case:
        """Returns a case of a kind drawn by weight."""
        self.uses_engine = False
        make_case = rng.choices([k for _, k in self.kinds], [w for w, _ in self.kinds])[0]
        return make_case(rng)

    def reference(self, name: str, which: str = "params") -> Reference:
        """The dense forward pass of a model with its own or the other weights."""
        key = (name, which)
        if key not in self._references:
            params = getattr(self, which)[name]
            self._references[key] = Reference(self.models[name], params, WIDTH)
        return self._references[key]

    def engine(self) -> Any:
        """The engine that cases update, with the first weights."""
        from jinfer import LLM

        self.uses_engine = True
        if self.llm is None:
            self.llm = LLM(self.models["llama"], params=self.params["llama"], **LIMITS)
        return self.llm

    def renew(self) -> None:
        """Forgets the engine."""
        self.llm = None

    def control(self) -> None:
        """Asks the engine for a fixed text, with the weights put back."""
        if self.uses_engine and self.llm is not None:
            self.llm.update_weights(self.params["llama"])
            self._check_serves(self.llm, "llama", "params")

    def _check_serves(self, llm: Any, name: str, which: str) -> None:
        from jinfer import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=4)
        [output] = llm.generate([CONTROL], params, use_tqdm=False)
        found, reason = output.outputs[0].token_ids, output.outputs[0].finish_reason
        expect(reason == "length", "a greedy text that does not end by length", reason)
        self._check_greedy(self.reference(name, which), CONTROL, found, "the engine")
        try:
            llm.check_integrity()
        except Exception as error:
            raise MismatchError("check_integrity fails", repr(error)) from error

    def _check_greedy(self, reference: Reference, prompt: Any, found: Any, who: str) -> None:
        logits = reference.logits([*prompt, *found])
        for i, token in enumerate(found):
            row = logits[len(prompt) + i - 1]
            gap = row.max() - row[token]
            expect(gap <= TOLERANCE, f"{who} takes a token that is not the best", i, gap)

    # ------------------------------------------------------------------ generate and logits

    def _tokens(self, rng: random.Random) -> Any:
        """[B, T] tokens of few shapes: each shape is compiled."""
        shape = rng.choice([(1, 1), (2, 5), (1, 5)])
        ids = np.array([rng.randrange(VOCAB) for _ in range(shape[0] * shape[1])]).reshape(shape)
        forms = [ids, jnp.asarray(ids, jnp.int32), ids.tolist(), ids.astype(np.int8)]
        return rng.choice([*forms, tuple(map(tuple, ids.tolist())), ids.astype(np.uint32)])

    def _odd_tokens(self, rng: random.Random) -> Any:
        odd = [
            [[VOCAB]],
            [[-1]],
            [[2**31]],
            [[2**40]],
            [[1, 2], [3]],
            [[]],
            [],
            [1, 2],
            [[1.0, 2.0]],
        ]
        odd += [[[True, False]], "ab", [["a"]], [[None]], np.zeros((1, 0), int), np.zeros((2, 2))]
        odd += [jnp.ones((1, 2), bool), np.full((1, 2), VOCAB), np.full((1, 2), -5), 7, [[[1]]]]
        return rng.choice([*odd, strange(rng)])

    def _generate_case(self, rng: random.Random) -> Case:
        name = rng.choice(["llama", "llama", *KINDS])
        number = one_of(0.0, 1.0, 0.7, 0, np.array(0.5), jnp.float32(1))
        makers: dict[str, Callable[[random.Random], Any]] = {
            "prompt_lens": one_of(None, [1], [5], [2, 5], np.array([5, 1]), [0], [6], [-1]),
            "temperature": number,
            "top_k": one_of(0, 1, 5, 96, 97, np.int32(3), [2, 3]),
            "top_p": one_of(1.0, 0.5, 1e-3, [0.5, 0.9]),
            "min_p": one_of(0.0, 0.1, 1.0),
            "key": one_of(None, jax.random.key(0), jax.random.PRNGKey(3)),
            "eos_token_ids": one_of((), (7,), [1, 2, 3], list(range(50)), (VOCAB,), (-1,)),
        }
        share = rng.choice([1.0, 0.7])
        fields = {name: pick(rng, makers[name], share) for name in some(rng, list(makers), 3)}
        fields["tokens"] = self._tokens(rng) if rng.random() < 0.8 else self._odd_tokens(rng)
        fields["max_new_tokens"] = pick(rng, one_of(1, 3, np.int64(3), 0, -1), 0.9)
        jits = rng.random() < 0.2

        def call(fields: dict[str, Any]) -> Any:
            import jinfer

            model, params = self.models[name], self.params[name]
            kind = getattr(getattr(fields["tokens"], "dtype", None), "kind", "")
            if jits and kind in ("i", "u"):
                rest = {k: v for k, v in fields.items() if k != "tokens"}
                run = jax.jit(lambda params, tokens: jinfer.generate(model, params, tokens, **rest))
                return run(params, fields["tokens"])
            return jinfer.generate(model, params, **fields)

        return Case(
            what="generate",
            fields=fields,
            call=call,
            check=lambda fields, result: self._check_generated(name, fields, result, jits),
            show=lambda f: f"{'jit of ' if jits else ''}generate({name}, {shorten(f, 600)})",
            names=("token",),
        )

    def _check_generated(
        self, name: str, fields: dict[str, Any], result: Any, is_traced: bool
    ) -> None:
        prompts = np.asarray(fields["tokens"])
        n = int(fields["max_new_tokens"])
        rows = len(prompts)
        tokens, logprobs = np.asarray(result.tokens), np.asarray(result.logprobs)
        expect(tokens.shape == (rows, n), "tokens of another shape", tokens.shape)
        expect(prompts.dtype.kind in "iu", "tokens that are no integers", prompts.dtype)
        is_inside = prompts.min() >= 0 and prompts.max() < VOCAB
        if is_traced and not is_inside:
            return  # nobody can look at them under jit
        expect(is_inside, "tokens outside the vocabulary")
        lens = fields.get("prompt_lens")
        lens = np.full(rows, prompts.shape[1]) if lens is None else np.asarray(lens)
        expect(lens.shape == (rows,) and lens.min() >= 1, "prompt_lens taken that are none", lens)
        expect(lens.max() <= prompts.shape[1], "prompt_lens beyond the prompt", lens)
        temperature = np.broadcast_to(np.asarray(fields.get("temperature", 0.0)), (rows,))
        expect(np.all(temperature >= 0), "a temperature below 0", temperature)
        eos = set(map(int, fields.get("eos_token_ids", ())))
        for b in range(rows):
            prompt, length = prompts[b, : lens[b]].tolist(), int(result.lengths[b])
            hits = [i for i, t in enumerate(tokens[b]) if int(t) in eos]
            wanted = hits[0] + 1 if hits else n
            expect(length == wanted, "another length", length, wanted)
            expect(np.all(tokens[b, length:] == tokens[b, length - 1]), "no end repeated")
            found = tokens[b, :length].tolist()
            if temperature[b] == 0:
                self._check_greedy(self.reference(name), prompt, found, "generate")
            table = log_softmax(self.reference(name).logits([*prompt, *found]))[len(prompt) - 1 :]
            for i, token in enumerate(found):
                expect(abs(table[i, token] - logprobs[b, i]) < 5e-3, "a wrong logprob", b, i)
            self._check_filters(fields, b, rows, table, found)

    def _check_filters(self, fields: Any, b: int, rows: int, table: Any, found: Any) -> None:
        top_k = int(np.broadcast_to(np.asarray(fields.get("top_k", 0)), (rows,))[b])
        expect(top_k >= 0, "a negative top_k", top_k)
        for i, token in enumerate(found):
            if 0 < top_k < VOCAB:
                limit = np.sort(table[i])[-top_k] - TOLERANCE
                expect(table[i, token] >= limit, "a token beyond top_k", i)

    def _logits_case(self, rng: random.Random) -> Case:
        name = rng.choice(list(KINDS))
        tokens = self._tokens(rng) if rng.random() < 0.4 else self._odd_tokens(rng)

        def check(fields: dict[str, Any], logits: Any) -> None:
            given = np.asarray(fields["tokens"])
            expect(given.dtype.kind in "iu", "tokens that are no integers", given.dtype)
            expect(logits.shape == (*given.shape, VOCAB), "logits of another shape", logits.shape)
            if given.size == 0 or given.shape[-1] > WIDTH:
                return
            expect(given.min() >= 0 and given.max() < VOCAB, "tokens outside the vocabulary")
            rows = given.reshape(-1, given.shape[-1])
            for row, found in zip(rows, logits.reshape(len(rows), -1, VOCAB), strict=True):
                wanted = self.reference(name).logits(row.tolist())
                expect(np.allclose(found, wanted, atol=TOLERANCE), "other logits")

        def call(fields: dict[str, Any]) -> Any:
            return self.models[name].logits(self.params[name], fields["tokens"])

        return Case(
            what="logits", fields={"tokens": tokens}, call=call, check=check, names=("token",)
        )

    # ------------------------------------------------------------------ weights

    def _bend(self, rng: random.Random, name: str) -> tuple[str, Callable[[], Any], bool | None]:
        """Returns (what, maker of weights, whether they are the other weights in another form)."""
        whole = self.other[name]
        leaves, tree = jax.tree.flatten(whole)
        i = rng.randrange(len(leaves))
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
        odd = strange(rng)

        def with_leaf(change: Callable[[Any], Any]) -> Callable[[], Any]:
            return lambda: tree.unflatten(
                [change(leaf) if k == i else leaf for k, leaf in enumerate(leaves)]
            )

        same: list[tuple[str, Callable[[], Any]]] = [
            ("numpy", lambda: jax.tree.map(np.asarray, whole)),
            ("aligned numpy", lambda: jax.tree.map(_aligned, whole)),
            ("Fortran order", lambda: jax.tree.map(lambda x: np.asfortranarray(x), whole)),
            ("as it is", lambda: whole),
            ("committed", lambda: jax.device_put(whole, jax.devices()[0])),
        ]
        unlike: list[tuple[str, Callable[[], Any]]] = [
            ("strange leaf", with_leaf(lambda x: odd)),
            ("shape", with_leaf(lambda x: x[..., :-1])),
            ("more axes", with_leaf(lambda x: x[None])),
            ("bfloat16", with_leaf(lambda x: x.astype(jnp.bfloat16))),
            ("int", with_leaf(lambda x: x.astype(jnp.int32))),
            ("float64 numpy", with_leaf(lambda x: np.asarray(x, np.float64))),
            ("complex", with_leaf(lambda x: x.astype(jnp.complex64))),
            ("list", with_leaf(lambda x: np.asarray(x).tolist())),
            ("abstract", with_leaf(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))),
            ("no layers", lambda: {k: v for k, v in whole.items() if k != "layers"}),
            ("no embed", lambda: {k: v for k, v in whole.items() if k != "embed"}),
            ("one layer", lambda: {**whole, "layers": whole["layers"][:1]}),
            ("three layers", lambda: {**whole, "layers": (*whole["layers"], whole["layers"][0])}),
            ("layers as a list", lambda: {**whole, "layers": list(whole["layers"])}),
            ("more", lambda: {**whole, "more": jnp.zeros(3)}),
            ("layers None", lambda: {**whole, "layers": None}),
            ("embed None", lambda: {**whole, "embed": None}),
            ("embed bare", lambda: {**whole, "embed": whole["embed"]["w"]}),
            ("empty", dict),
            ("a list", lambda: leaves),
            ("None", lambda: None),
            ("strange", lambda: odd),
            ("deleted", with_leaf(_deleted)),
        ]
        if rng.random() < 0.3:
            what, maker = rng.choice(same)
            return what, maker, True
        what, maker = rng.choice(unlike)
        return f"{what} {paths[i]} {shorten(odd) if 'strange' in what else ''}", maker, None

    def _check_given(self, llm: Any, name: str, maker: Any, is_same: bool | None) -> None:
        """An accepted tree serves what its leaves say, cast to float32 where they are floats."""
        if is_same:
            self._check_serves(llm, name, "other")
            return
        given = jax.tree.leaves(maker())
        wanted = jax.tree.leaves(self.other[name])
        expect(len(given) == len(wanted), "weights taken that are no weights of the model")
        for a, b in zip(given, wanted, strict=True):
            expect(np.shape(a) == b.shape, "a weight of another shape is taken", np.shape(a))
            kind = str(getattr(a, "dtype", type(a).__name__))
            is_float = kind in ("float32", "bfloat16", "float16", "float64")
            expect(is_float, "a weight of another type is taken", kind)

    def _params_case(self, rng: random.Random) -> Case:
        from jinfer import LLM

        name = rng.choice(["llama", "llama", "llama", "gemma"])
        what, maker, is_same = self._bend(rng, name)
        options: dict[str, Any] = rng.choice([{}, {}, {"quantization": "int8"}])

        def check(fields: dict[str, Any], llm: Any) -> None:
            if not options:
                self._check_given(llm, name, maker, is_same)

        return Case(
            what="LLM(params=)",
            fields={"params": what},
            call=lambda fields: LLM(self.models[name], params=maker(), **LIMITS, **options),
            check=check,
            names=("weight", "layers", "embed", "leaf", "leaves", "model"),
            show=lambda f: f"LLM({name}, params=<{what}>, {options})",
        )

    def _update_case(self, rng: random.Random) -> Case:
        what, maker, is_same = self._bend(rng, "llama")

        def call(fields: dict[str, Any]) -> Any:
            llm = self.engine()
            llm.update_weights(maker())
            return llm

        return Case(
            what="update_weights",
            fields={"params": what},
            call=call,
            check=lambda fields, llm: self._check_given(llm, "llama", maker, is_same),
            names=("weight", "layers", "embed", "leaf", "leaves"),
            show=lambda f: f"llm.update_weights(<{what}>)",
        )

    # ------------------------------------------------------------------ quantization

    def _quantize_case(self, rng: random.Random) -> Case:
        from jinfer.config.quant_format import QFormat
        from jinfer.linear import qtensor
        from jinfer.quant.methods.gptq import quantize_gptq
        from jinfer.quant.methods.hqq import quantize_hqq
        from jinfer.quant.methods.rtn import quantize_rtn

        gen = np.random.default_rng(rng.randrange(100))
        w = jnp.asarray(gen.standard_normal((64, 8)), jnp.float32)
        hessian = jnp.asarray(np.cov(gen.standard_normal((64, 200))), jnp.float32)
        odd = [w.at[3, 3].set(jnp.nan), w[0], w[None], np.asarray(w), w.astype(jnp.int32), w[:0]]
        odd += [w.astype(jnp.bfloat16), w.tolist(), w * 0, w * 1e38, w * 1e-40, w[:33]]
        fmt = rng.choice(["int4-g32", "int4-g32-asym", "int8-channel", "int2-g16-asymf", "nf4-g64"])
        fmt = rng.choice([fmt, fmt, "fp8-e4m3-channel", "int3-g48", "int8-tensor", "int8-g7"])
        functions: dict[str, Callable[..., Any]] = {
            "quantize": qtensor.quantize,
            "quantize_rtn": quantize_rtn,
            "quantize_gptq": quantize_gptq,
            "quantize_hqq": quantize_hqq,
        }
        what = rng.choice(list(functions))
        fields: dict[str, Any] = {
            "w": pick(rng, one_of(w, w, *odd), 0.9),
            "fmt": pick(rng, one_of(QFormat.parse(fmt)), 0.9),
        }
        if what == "quantize_gptq":
            wrong = (hessian[:3], hessian * jnp.nan, hessian * 0, -hessian, hessian[0])
            fields["hessian"] = pick(rng, one_of(hessian, hessian, hessian, *wrong), 0.9)
            fields["damp"] = pick(rng, one_of(0.01, 1.0), 0.8)
            fields["order"] = pick(rng, one_of("act", "none", "group"), 0.8)
        if rng.random() < 0.3:
            fields["scale_dtype"] = pick(rng, one_of(jnp.float16, jnp.float32, "bfloat16"), 0.7)
        if rng.random() < 0.2 and what != "quantize_hqq":
            fields["grid"] = pick(rng, one_of("full", "restricted"), 0.6)

        def call(fields: dict[str, Any]) -> Any:
            rest = {k: v for k, v in fields.items() if k not in ("w", "fmt", "hessian")}
            between = [fields["hessian"]] if what == "quantize_gptq" else []
            found = functions[what](fields["w"], *between, fields["fmt"], **rest)
            return found[0] if isinstance(found, tuple) else found

        def check(fields: dict[str, Any], q: Any) -> None:
            given = np.asarray(fields["w"], np.float32)
            back = np.asarray(qtensor.dequantize(q))
            expect(back.shape == given.shape, "another shape", back.shape)
            expect(np.isfinite(back).all(), "weights that are not finite")
            bits = fields["fmt"].bits
            size = np.abs(given).max(initial=0)
            if what != "quantize_gptq" and 1e-30 < size < 1e30 and "grid" not in fields:
                worst = np.abs(back - given).max(initial=0)
                limit = size * 2.5 / (2 ** (bits - 1) - 1) if bits > 2 else 2 * size
                if fields["fmt"].kind.startswith("fp8"):
                    limit = size / 12  # three bits behind the leading one
                expect(worst <= limit, "an error beyond one step", worst, limit)

        names = ("weight", "format", "hessian", "h must", "quantiz")
        return Case(what=what, fields=fields, call=call, check=check, names=names)

    def _quantize_model_case(self, rng: random.Random) -> Case:
        from jinfer.quant.on_load import quantize_params
        from jinfer.quant.pipeline import quantize_model
        from jinfer.quant.recipe import Recipe, make_method

        what, maker, is_same = self._bend(rng, "llama")
        how = pick(rng, one_of("int8", "nf4", "int4-g32:rtn", "fp8", "int4-g32:gptq", "x"), 0.85)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 16)), jnp.int32)
        given = rng.choice(
            [tokens, None, tokens[0], tokens + VOCAB, tokens.astype(jnp.float32), "ab", [[1, 2]]]
        )
        whole = rng.random() < 0.5

        def call(fields: dict[str, Any]) -> Any:
            if not whole:
                return quantize_params(maker(), fields["quantization"])
            recipe = Recipe.uniform(make_method("rtn", "int4-g32"))
            return quantize_model(self.models["llama"], maker(), recipe, fields["tokens"])[0]

        def check(fields: dict[str, Any], params: Any) -> None:
            if is_same:
                logits = self.models["llama"].logits(params, jnp.asarray([CONTROL]))
                expect(np.isfinite(np.asarray(logits)).all(), "logits that are not finite")

        fields = {"params": what}
        fields |= {"tokens": given} if whole else {"quantization": how}
        return Case(
            what="quantize_model" if whole else "quantize_params",
            fields=fields,
            call=call,
            check=check,
            names=("weight", "layers", "embed", "leaf", "leaves"),
            show=lambda f: f"{'quantize_model' if whole else 'quantize_params'}(<{what}>, {f})",
        )

    def _format_case(self, rng: random.Random) -> Case:
        from jinfer.config.quant_format import QFormat
        from jinfer.quant.recipe import make_method

        makers: dict[str, Callable[[random.Random], Any]] = {
            "bits": one_of(2, 4, 8),
            "kind": one_of("int", "nf4", "fp8-e4m3"),
            "group": one_of(-1, 0, 32),
            "symmetric": one_of(True, False),
            "act": one_of(None, "dyn", "static"),
            "block": one_of(1, 32),
            "float_zero": one_of(False, True),
            "double_quant": one_of(False, True),
        }
        options: dict[str, Callable[[random.Random], Any]] = {
            "fmt": one_of("int4-g32", "int8-channel:dyn", None, "int4", "nf4-g64-dq", ""),
            "damp": one_of(0.01, 1),
            "order": one_of("act", "none"),
            "scales": one_of("extremes", "mse", "hessian"),
            "alpha": one_of(0.5),
            "clip": one_of(True),
            "grid": one_of("full"),
            "scale_dtype": one_of("float16"),
        }
        if rng.random() < 0.4:
            fields = {n: pick(rng, makers[n], 0.7) for n in some(rng, list(makers), 4)}

            def check(fields: dict[str, Any], fmt: Any) -> None:
                expect(QFormat.parse(str(fmt)) == fmt, "a format that does not read back", str(fmt))

            return Case(
                what="QFormat",
                fields=fields,
                call=lambda f: QFormat(**f),
                check=check,
                names=("bits", "zero", "blocks", "scales"),
            )
        if rng.random() < 0.4:
            text = pick(
                rng, one_of("int4-g32", "int04-g32", "int4-g032", "int4-g" + "9" * 5000), 0.5
            )
            return Case(
                what="QFormat.parse",
                fields={"format": text},
                call=lambda f: QFormat.parse(f["format"]),
                check=lambda f, fmt: expect(str(fmt) == f["format"], "another format", str(fmt)),
                names=("int", "group"),
            )
        fields = {n: pick(rng, options[n], 0.7) for n in some(rng, list(options), 3)}
        fields["name"] = pick(rng, one_of("rtn", "gptq", "awq", "hqq", "smoothquant", "fp8"), 0.9)
        return Case(
            what="make_method",
            fields=fields,
            call=lambda f: make_method(**f),
            names=("format", "method", "gptq"),
        )

    # ------------------------------------------------------------------ models and files

    def _config_case(self, rng: random.Random) -> Case:
        from jinfer.models.model import Model

        fields_of = list(make_config(VOCAB).__dataclass_fields__)
        makers: dict[str, Any] = {"num_layers": one_of(1, 2), "num_heads": one_of(4, 2)}
        fields = {
            n: pick(rng, makers.get(n, strange), 0.5)
            for n in some(rng, fields_of, 2)
            if n != "vocab_size"
        }
        huge = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        for n in (*huge, "head_dim", "num_experts", "expert_intermediate_size"):
            value = fields.get(n)
            if isinstance(value, (int, float)) and value > 4096:
                fields[n] = 3

        def call(fields: dict[str, Any]) -> Any:
            model = Model(make_config(VOCAB, **fields))
            params = model.init(jax.random.key(0))
            return model.logits(params, jnp.asarray([CONTROL]))

        def check(fields: dict[str, Any], logits: Any) -> None:
            expect(logits.shape == (1, len(CONTROL), VOCAB), "logits of another shape")

        return Case(what="ModelConfig", fields=fields, call=call, check=check, names=("rope",))

    def _init_case(self, rng: random.Random) -> Case:
        fields = {"key": pick(rng, one_of(jax.random.key(1), jax.random.PRNGKey(1)), 0.5)}
        if rng.random() < 0.7:
            fields["dtype"] = pick(rng, one_of(jnp.float32, "bfloat16", jnp.float16, "int8"), 0.6)
        return Case(
            what="Model.init",
            fields=fields,
            call=lambda f: self.models["llama"].init(**f),
            check=lambda f, params: expect(
                all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(params)),
                "weights that are no floats",
            ),
        )

    def _load_case(self, rng: random.Random) -> Case:
        import jinfer

        name = rng.choice(self.shelf.names)
        damage = self.shelf.damaged(rng, name) if rng.random() < 0.7 else None
        makers: dict[str, Callable[[random.Random], Any]] = {
            "dtype": one_of(None, "auto", "float32", "bfloat16", jnp.float16, "float64", "int8"),
            "revision": one_of(None, "main"),
            "quantization": one_of(None, "int8", "gguf", "nf4", "int4-g32:rtn"),
        }
        fields = {}
        if damage is None or rng.random() < 0.1:
            fields = {n: pick(rng, makers[n], 0.7) for n in some(rng, list(makers), 2)}
        odd = pick(
            rng, one_of("nowhere/at/all", "", "./x", "a/b", "x.gguf", "\x00", "a" * 5000), 0.5
        )
        is_odd = damage is None and rng.random() < 0.3

        def call(fields: dict[str, Any]) -> Any:
            if is_odd:
                return jinfer.load(odd, **fields)
            path = self.shelf[name]
            if damage is not None:
                path = self.shelf.copy(name)
                damage.apply(path)
            return jinfer.load(path, **fields)

        def check(fields: dict[str, Any], loaded: Any) -> None:
            model, params = loaded
            logits = model.logits(params, jnp.asarray([CONTROL]))
            expect(logits.shape[:2] == (1, len(CONTROL)), "logits of another shape")
            if damage is None and not fields:
                wanted = self._loaded(name)
                expect(np.array_equal(logits, wanted), "another model is loaded")

        names = ("dtype", "model") if damage is None else damage.names
        if is_odd:
            names = ("path", "model", "name")
        what = odd if is_odd else name if damage is None else f"{name}; {damage.text}"
        return Case(
            what="load",
            fields=fields,
            call=call,
            check=check,
            names=names,
            show=lambda f: f"jinfer.load(<{shorten(what, 300)}>, {f})",
        )

    def _loaded(self, name: str) -> Any:
        import jinfer

        model, params = jinfer.load(self.shelf[name])
        return model.logits(params, jnp.asarray([CONTROL]))


def _aligned(x: Any) -> np.ndarray:
    """A copy in numpy whose first byte is at a multiple of 64, as jax.device_put aliases."""
    x = np.asarray(x)
    raw = np.empty(x.nbytes + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    copy = raw[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def _deleted(x: Any) -> Any:
    copy = jnp.array(x, copy=True)
    copy.delete()
    return copy

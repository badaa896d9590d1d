"""The command-line door: every subcommand and flag, JSONL files, damaged models, in one process.

Some cases run again in a process of their own, which must end alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

from fuzzing import cli_fields
from fuzzing.folders import VOCAB, Damage, Shelf, temporary_folder
from fuzzing.oracle import MAX_MESSAGE, ROOT, Case, expect, shorten
from fuzzing.reference import Reference, log_softmax

TEXT = "the quick brown fox jumps over the lazy dog, and the cat looks on. " * 6
# Beside the errors of the library: what the system says of a path, which the line names.
OF_PATHS = (OSError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_RATE = re.compile(r"^\d+ tokens, ")  # of a turn or a text that came before
_PROGRESS = re.compile(r"^(eval|texts|train|quantizing|converting|measuring|calibrating|hidden)\b")


def make() -> CliDoor:
    """Returns the door."""
    return CliDoor()


@dataclasses.dataclass
class Done:
    """How a command ended; `folder` is where it ran."""

    status: int
    stdout: str
    stderr: str
    error: Exception | None
    folder: Path


class CliDoor:
    """`jinfer.cli.main.main` in a temporary working folder."""

    name = "cli"

    def __init__(self) -> None:
        from jinfer.cli.main import build_parser

        root = temporary_folder(self)
        self.shelf = Shelf(root / "models")
        self.shelf.root.mkdir()
        self.work = root / "work"
        self.parser = build_parser()
        self._llms: dict[Path, Any] = {}
        self.kinds: list[tuple[int, Callable[[random.Random], Case]]] = [
            (5, self._generate_case),
            (4, self._jsonl_case),
            (2, self._chat_case),
            (3, self._plan_case),
            (2, self._quantize_case),
            (1, self._check_case),
            (2, self._convert_case),
            (2, self._eval_case),
            (1, self._train_case),
            (1, self._bench_case),
            (1, self._words_case),
        ]

    def case(self, rng: random.Random) -> Case:
        """Returns a case of a kind drawn by weight."""
        make_case = rng.choices([k for _, k in self.kinds], [w for w, _ in self.kinds])[0]
        return make_case(rng)

    def renew(self) -> None:
        """Nothing outlives a command."""

    def control(self) -> None:
        """Commands share no state but the working folder of the process."""
        expect(Path.cwd() != self.work, "the working folder is left")

    # ------------------------------------------------------------------ running

    def _make(
        self,
        rng: random.Random,
        command: list[str],
        argv: list[str],
        *,
        names: tuple[str, ...] = (),
        model: str | None = None,
        most: int = 3,
        without: tuple[str, ...] = (),
        share: float = 0.7,
        stdin: str = "",
        files: dict[str, bytes] | None = None,
        check: Callable[[Done], None] = lambda done: None,
    ) -> Case:
        """Adds random flags to a command and returns it as a case.

        Each flag with its values is a field of the case, so that it can be dropped.
        """
        actions = [a for a in cli_fields.flags_of(self.parser, command) if a.dest not in without]
        chosen = rng.sample(actions, min(len(actions), rng.choice([0, *range(1, most + 1)])))
        share = rng.choice([1.0, share])
        fields: dict[str, Any] = {}
        for action in chosen:
            key = action.option_strings[-1].lstrip("-").removeprefix("no-")
            fields[key] = cli_fields.words(rng, action, share)
        damage = None
        if model is not None and rng.random() < 0.3:
            damage = self.shelf.damaged(rng, model)
        again = rng.random() < 0.01

        def call(fields: dict[str, Any]) -> Done:
            path = None if model is None else self._model(model, damage)
            given = [str(path) if w == "MODEL" else w for w in argv]
            return self._run([*command, *given, *_joined(fields)], stdin, files, again)

        def check_done(fields: dict[str, Any], done: Done) -> None:
            if damage is None and done.status == 0:
                check(done)

        keys = {k for name in fields for k in (name, name.replace("-", "_"))}
        more = damage.names if damage is not None else ()
        given = [w for w in argv if w.startswith("--")]
        if "sampling-params" in fields:
            names = (*names, *cli_fields.SAMPLING_NAMES)
        values = [w for word in fields.values() for w in word if len(w) > 2 or not w.isascii()]
        values += ["'.'" for word in fields.values() for w in word if w == "" or w[-1:] == "="]
        values += [w.partition("=")[2] for w in values if w.startswith("-") and "=" in w]
        values += [repr(w)[1:-1] for w in values]
        values += [str(Path(w).parent) for w in values if "/" in w]
        own = (*keys, *more, *names, *(w.lstrip("-") for w in given), *values, "argument")
        about = "" if model is None else f"  MODEL = {model}"
        about += "" if damage is None else f" with {damage.text}"
        return Case(
            what=" ".join(command),
            fields=fields,
            call=call,
            check=check_done,
            names=own,
            show=lambda f: _show([*command, *argv, *_joined(f)]) + about + _files(files),
            also_allowed=OF_PATHS,
        )

    def _model(self, name: str, damage: Damage | None) -> Path:
        if damage is None:
            return self.shelf[name]
        path = self.shelf.copy(name)
        damage.apply(path)
        return path

    def _run(
        self, argv: list[str], stdin: str, files: dict[str, bytes] | None, again: bool
    ) -> Done:
        """Runs a command; raises what it was refused with, after a look at what it printed."""
        with self._workplace(files) as folder:
            done = _in_process(argv, stdin, folder)
        if again:
            with self._workplace(files) as folder:
                _compare(done, _in_own_process(argv, stdin, folder))
        _check_output(done)
        if done.error is not None:
            raise _as_refusal(done.error)
        if done.status:
            lines = [x for x in done.stderr.splitlines() if x.startswith("jinfer: error:")]
            raise ValueError(lines[-1])
        return done

    @contextlib.contextmanager
    def _workplace(self, files: dict[str, bytes] | None) -> Iterator[Path]:
        """A working folder with what PATHS name; anew for each command."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "afolder").mkdir(parents=True)
        (self.work / "afile").write_text(TEXT)
        (self.work / "loop").symlink_to("loop")
        for name, data in (files or {}).items():
            (self.work / name).write_bytes(data)
        before = Path.cwd()
        os.chdir(self.work)
        try:
            yield self.work
        finally:
            os.chdir(before)

    # ------------------------------------------------------------------ cases

    def _any_model(self, rng: random.Random) -> str:
        return rng.choice(["plain", "plain", *self.shelf.names])

    def _generate_case(self, rng: random.Random) -> Case:
        model = self._any_model(rng)
        prompt = rng.choice(["hi", "the cat", "é🙂", "a\nb", "", "\udcff", "x" * 200])
        argv = ["--model", "MODEL", "--prompt", prompt, "--max-tokens", "4"]
        raw = rng.random() < 0.7
        if raw:
            argv.append("--raw")
        case = self._make(
            rng,
            ["generate"],
            argv,
            model=model,
            without=("model", "prompt", "raw", "input", "tokenizer"),
            names=("prompt", "token", "messages"),
        )
        inner = case.check

        def check(fields: dict[str, Any], done: Done) -> None:
            inner(fields, done)
            if raw and not fields and "MODEL = plain" in case.text(fields)[-14:]:
                wanted = self._text(model, prompt, 4)
                expect(done.stdout.rstrip("\n") == wanted.rstrip("\n"), "another text", wanted)

        return dataclasses.replace(case, check=check)

    def _llm(self, model: str) -> Any:
        from jinfer import LLM

        path = self.shelf[model]
        if path not in self._llms:
            self._llms.clear()
            self._llms[path] = LLM(path)
        return self._llms[path]

    def _text(self, model: str, prompt: str, max_tokens: int) -> str:
        from jinfer import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        [output] = self._llm(model).generate([prompt], params, use_tqdm=False)
        return output.outputs[0].text

    def _jsonl_case(self, rng: random.Random) -> Case:
        data, good, num_bad = cli_fields.jsonl(rng, VOCAB)
        argv = ["--model", "MODEL", "--input", "in.jsonl", "--output", "out.jsonl"]
        argv += ["--max-tokens", "3"]
        does_damage_output = rng.random() < 0.1
        files = {"in.jsonl": data}
        if does_damage_output:
            files["out.jsonl"] = rng.choice([b"{", b"x", b'{"line": 1', b"{}\n", b"\xff", b"[1]\n"])

        def check(done: Done) -> None:
            expect(num_bad == 0, "bad lines and status 0", done.stderr)

        case = self._make(
            rng,
            ["generate"],
            argv,
            model="plain",
            most=2,
            without=("model", "prompt", "raw", "input", "output", "tokenizer", "num_beams"),
            names=("in.jsonl", "out.jsonl", "lines failed", "line"),
            files=files,
            check=check,
        )
        inner = case.call

        def call(fields: dict[str, Any]) -> Any:
            try:
                return inner(fields)
            finally:
                is_other_encoding = data.startswith(b"\0")  # as UTF-16 or UTF-32 begin
                is_plain = "with" not in case.text(fields) and not is_other_encoding
                if not fields and not does_damage_output and is_plain:
                    self._check_records(good)

        return dataclasses.replace(case, call=call)

    def _check_records(self, good: dict[int, dict[str, Any]]) -> None:
        from jinfer import SamplingParams
        from jinfer.text.prompts import read_chat

        out = self.work / "out.jsonl"
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        found = {row["line"]: row for row in rows}
        expect(set(found) == set(good), "other lines are done", sorted(found), sorted(good))
        llm = self._llm("plain")
        for number, fields in good.items():
            row = found[number]
            expect(row["id"] == fields.get("id", number), "another id", row["id"])
            prompt = fields.get("prompt", {"prompt_token_ids": fields.get("prompt_token_ids")})
            if "messages" in fields:
                prompt = read_chat(
                    llm.get_tokenizer(), fields["messages"], add_generation_prompt=True
                )
            given = {"temperature": 0, "max_tokens": 3, **fields.get("sampling_params", {})}
            [output] = llm.generate([prompt], SamplingParams(**given), use_tqdm=False)
            wanted = [list(c.token_ids) for c in output.outputs]
            expect([o["token_ids"] for o in row["outputs"]] == wanted, "other tokens", number)
            texts = [c.text for c in output.outputs]
            expect([o["text"] for o in row["outputs"]] == texts, "another text", number)

    def _chat_case(self, rng: random.Random) -> Case:
        turns = [rng.choice(["hi", "", "/reset", "é", "x" * 500, "/nonsense"]) for _ in range(2)]
        return self._make(
            rng,
            ["chat"],
            ["--model", "MODEL", "--max-tokens", "2"],
            model=self._any_model(rng),
            without=("model", "tokenizer"),
            names=("template", "model", "reset"),
            stdin="\n".join([*turns, rng.choice(["/exit", ""])]),
        )

    def _plan_case(self, rng: random.Random) -> Case:
        from jinfer.config import memory

        preset = rng.random() < 0.3
        model = None if preset else self._any_model(rng)
        argv = ["--model", rng.choice(list(memory.PRESETS)) if preset else "MODEL"]

        def check(done: Done) -> None:
            sizes = re.findall(r"(-?[\d.]+|nan|inf) (?:B|KiB|MiB|GiB)\b", done.stdout)
            expect(sizes and all(float(s) >= 0 for s in sizes), "sizes below 0", done.stdout)

        return self._make(
            rng, ["plan"], argv, model=model, without=("model",), share=0.5, check=check
        )

    def _quantize_case(self, rng: random.Random) -> Case:
        model = self._any_model(rng)
        method = rng.choice(["rtn", "rtn", "gptq", "awq", "hqq", "int8", "fp8", "nf4"])
        argv = ["--model", "MODEL", "--output", "q", "--method", method]
        argv += ["--num-sequences", "2", "--length", "16", "--held-out", "1"]
        recipe = json.dumps(
            {"rules": [{"match": "layers.*", "method": "rtn", **_odd_rule(rng)}, *_odd_rules(rng)]}
        )
        if method in ("rtn", "gptq", "awq"):
            argv += ["--format", rng.choice(["int4-g32", "int4-g32-asym", "int8-channel"])]
        if rng.random() < 0.2:
            argv += ["--recipe", "recipe.json"]
        case = self._make(
            rng,
            ["quantize"],
            argv,
            model=model,
            most=2,
            without=("model", "output", "method", "check", "num_sequences", "recipe"),
            names=("recipe", "quantized", "gguf", "weight", "calibration", "format", "model"),
            files={"recipe.json": recipe.encode()},
            check=lambda done: self._check_quantized(done, model),
        )
        return self._leaves_nothing(case, "q")

    def _leaves_nothing(self, case: Case, name: str) -> Case:
        """A command that fails must not leave its output behind."""
        inner = case.call

        def call(fields: dict[str, Any]) -> Any:
            try:
                return inner(fields)
            except Exception:
                expect(not (self.work / name).exists(), "a failed command leaves its output")
                raise

        return dataclasses.replace(case, call=call)

    def _check_quantized(self, done: Done, model: str) -> None:
        import jinfer

        loaded, params = jinfer.load(done.folder / "q")
        logits = np.asarray(loaded.logits(params, jnp.asarray([[5, 9, 2]])))
        expect(np.isfinite(logits).all(), "logits that are not finite")

    def _check_case(self, rng: random.Random) -> Case:
        model = rng.choice(["native", "gptq", "ct", "fp8", "plain", "plain.gguf"])
        argv = ["--check", "MODEL"]
        if rng.random() < 0.5:
            argv += ["--model", str(self.shelf[rng.choice(["plain", "other"])])]
        return self._make(
            rng,
            ["quantize"],
            argv,
            model=model,
            most=1,
            without=("check", "output", "model"),
            names=("problems", "folder", "quantiz", "tensor", "gguf", "model"),
        )

    def _convert_case(self, rng: random.Random) -> Case:
        model = self._any_model(rng)
        export = rng.choice(["gguf", "gguf", "native", "gptq", "awq", "compressed-tensors", "fp8"])
        argv = ["--model", "MODEL", "--export", export, "--output", "c.gguf"]

        def check(done: Done) -> None:
            import jinfer

            tokens = jnp.asarray([[5, 9, 2]])
            logits = [
                np.asarray(m.logits(p, tokens))
                for m, p in (jinfer.load(x) for x in (self.shelf[model], done.folder / "c.gguf"))
            ]
            is_close = np.abs(logits[0] - logits[1]).max() < (2.0 if "Q" in str(argv) else 1e-3)
            expect(is_close or export == "gguf", "a conversion changes the model")

        case = self._make(
            rng,
            ["convert"],
            argv,
            model=model,
            most=2,
            without=("model", "export", "output"),
            names=("gguf", "quantiz", "module", "weight", "tensor", "model", "tokenizer", "layers"),
            check=check,
        )
        return self._leaves_nothing(case, "c.gguf")

    def _eval_case(self, rng: random.Random) -> Case:
        model = self._any_model(rng)
        context, windows = rng.choice([8, 16]), rng.choice([1, 2])
        argv = ["--model", "MODEL", "--text", "afile", "--context", str(context)]
        argv += ["--windows", str(windows)]
        case = self._make(
            rng,
            ["eval"],
            argv,
            model=model,
            most=2,
            without=("model", "text", "context"),
            names=("text", "model", "token"),
        )
        inner = case.check

        def check(fields: dict[str, Any], done: Done) -> None:
            inner(fields, done)
            if not fields and case.text(fields).endswith("MODEL = plain"):
                found = float(re.findall(r"perplexity ([\d.]+)", done.stderr)[0])
                wanted = self._perplexity(context, windows)
                expect(math.isclose(found, wanted, rel_tol=1e-3), "another perplexity", wanted)

        return dataclasses.replace(case, check=check)

    def _perplexity(self, context: int, windows: int) -> float:
        import jinfer

        model, params = jinfer.load(self.shelf["plain"])
        reference = Reference(model, params, 32)
        ids = self._llm("plain").get_tokenizer().encode(TEXT, add_special_tokens=False)
        losses = []
        for i in range(windows):
            window = ids[i * context : (i + 1) * context]
            table = log_softmax(reference.logits(window))
            losses += [-table[j, t] for j, t in enumerate(window[1:])]
        return math.exp(np.mean(losses))

    def _train_case(self, rng: random.Random) -> Case:
        command = rng.choice(["train-medusa", "train-draft"])
        lines = [b'{"text": "the cat sat on the mat and the cat"}'] * 6
        if rng.random() < 0.4:
            odd = [b"{", b"[]", b'{"text": 5}', b'{"prompt": ""}', b'{"messages": 7}', b'{"x": 1}']
            lines[rng.randrange(6)] = rng.choice([*odd, b'{"prompt_token_ids": [-1]}', b"\xff"])
        argv = ["--model", "MODEL", "--output", "t", "--data", "d.jsonl", "--steps", "1"]
        argv += ["--window", "8", "--batch-size", "2"]
        argv += ["--num-heads", "1"] if command == "train-medusa" else ["--num-layers", "1"]
        return self._make(
            rng,
            [command],
            argv,
            model=rng.choice(["plain", "plain", "native", "q8.gguf", "sharded"]),
            most=2,
            without=("model", "output", "steps", "batch_size"),
            names=("head", "d.jsonl", "window", "quantized", "layers", "gguf", "config", "learn"),
            files={"d.jsonl": b"\n".join(lines)},
        )

    def _bench_case(self, rng: random.Random) -> Case:
        from jinfer.cli.bench.main import BENCHES

        name = rng.choice(list(BENCHES))
        return self._make(
            rng,
            ["bench", name],
            ["--model", "no/such/model"],
            most=3,
            without=("model", "json"),
            share=0.3,
            names=("model", "required", "prompts"),
        )

    def _words_case(self, rng: random.Random) -> Case:
        """Words with no order at all."""
        options = [
            o
            for c in ("generate", "quantize", "plan", "convert")
            for a in cli_fields.flags_of(self.parser, [c])
            for o in a.option_strings
        ]
        pool = ["generate", "plan", "bench", "kv", "chat", *options, *cli_fields.STRANGE]
        argv = [rng.choice(pool) for _ in range(rng.choice([0, 1, 2, 3, 5]))]
        if argv and rng.random() < 0.6:
            argv[0] = rng.choice(["generate", "plan", "quantize", "convert", "eval"])
        fields = {str(i): [w] for i, w in enumerate(argv)}
        return Case(
            what="words",
            fields=fields,
            call=lambda f: self._run([*_joined(f), "--model", "no/such/model"], "", None, False),
            names=("argument", "model", "required", "--"),
            show=lambda f: _show([*_joined(f), "--model", "no/such/model"]),
            also_allowed=OF_PATHS,
        )


def _odd_rule(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"format": "int4-g32"}
    key = rng.choice(["format", "method", "match", "metod", "scales", "damp", "clip", "grid"])
    return {key: cli_fields.json_strange(rng)}


def _odd_rules(rng: random.Random) -> list[Any]:
    return [] if rng.random() < 0.7 else [cli_fields.json_strange(rng)]


def _as_refusal(error: Exception) -> Exception:
    """A text that ended with an error has its own exception: the command did what it should."""
    from jinfer.cli.terminal import GenerationError

    return ValueError(f"model: {error}") if isinstance(error, GenerationError) else error


def _joined(fields: dict[str, Any]) -> list[str]:
    return [word for words in fields.values() for word in words]


def _show(argv: list[str]) -> str:
    is_plain = re.compile(r"[\w./:=+-]{1,200}")
    return " ".join(["jinfer", *(w if is_plain.fullmatch(w) else shorten(w, 200) for w in argv)])


def _files(files: dict[str, bytes] | None) -> str:
    return "".join(f"\n    {name} = {shorten(data, 600)}" for name, data in (files or {}).items())


def _in_process(argv: list[str], stdin: str, folder: Path) -> Done:
    from jinfer.cli import main as cli

    errors: list[Exception] = []
    one_line = cli.one_line

    def keep(error: Exception) -> str:
        errors.append(error)
        return one_line(error)

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(cli, "one_line", keep),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = cli.main(argv)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    error = errors[-1] if errors else None
    return Done(int(status or 0), out.getvalue(), err.getvalue(), error, folder)


def _in_own_process(argv: list[str], stdin: str, folder: Path) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "jinfer", *argv],
        input=stdin.encode(errors="surrogateescape"),
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
        check=False,
    )
    texts = [data.decode(errors="replace") for data in (done.stdout, done.stderr)]
    return Done(done.returncode, texts[0], texts[1], None, folder)


def _compare(one: Done, two: Done) -> None:
    expect(one.status == two.status, "another status in a process of its own", two.stderr[-500:])
    _check_output(two)


def _check_output(done: Done) -> None:
    """Raises MismatchError unless stderr is what the contract says for this status."""
    expect("Traceback (most recent" not in done.stderr, "a traceback", done.stderr[-800:])
    lines = [line for line in re.split(r"[\n\r]", done.stderr) if line.strip()]
    errors = [line for line in lines if line.startswith("jinfer: error:")]
    if done.status == 0:
        is_chat = any("/reset starts anew" in line for line in errors)
        expect(not errors or is_chat, "status 0 with an error", errors)
        return
    if done.status == 130:
        return
    if not any("/reset starts anew" in line for line in errors):  # a line a turn
        expect(len(errors) == 1, "not one line of error", lines[-4:])
    expect(len(errors[0]) <= MAX_MESSAGE, "an endless line of error", len(errors[0]))
    others = [line for line in lines if not line.startswith("jinfer: ")]
    others = [line for line in others if not _PROGRESS.match(line) and not _RATE.match(line)]
    expect(not others, "other lines on stderr", others[:3])

"""The commands over a fake engine: what they print, what they refuse, how they end."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import fake_llm
import jinja2
import pytest

from jinfer.cli import flags, training
from jinfer.cli import main as cli
from jinfer.config import memory

ROOT = Path(__file__).resolve().parents[3]
FAKE = ROOT / "tests" / "helpers" / "fake_llm.py"


class Spy(fake_llm.FakeLLM):
    """Keeps the last instance made and the parameters of its requests."""

    last = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Spy.last = self
        self.params = {}

    def add_request(self, request_id, prompt, params):
        self.params[request_id] = params
        super().add_request(request_id, prompt, params)

    def beam_search(self, prompt, params):
        self.beam_params = params
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else map(ord, prompt)
        text = "".join(map(chr, ids)).upper()
        texts = [
            types.SimpleNamespace(output_text=f"{text} {i}", score=-0.5 - i)
            for i in range(params.num_returned)
        ]
        return [types.SimpleNamespace(sequences=texts)]


@pytest.fixture
def llm(monkeypatch):
    """Puts the fake in the place of `jinfer.llm.LLM`; returns the class to look at."""
    Spy.last, Spy.chat_template = None, "fake"
    monkeypatch.setitem(sys.modules, "jinfer.llm", types.SimpleNamespace(LLM=Spy))
    return Spy


@pytest.fixture
def jinfer(llm, capsys):
    """Runs a command in this process; returns (status, stdout, stderr)."""

    def run(*argv):
        try:
            status = cli.main([str(arg) for arg in argv])
        except SystemExit as exit_:
            status = exit_.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_prompt_goes_through_the_chat_template_and_its_text_to_stdout(jinfer, llm):
    status, out, err = jinfer("generate", "--prompt", "hi")
    assert (status, out) == (0, "USER:HI;ASSISTANT:\n")
    assert err.startswith("18 tokens, ") and "tokens/s, first token after" in err
    assert err.count("\n") == 1
    assert llm.last.model == "smollm2"
    assert llm.last.params["stream"].temperature == 0.0


def test_raw_continues_the_prompt_as_it_is(jinfer):
    assert jinfer("generate", "--raw", "--prompt", "hi")[1] == "HI\n"


def test_a_model_without_chat_template_says_so_and_continues(jinfer, llm):
    llm.chat_template = None
    _, out, err = jinfer("generate", "--prompt", "hi")
    assert out == "HI\n"
    assert "no chat template" in err.splitlines()[0]


def test_flags_reach_the_engine_and_the_sampler(jinfer, llm):
    status, _, err = jinfer(
        *("generate", "--raw", "--prompt", "x", "--model", "m", "--dtype", "bfloat16"),
        *("--max-num-seqs", 8, "--kv-cache-memory-bytes", "1GiB", "--block-size", 32),
        *(
            "--no-enable-chunked-prefill",
            "--enable-prefix-caching",
            "--max-tokens",
            "none",
            "--temperature",
            0.5,
        ),
        *("--top-p", 0.9, "--top-k", 7, "--seed", 3, "--stop", "a", "--stop", "b"),
        *(
            "--stop-token-ids",
            5,
            6,
            "--ignore-eos",
            "--sampling-params",
            '{"logit_bias": {"4": 2}}',
        ),
    )
    assert status == 0, err
    assert (llm.last.model, llm.last.config.max_num_seqs) == ("m", 8)
    assert llm.last.kwargs == {
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 2**30,
        "block_size": 32,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": True,
    }
    params = llm.last.params["stream"]
    assert (params.max_tokens, params.temperature, params.top_p) == (None, 0.5, 0.9)
    assert (params.top_k, params.seed, tuple(params.stop)) == (7, 3, ("a", "b"))
    assert (tuple(params.stop_token_ids), params.ignore_eos) == ((5, 6), True)
    assert params.logit_bias == {4: 2.0}


def test_several_samples_are_numbered(jinfer):
    _, out, _ = jinfer("generate", "--raw", "--prompt", "hi", "--n", 2, "--temperature", 1)
    assert out == "[1] HI\n[2] HI\n"


def test_a_beam_search_prints_its_best_texts_and_their_scores(jinfer, llm):
    flags = ("generate", "--raw", "--prompt", "hi", "--num-beams", 4, "--max-tokens", 5)
    status, out, err = jinfer(*flags)
    assert (status, out) == (0, "HI 0\n")
    assert re.fullmatch(r"4 beams, \d+\.\d\d s, scores -0\.5000\n", err)
    params = llm.last.beam_params
    assert (params.beam_width, params.num_returned, params.max_tokens) == (4, 1, 5)
    assert (params.length_penalty, params.early_stopping) == (1.0, False)
    more = ("--n", 2, "--length-penalty", 0.5, "--early-stopping", "never", "--ignore-eos")
    _, out, err = jinfer(*flags, *more)
    assert out == "[1] HI 0\n[2] HI 1\n" and "scores -0.5000, -1.5000" in err
    params = llm.last.beam_params
    assert (params.length_penalty, params.early_stopping) == (0.5, "never")
    assert params.ignore_eos
    jinfer("generate", "--prompt", "hi", "--num-beams", 2, "--early-stopping", "true")
    assert llm.last.beam_params.early_stopping is True


REFUSED = [
    (("generate",), "one of the arguments --prompt --input is required"),
    (("generate", "--prompt", "x", "--output", "o"), "--output goes with --input"),
    (("generate", "--input", "i"), "--input needs --output"),
    (("generate", "--input", "i", "--output", "o", "--raw"), "--raw goes with --prompt"),
    (("generate", "--input", "no", "--output", "o"), "no: no such file"),
    (
        ("generate", "--prompt", "x", "--max-tokens", "many"),
        "expected an integer or none, got 'many'",
    ),
    (("generate", "--prompt", "x", "--max-tokens", "0"), "max_tokens must be at least 1"),
    (("generate", "--prompt", "x", "--top-p", "2"), "top_p must lie in (0, 1]"),
    (("generate", "--prompt", "x", "--n", "2"), "n=2 with temperature=0"),
    (("generate", "--prompt", "x", "--logprobs", "2"), "only to JSONL results"),
    (("generate", "--prompt", "x", "--sampling-params", "[]"), "expected a JSON object, got '[]'"),
    (
        ("generate", "--prompt", "x", "--sampling-params", '{"best_of": 3}'),
        "best_of=3 (int) is not",
    ),
    (("generate", "--prompt", "x", "--sampling-params", '{"output_kind": 1}'), "output_kind is"),
    (("generate", "--prompt", "x", "--sampling-params", '{"detokenize": false}'), "detokenize"),
    (("generate", "--raw", "--prompt", ""), "the prompt is empty"),
    (("generate", "--prompt", "x", "--length-penalty", "1"), "--length-penalty goes with --num-be"),
    (
        ("generate", "--prompt", "x", "--num-beams", "2", "--top-p", "0.5"),
        "top_p has no effect on a",
    ),
    (("generate", "--prompt", "x", "--num-beams", "2", "--n", "3"), "num_return_sequences=3 is"),
    (("generate", "--prompt", "x", "--num-beams", "0"), "beam_width must be positive"),
    (("generate", "--prompt", "x", "--num-beams", "2", "--max-tokens", "none"), "max_tokens must"),
    (("generate", "--input", "i", "--output", "o", "--num-beams", "2"), "goes with --prompt"),
    (("generate", "--prompt", "x" * 600), "more than max_model_len"),
    (("chat", "--temperature", "1", "--sampling-params", '{"n": 2}'), "one answer a turn, got n=2"),
    (("plan", "--model", "llama-2-7b", "--dtype", "bf17"), "dtype must be one of"),
    (("plan", "--model", "llama-2-7b", "--batch", "0"), "batch must be at least 1"),
    (("plan", "--model", "llama-2-7b", "--memory", "lots"), "a size must read like 80GiB"),
    (("plan", "--memory", "1GiB", "--page-size", "0"), "--page-size must be positive, got 0"),
    (("plan", "--memory", "1GiB", "--gpu-memory-utilization", "2"), "must lie in (0, 1], got 2.0"),
    (("plan", "--page-size", "32"), "--page-size goes with --memory"),
    (("plan", "--gpu-memory-utilization", "0.5"), "--gpu-memory-utilization goes with --memory"),
    (("eval", "--text", "i", "--windows", "0"), "--windows must be positive, got 0"),
    (("quantize",), "one of the arguments --output --check is required"),
    (("quantize", "--check", "i"), "i is not a .gguf file"),
    (("quantize", "--output", "o", "--method", "magic"), "invalid choice: 'magic'"),
    (("quantize", "--output", "o", "--method", "fp8", "--format", "int4-g64"), "does not take"),
    (("quantize", "--output", "o", "--format", "int9"), "int9"),
    (("quantize", "--output", "o", "--recipe", "i"), "recipe i must be a JSON object"),
    (("frobnicate",), "invalid choice: 'frobnicate'"),
    ((), "the following arguments are required: COMMAND"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_gets_one_clear_line_and_status_2(jinfer, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("i").write_text("")
    status, out, err = jinfer(*argv)
    assert status == 2
    assert err.startswith("jinfer: error: ") and message in err
    assert err.count("\n") == 1 and out == ""


WRONG_WORDS = (
    *("", "x", "-1", "0", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "0.5", "[]", "{}", "\udcff"),
    *("none", "True", "1\n2", "/", "/dev/null", "\x00", "-0.0", "1e-320", "\u0662", "1GiB" * 99),
)


def flags_of(parser, words=()):
    """Yields (words of the command, action) of every flag with a value, of every subcommand."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from flags_of(command, (*words, name))
        elif action.option_strings and action.nargs != 0:
            yield words, action


@pytest.mark.parametrize("words", sorted({words for words, _ in flags_of(cli.build_parser())}))
def test_every_flag_reads_any_word_or_refuses_it_in_one_line(capsys, words):
    parser = cli.build_parser()
    for action in [action for found, action in flags_of(parser) if found == words]:
        name = action.option_strings[-1]
        for word in WRONG_WORDS:
            try:
                parser.parse_args([*words, f"{name}={word}"])
            except SystemExit as exit_:
                assert exit_.code == 2
                err = capsys.readouterr().err
                assert err.startswith("jinfer: error: ") and err.count("\n") == 1, (name, word)
        files = (flags.path, flags.input_file, flags.result_file)
        if action.type in (*files, training.positive, flags.size):
            with pytest.raises(SystemExit):
                parser.parse_args([*words, f"{name}="])
            assert f"argument {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("plan", "--model", "llama-3-8b", "--quantization", ""), "quantization must be fp8"),
        (("plan", "--model", "llama-3-8b", "--kv-dtype", ""), "kv"),
        (("plan", "--memory", "9" * 400), "argument --memory: a size must be below 2**63 bytes"),
        (("train-draft", "--output", "t", "--steps", "9" * 30), "an integer in 1..2**31-1"),
        (("train-medusa", "--output", ""), "argument --output: expected a path, got ''"),
        (("generate", "--input", "", "--output", "o"), "argument --input: expected a path"),
        (("eval", "--text", "t", "--json", "/"), "argument --json: expected a file, '/' is a fold"),
        (("eval", "--text", "/"), "argument --text: expected a file, '/' is a folder"),
        (("bench", "kv", "--text", "/"), "argument --text: expected a file, '/' is a folder"),
        (("train-draft", "--output", "t", "--data", "/"), "argument --data: expected a file"),
        (
            ("train-draft", "--output", "t", "--data", f"{FAKE}/x"),
            "fake_llm.py/x': Not a directory",
        ),
        (
            ("train-draft", "--output", "t", "--steps", "2", "--epochs", "2"),
            "not allowed with argument --steps",
        ),
        (("eval", "--text", "t", "--json", "/proc/none/j"), "--json '/proc/none/j' cannot be writ"),
        (("eval", "--text", "t", "--json", "x" * 300), "cannot be written: File name too long"),
        (("bench", "beam", "--json", "/proc/none/j"), "--json '/proc/none/j' cannot be written"),
        (
            ("quantize", "--check", "q", "--format", "int4-g64"),
            "--format has no effect with --check",
        ),
        (("quantize", "--check", "q", "--damp", "0.1"), "--damp has no effect with --check"),
        (("quantize", "--check", "q", "--held-out", "0"), "--held-out has no effect with --check"),
    ],
)
def test_flags_that_would_be_misread_or_ignored_are_refused(jinfer, argv, named):
    status, out, err = jinfer(*argv)
    assert (status, out) == (2, "") and named in err and err.count("\n") == 1


def test_quantize_refuses_a_full_folder_before_any_work(jinfer, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = jinfer("quantize", "--model", "none/such", "--output", tmp_path)
    assert status == 1 and "exists and is not empty" in err and err.count("\n") == 1


def test_an_unexpected_failure_names_its_type_and_where_to_look(jinfer, llm, monkeypatch):
    def explode(self, *args):
        raise RuntimeError("device lost\nwith details")

    monkeypatch.setattr(llm, "stream", explode)
    status, _, err = jinfer("generate", "--prompt", "x")
    assert status == 1
    assert err == "jinfer: error: RuntimeError: device lost with details (--debug shows where)\n"
    with pytest.raises(RuntimeError):
        jinfer("generate", "--prompt", "x", "--debug")


def test_an_interrupt_ends_cleanly_and_frees_the_request(jinfer, llm, monkeypatch):
    closed = []

    def stream(self, prompt, params):
        try:
            yield from list(fake_llm.FakeLLM.stream(self, prompt, params))[:2]
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(llm, "stream", stream)
    status, out, err = jinfer("generate", "--raw", "--prompt", "hello")
    assert (status, out, err) == (130, "HE\n", "jinfer: interrupted\n")
    assert closed


def test_a_closed_stdout_is_no_error(jinfer, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it below `>&-`
    assert jinfer("plan", "--model", "llama-2-7b")[::2] == (0, "")


# --- JSONL ---------------------------------------------------------------------------------------


def results(path):
    return {record["line"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_jsonl_takes_all_three_prompts_and_line_parameters(jinfer, llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "one"}\n'
        '{"messages": [{"role": "user", "content": "two"}], "id": "b"}\n'
        '{"prompt_token_ids": [120], "sampling_params": {"temperature": 0.7, "n": 2}}\n'
    )
    status, out, err = jinfer("generate", "--input", source, "--output", target, "--max-tokens", 12)
    assert (status, out) == (0, "")
    assert "3 of 3 lines done (17 tokens" in err
    found = results(target)
    texts = {n: [o["text"] for o in record["outputs"]] for n, record in found.items()}
    assert texts == {1: ["ONE"], 2: ["USER:TWO;ASS"], 3: ["X", "X"]}
    assert found[2]["id"] == "b"
    assert [llm.last.params[str(n)].temperature for n in (1, 2, 3)] == [0.0, 0.0, 0.7]


def test_a_job_keeps_twice_the_running_requests_in_flight(jinfer, llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n' * 30)
    status, _, _ = jinfer("generate", "--input", source, "--output", target, "--max-num-seqs", 3)
    assert (status, llm.last.most_requests, len(results(target))) == (0, 6, 30)


def test_a_finished_job_loads_no_model(jinfer, llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n')
    assert jinfer("generate", "--input", source, "--output", target)[0] == 0
    llm.last = None
    status, _, err = jinfer("generate", "--input", source, "--output", target)
    assert (status, err) == (0, "jinfer: nothing to do: all 1 lines are done\n")
    assert llm.last is None


TYPICAL = '{"method": "medusa", "heads": "h", "acceptance": "typical"}'
LOSSLESS = '{"method": "ngram", "num_speculative_tokens": 4}'


@pytest.mark.parametrize(
    "other",
    [("--top-k", 5), ("--kv-cache-dtype", "int4"), ("--speculative-config", TYPICAL)],
)
def test_other_flags_do_not_mix_into_the_same_output(jinfer, tmp_path, other):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n')
    jinfer("generate", "--input", source, "--output", target)
    status, _, err = jinfer("generate", "--input", source, "--output", target, *other)
    assert status == 2 and "another model or settings" in err


def test_flags_that_change_no_result_may_change_between_runs(jinfer, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n')
    jinfer("generate", "--input", source, "--output", target)
    for other in (("--max-num-seqs", 3), ("--speculative-config", LOSSLESS)):
        status, _, err = jinfer("generate", "--input", source, "--output", target, *other)
        assert status == 0 and "all 1 lines are done" in err


def test_bad_lines_are_reported_and_the_status_is_1(jinfer, llm, monkeypatch, tmp_path):
    def refuse(self, messages, **kwargs):
        raise jinja2.TemplateError("roles must alternate")

    monkeypatch.setattr(fake_llm.FakeTokenizer, "apply_chat_template", refuse)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "one"}\n{oops\n{"prompt": "x", "sampling_params": {"top_p": 3}}\n'
        '{"prompt": "x", "sampling_params": {"temprature": 3}}\n'
        '{"messages": [{"role": "user", "content": "x"}]}\n{"prompt": "two"}\n'
    )
    status, _, err = jinfer("generate", "--input", source, "--output", target)
    assert status == 1
    assert sorted(results(target)) == [1, 6]
    for line in (
        f"jinfer: {source} line 2: not JSON: ",
        f"jinfer: {source} line 3: top_p must lie in (0, 1], got 3.0",
        f"jinfer: {source} line 4: SamplingParams has no field 'temprature'; did you mean",
        f"jinfer: {source} line 5: the chat template refuses these messages: roles must alternate",
        "jinfer: 2 of 6 lines done",
        "jinfer: error: 4 lines failed: 2, 3, 4, 5",
    ):
        assert line in err


def test_a_full_disk_is_one_line_and_status_1(jinfer, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "one"}\n')
    status, _, err = jinfer("generate", "--input", source, "--output", "/dev/full")
    assert status == 1
    assert "jinfer: error: /dev/full: No space left on device; the lines written so far" in err


SCRIPT = """
import importlib.util, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a job in the background
spec = importlib.util.spec_from_file_location("fake_llm", sys.argv[1])
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)
sys.modules["jinfer.llm"] = types.SimpleNamespace(LLM=fake.FakeLLM)
from jinfer.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def start(*argv, **kwargs):
    """Starts a command over the fake engine in a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(FAKE),
            *map(str, argv),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, -15)]
)
def test_a_stopped_job_goes_on_where_it_was(jinfer, tmp_path, number, status):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "prompt {i}"}}\n' for i in range(40)))
    argv = ("generate", "--input", source, "--output", target)
    process = start(*argv, env={**os.environ, "FAKE_LLM_STEP_S": "0.04"})
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if target.exists() and target.stat().st_size > 1000:
            process.send_signal(number)
            break
        time.sleep(0.005)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.endswith("continues from there\njinfer: interrupted\n")
    num_done = len(target.read_text().splitlines())
    assert 0 < num_done < 40
    status, _, err = jinfer(*argv)
    assert status == 0 and "40 of 40 lines done" in err
    assert sorted(results(target)) == list(range(1, 41))
    assert len(target.read_text().splitlines()) == 40


def test_a_reader_that_goes_away_is_no_traceback():
    process = start("generate", "--raw", "--prompt", "x" * 400, "--max-tokens", 400)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert err == ""


@pytest.mark.parametrize("command", [["scripts/generate.py"], ["-m", "jinfer", "generate"]])
def test_the_script_and_the_module_are_the_command(command):
    done = subprocess.run(
        [sys.executable, *command, "--input", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("jinfer: error: --input needs --output")


# --- chat ----------------------------------------------------------------------------------------


def test_chat_remembers_resets_and_leaves(jinfer, monkeypatch, tmp_path):
    turns = tmp_path / "turns"
    turns.write_text("a\n\nb\n/reset\nc\n/exit\nnever\n")
    with turns.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = jinfer("chat", "--system", "s")
    assert status == 0
    assert out.splitlines() == [
        "SYSTEM:S;USER:A;ASSISTANT:",
        "SYSTEM:S;USER:A;ASSISTANT:SYSTEM:S;USER:A;ASSISTANT:;USER:B;ASSISTANT:",
        "SYSTEM:S;USER:C;ASSISTANT:",
    ]
    assert err.count("first token after") == 3


def test_a_turn_that_does_not_fit_is_forgotten_and_the_chat_goes_on(jinfer, monkeypatch, tmp_path):
    turns = tmp_path / "turns"
    turns.write_text("x" * 600 + "\nb\n")
    with turns.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = jinfer("chat")
    assert (status, out) == (1, "USER:B;ASSISTANT:\n")
    assert "more than max_model_len (500); /reset starts anew" in err


def fail_on(monkeypatch, words, tokens=0):
    """Has texts of prompts with one of `words` end with an error after so many tokens."""
    make_output = fake_llm.FakeLLM.make_output

    def fail(self, request, start):
        output = make_output(self, request, start)
        prompt = "".join(map(chr, request.ids))
        if request.num_out > tokens and any(word in prompt for word in words):
            request.num_out = len(request.answer)
            output.finished = True
            for completion in output.outputs:
                completion.text, completion.token_ids = "", []
                completion.finish_reason = "error"
                completion.error = "request x: the model computed NaN or infinity"
        return output

    monkeypatch.setattr(fake_llm.FakeLLM, "make_output", fail)


@pytest.mark.parametrize(("tokens", "text"), [(0, ""), (3, "BAD\n")])
@pytest.mark.parametrize("samples", [(), ("--n", 2, "--temperature", 1)])
def test_a_text_that_ends_with_an_error_is_no_success(jinfer, monkeypatch, tokens, text, samples):
    fail_on(monkeypatch, ["bad"], tokens)
    status, out, err = jinfer("generate", "--raw", "--prompt", "bad weights", *samples)
    assert status == 1
    assert out == ("" if samples else text)
    assert err == "jinfer: error: request x: the model computed NaN or infinity\n"


def test_a_beam_search_that_finds_nothing_is_no_success(jinfer, llm, monkeypatch):
    found = types.SimpleNamespace(sequences=[], error="beam search over prompt 0: no token left")
    monkeypatch.setattr(llm, "beam_search", lambda *_: [found])
    status, out, err = jinfer("generate", "--raw", "--prompt", "hi", "--num-beams", 2)
    assert (status, out, err) == (1, "", f"jinfer: error: {found.error}\n")


def test_a_turn_that_ends_with_an_error_is_forgotten(jinfer, monkeypatch, tmp_path):
    fail_on(monkeypatch, ["bad"])
    turns = tmp_path / "turns"
    turns.write_text("a\nbad\nb\n")
    with turns.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = jinfer("chat")
    assert status == 1
    assert out.splitlines() == [
        "USER:A;ASSISTANT:",
        "USER:A;ASSISTANT:USER:A;ASSISTANT:;USER:B;ASSISTANT:",
    ]
    assert "jinfer: error: request x: the model computed NaN or infinity; /reset" in err


def test_lines_that_come_during_a_job_are_counted_apart(jinfer, llm, monkeypatch, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n')

    def append(self, *args, **kwargs):
        Spy.__init__(self, *args, **kwargs)
        with source.open("a") as file:
            file.write('{"prompt": "two"}\n')

    late = type("Late", (Spy,), {"__init__": append})
    monkeypatch.setitem(sys.modules, "jinfer.llm", types.SimpleNamespace(LLM=late))
    status, _, err = jinfer("generate", "--input", source, "--output", target)
    assert status == 0 and "jinfer: 1 of 1 lines done" in err
    assert "1 lines were appended during the run: run the same command again" in err


def test_an_interrupted_answer_stays_in_the_conversation(jinfer, llm, monkeypatch, tmp_path):
    calls = []

    def stream(self, prompt, params):
        calls.append("".join(map(chr, prompt["prompt_token_ids"])))
        yield from list(fake_llm.FakeLLM.stream(self, prompt, params))[:3]
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm, "stream", stream)
    turns = tmp_path / "turns"
    turns.write_text("a\nb\n")
    with turns.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, _, err = jinfer("chat")
    assert status == 0 and "stopped" in err
    assert calls[1] == "user:a;assistant:USE;user:b;assistant:"


def test_chat_without_a_chat_template_is_refused(jinfer, llm):
    llm.chat_template = None
    status, _, err = jinfer("chat", "--model", "base")
    assert status == 2 and "base has no chat template" in err


# --- plan ----------------------------------------------------------------------------------------


def plan_table(out):
    """{label: size} of the printed rows."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[1:]]
    return {row[0]: row[-1] for row in rows}


def test_plan_prints_the_published_sizes(jinfer):
    _, out, _ = jinfer("plan", "--model", "llama-2-7b", "--context", 4096, "--batch", 8)
    assert out.startswith("llama-2-7b: 6,738,415,616 parameters, 32 layers, 32 KV heads of 128\n")
    table = plan_table(out)
    assert table["weights"] == "12.55 GiB"
    assert table["KV cache, 4096 tokens"] == "2.00 GiB"
    assert table["KV cache, 8 x 4096 tokens"] == "16.00 GiB"
    _, out, _ = jinfer("plan", "--model", "llama-2-70b", "--context", 4096)
    assert plan_table(out)["KV cache, 4096 tokens"] == "1.25 GiB"


def test_plan_takes_quantization_kv_dtype_and_memory(jinfer):
    _, out, _ = jinfer(
        *("plan", "--model", "llama-3-8b", "--quantization", "int4-g128", "--kv-dtype", "int8"),
        *("--memory", "24GiB", "--context", 8192),
    )
    config = memory.PRESETS["llama-3-8b"]
    weights = memory.weight_bytes(config, "bfloat16", "int4-g128")
    assert plan_table(out)["weights"] == memory.format_size(weights)
    assert plan_table(out)["KV cache, 8192 tokens"] == "528.00 MiB"  # 512 and the scales
    room = 0.9 * 24 * 2**30 - weights - memory.temp_bytes(config, num_tokens=1, num_seqs=1)
    pages = int(room // memory.page_bytes(config, 16, "int8"))
    assert f"{pages} pages of 16 tokens: {pages // 512} sequences of 8192" in out


def test_plan_says_when_the_weights_do_not_fit(jinfer):
    _, out, _ = jinfer("plan", "--model", "llama-2-70b", "--memory", "80GiB")
    assert "80.00 GiB at 0.9 does not hold the weights" in out


def test_plan_reads_the_config_of_a_folder(jinfer, tmp_path):
    fields = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    status, out, err = jinfer("plan", "--model", tmp_path)
    assert status == 0, err
    block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert f"{2 * 100 * 8 + 2 * block + 8:,} parameters, 2 layers, 1 KV heads of 4" in out
    status, _, err = jinfer("plan", "--model", tmp_path / "nowhere")
    assert status == 1 and err.count("\n") == 1 and "nowhere" in err

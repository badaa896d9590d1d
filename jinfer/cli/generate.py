"""`jinfer generate`: completes one prompt on the terminal, or a JSONL file of prompts."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from jinfer.cli import flags
from jinfer.cli.terminal import chat_prompt, check, format_rate, print_stream, say
from jinfer.jobs import jsonl

SUMMARY = "complete one prompt, or every line of a JSONL file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `jinfer generate`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt; its text streams to stdout")
    source.add_argument("--input", type=flags.path, metavar="FILE", help="JSONL file of prompts")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="JSONL file of results")
    parser.add_argument(
        "--raw",
        action="store_true",
        help=(
            "continue --prompt as it is; by default it becomes a user message in the "
            "model's chat template, if the model has one"
        ),
    )
    flags.add_flags(flags.add_model_arguments(parser), flags.GENERATE_FLAGS)
    beams = parser.add_argument_group(
        "beam search", "with --prompt; the best --n texts are printed"
    )
    flags.add_flags(beams, flags.BEAM_FLAGS)


def run(args: argparse.Namespace) -> int:
    """Completes one prompt, or every line of a JSONL file.

    With --prompt the text streams to stdout, followed by a one-line summary on stderr. With
    --num-beams the most likely text that a beam search finds is printed at the end.

    With --input and --output each input line is an object with one of "prompt" (continued as it
    is), "messages" (through the chat template) or "prompt_token_ids", and may have "id" (default:
    the line number) and "sampling_params" (which override the flags). Results are appended in the
    order in which they finish, as {"line", "id", "key", "num_prompt_tokens", "outputs": [{"text",
    "token_ids", "finish_reason", ...}]}. Run the same command again to resume a job that was
    killed. Bad lines are reported and the others completed; the exit status is then 1.
    """
    sampling = flags.sampling_fields(args)
    beams = flags.make_beam_params(args)
    if args.input is None:
        if args.output is not None:
            raise ValueError("--output goes with --input; redirect stdout to keep the text")
        return _generate_one(args, sampling) if beams is None else _search(args, beams)
    if beams is not None:
        raise ValueError("--num-beams goes with --prompt; a JSONL job samples")
    if args.output is None:
        raise ValueError("--input needs --output, the JSONL file for the results")
    if args.raw:
        raise ValueError('--raw goes with --prompt; in a JSONL file "prompt" is always raw')
    return _generate_jsonl(args, sampling)


def _generate_one(args: argparse.Namespace, sampling: dict[str, Any]) -> int:
    params = flags.make_text_params(sampling)
    llm = flags.load_llm(args)
    prompt = _prompt(args, llm)
    if params.n == 1:
        summary = print_stream(llm, prompt, params, [])
    else:
        begin = time.perf_counter()
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        for completion in output.outputs:
            if completion.error is None or completion.text:
                print(f"[{completion.index + 1}] {completion.text}")
        check([output])
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        summary = format_rate(num_tokens, time.perf_counter() - begin)
    print(summary, file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace, llm: Any) -> Any:
    if args.raw:
        return args.prompt
    if getattr(llm.get_tokenizer(), "chat_template", None):
        return chat_prompt(llm, [{"role": "user", "content": args.prompt}])
    say("note: the model has no chat template, so the prompt is continued as it is")
    return args.prompt


def _search(args: argparse.Namespace, params: Any) -> int:
    llm = flags.load_llm(args)
    prompt = _prompt(args, llm)
    begin = time.perf_counter()
    texts = check(llm.beam_search(prompt, params))[0].sequences
    seconds = time.perf_counter() - begin
    for i, text in enumerate(texts, 1):
        print(text.output_text if params.num_returned == 1 else f"[{i}] {text.output_text}")
    scores = ", ".join(f"{text.score:.4f}" for text in texts)
    print(f"{params.beam_width} beams, {seconds:.2f} s, scores {scores}", file=sys.stderr)
    return 0


def _generate_jsonl(args: argparse.Namespace, sampling: dict[str, Any]) -> int:
    from tqdm import tqdm

    from jinfer.config.sampling_params import RequestOutputKind

    flags.make_params(sampling)  # wrong flags fail here, not on every line
    with jsonl.Job(args.input, args.output, _settings(args, sampling)) as job:
        if job.num_done == job.num_lines:
            say(f"nothing to do: all {job.num_lines} lines are done")
            return 0
        llm = flags.load_llm(args)
        begin = time.perf_counter()
        bar = tqdm(total=job.num_lines, initial=job.num_done, unit="line", disable=None)

        def make_request(line: jsonl.Line) -> tuple[Any, Any]:
            fields = {**sampling, **line.sampling_params}
            params = flags.make_params(fields, output_kind=RequestOutputKind.FINAL_ONLY)
            if line.messages is not None:
                return chat_prompt(llm, line.messages), params
            if line.prompt_token_ids is not None:
                return {"prompt_token_ids": line.prompt_token_ids}, params
            return line.prompt, params

        def report(number: int, message: str) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                say(f"{args.input} line {number}: {message}")

        def advance(summary: jsonl.Summary) -> None:
            seconds = time.perf_counter() - begin
            bar.set_postfix_str(format_rate(summary.num_output_tokens, seconds), refresh=False)
            bar.update(job.num_done + summary.num_done + summary.num_failed - bar.n)

        try:
            with bar:
                summary = jsonl.run(
                    llm,
                    job,
                    make_request=make_request,
                    max_in_flight=2 * llm.config.max_num_seqs,
                    on_error=report,
                    on_progress=advance,
                )
        except KeyboardInterrupt:
            say(f"{args.output} has complete lines only; the same command continues from there")
            raise
        num_done = job.num_done + summary.num_done
        rate = format_rate(summary.num_output_tokens, time.perf_counter() - begin)
        say(f"{num_done} of {job.num_lines} lines done ({rate})")
        if job.num_appended:
            say(
                f"{job.num_appended} lines were appended during the run: run the same command again"
            )
    return _report_failures(summary)


def _settings(args: argparse.Namespace, sampling: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that results depend on; a job can only resume with the same ones."""
    settings = {"model": args.model, "sampling": sampling}
    for name in ("dtype", "quantization", "tokenizer", "revision", "max_model_len"):
        settings[name] = getattr(args, name, None)
    if hasattr(args, "kv_cache_dtype"):
        settings["kv_cache_dtype"] = args.kv_cache_dtype
    if getattr(args, "speculative_config", {}).get("acceptance") == "typical":  # lossy
        settings["speculative_config"] = args.speculative_config
    return settings


def _report_failures(summary: jsonl.Summary) -> int:
    """Prints which lines failed; returns the exit status."""
    if not summary.num_failed:
        return 0
    shown = ", ".join(map(str, summary.failed_lines))
    more = ", ..." if summary.num_failed > len(summary.failed_lines) else ""
    say(f"error: {summary.num_failed} lines failed: {shown}{more}")
    return 1

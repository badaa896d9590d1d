"""Batch jobs: every line exactly once, whatever happens, and never a half-written one."""

import bz2
import errno
import gzip
import json
import lzma
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_llm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jinfer.jobs import jsonl

SETTINGS = {"model": "fake"}


def make_request(line):
    params = SimpleNamespace(**{"max_tokens": 100, "n": 1, **line.sampling_params})
    if line.messages is not None:
        return "".join(message["content"] for message in line.messages), params
    if line.prompt_token_ids is not None:
        return {"prompt_token_ids": line.prompt_token_ids}, params
    return line.prompt, params


def write_prompts(path, count):
    lines = [json.dumps({"prompt": f"prompt {i} " + "x" * (i % 7)}) for i in range(1, count + 1)]
    path.write_text("\n".join(lines) + "\n")
    return lines


def run(source, target, *, config=SETTINGS, max_in_flight=8):
    """Runs a job to its end; returns its summary, its errors and the most requests held at once."""
    errors = {}
    with jsonl.Job(source, target, config) as job:
        llm = fake_llm.FakeLLM("fake")
        summary = jsonl.run(
            llm,
            job,
            make_request=make_request,
            max_in_flight=max_in_flight,
            on_error=errors.__setitem__,
        )
    return summary, errors, llm.most_requests


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_line(path):
    found = {record["line"]: record for record in records(path)}
    assert len(found) == len(records(path)), "a line was answered twice"
    return found


def test_every_line_is_answered_once_with_its_id(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "one", "id": null, "messages": null, "sampling_params": null}\n'
        "\n"
        '{"id": "b", "prompt_token_ids": [116, 119, 111]}\n'
        '{"id": 7, "messages": [{"role": "user", "content": "three"}], '
        '"sampling_params": {"max_tokens": 2}}'
    )
    summary, errors, _ = run(source, target)
    assert not errors and (summary.num_done, summary.num_failed) == (3, 0)
    found = by_line(target)
    assert {n: (r["id"], r["outputs"][0]["text"]) for n, r in found.items()} == {
        1: (1, "ONE"),
        3: ("b", "TWO"),
        4: (7, "TH"),
    }
    assert found[3]["outputs"][0] == {
        "text": "TWO",
        "token_ids": [84, 87, 79],
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert summary.num_output_tokens == 8


def test_a_long_input_does_not_sit_in_memory(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 200)
    _, _, most_requests = run(source, target, max_in_flight=5)
    assert most_requests == 5
    assert len(by_line(target)) == 200


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_prompts(folder / "in.jsonl", 12)
    run(folder / "in.jsonl", folder / "out.jsonl")
    return folder


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_anywhere_and_run_again_gives_every_line_once(finished, tmp_path_factory, data):
    whole = (finished / "out.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    target = tmp_path_factory.mktemp("cut") / "out.jsonl"
    target.write_bytes(whole[:cut])
    summary, errors, _ = run(finished / "in.jsonl", target)
    assert not errors
    assert by_line(target) == by_line(finished / "out.jsonl")
    assert summary.num_done == 12 - whole[:cut].count(b"\n")
    assert target.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, cut) + 1])


def test_lines_added_to_the_input_are_done_by_the_next_run(finished, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes((finished / "in.jsonl").read_bytes() + b'{"prompt": "more"}\n')
    target.write_bytes((finished / "out.jsonl").read_bytes())
    summary, _, _ = run(source, target)
    assert summary.num_done == 1
    assert by_line(target)[13]["outputs"][0]["text"] == "MORE"


BAD_LINES = [
    ('{"prompt": "torn', "not JSON"),
    ('["prompt"]', "expected a JSON object, got list"),
    ('{"prompt": "x", "temprature": 1}', "unknown key 'temprature'"),
    ('{"id": 3}', "expected one of prompt, messages, prompt_token_ids, got none"),
    ('{"prompt": "x", "prompt_token_ids": [1]}', "expected one of"),
    ('{"prompt": 5}', "prompt must be a string"),
    ('{"messages": []}', "messages must be a list"),
    ('{"messages": ["hello"]}', "messages must be a list"),
    ('{"prompt_token_ids": [1.5]}', "prompt_token_ids must be a list of integers"),
    ('{"prompt_token_ids": [true]}', "prompt_token_ids must be a list of integers"),
    ('{"prompt": "x", "id": NaN}', "NaN is not JSON"),
    ('{"prompt": "x", "id": [1]}', "id must be a string or an integer"),
    ('{"prompt": "x", "sampling_params": [1]}', "sampling_params must be an object"),
    ('{"prompt": "x", "sampling_params": []}', "sampling_params must be an object, got list"),
    ('{"prompt": "x", "sampling_params": ""}', "sampling_params must be an object, got str"),
    ('{"prompt": "x", "sampling_params": 0}', "sampling_params must be an object, got int"),
    ('{"prompt": "x", "sampling_params": false}', "sampling_params must be an object, got bool"),
    ('{"prompt": "x", "sampling_params": {"output_kind": 1}}', "output_kind cannot be chosen"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ('{"prompt": ""}', "the prompt is empty"),
    ('{"prompt": "' + "x" * 501 + '"}', "more than max_model_len"),
    ("[" * 100_000, "not JSON: nested too deeply"),
]


def test_bad_lines_are_named_and_the_rest_is_done(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [text for bad, _ in BAD_LINES for text in (bad, '{"prompt": "good"}')]
    source.write_bytes("\n".join(lines).encode() + b'\n\xff\xfe"\n')
    summary, errors, _ = run(source, target)
    assert summary.num_done == len(BAD_LINES)
    assert summary.num_failed == len(BAD_LINES) + 1
    assert summary.failed_lines == list(range(1, len(lines) + 2, 2))[: jsonl.MAX_REPORTED_LINES]
    for i, (bad, message) in enumerate(BAD_LINES):
        assert message in errors[2 * i + 1], bad[:80]
    assert sorted(by_line(target)) == list(range(2, len(lines) + 1, 2))


def test_a_line_that_ends_with_an_error_is_named_and_tried_again(tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 5)
    make_output = fake_llm.FakeLLM.make_output

    def fail_the_third(self, request, start):
        output = make_output(self, request, start)
        if output.finished and request.request_id == "3":
            output.outputs[0].finish_reason = "error"
            output.outputs[0].error = "request 3/0: the model computed NaN or infinity"
        return output

    with monkeypatch.context() as patch:
        patch.setattr(fake_llm.FakeLLM, "make_output", fail_the_third)
        summary, errors, _ = run(source, target)
    assert (summary.num_done, summary.num_failed, summary.failed_lines) == (4, 1, [3])
    assert list(errors) == [3] and "NaN" in errors[3]
    assert sorted(by_line(target)) == [1, 2, 4, 5]
    summary, errors, _ = run(source, target)
    assert (summary.num_done, summary.num_failed, errors) == (1, 0, {})
    assert sorted(by_line(target)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("my notes\n", "line 1 is not a record"),
        ("my notes", "its end b'my notes'... is not a record"),
        ('{"line": 1}\n', "line 1 is not a record"),
        ('{"line": 0, "key": "1"}\n', "line 1 is not a record"),
        ('{"line": 99, "key": "1"}\n', "answers lines that the input does not have"),
        ('{"line": 99999999999, "key": "1"}\n', "answers input line 99999999999"),
        ('{"line": 1, "key": "1"}\n{"line": 1, "key": "1"}\n', "input line 1 a second time"),
        ('{"line": 1, "key": "1"}\n', "made from another line 1"),
    ],
)
def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path, text, reason):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 5)
    target.write_text(text)
    with pytest.raises(ValueError, match="not the output of this job") as error:
        run(source, target)
    assert reason in str(error.value)
    assert target.read_text() == text


def test_results_of_other_settings_or_another_input_are_refused(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 5)
    run(source, target)
    with pytest.raises(ValueError, match="another model or settings"):
        run(source, target, config={"model": "other"})
    source.write_text(source.read_text().replace("prompt 3", "prompt three"))
    with pytest.raises(ValueError, match="it was made from another line 3"):
        run(source, target)


def test_input_and_output_must_be_sensible_files(tmp_path):
    source = tmp_path / "in.jsonl"
    with pytest.raises(ValueError, match=r"in\.jsonl: no such file"):
        run(source, tmp_path / "out.jsonl")
    write_prompts(source, 1)
    with pytest.raises(ValueError, match="would overwrite the input"):
        run(source, source)
    with pytest.raises(ValueError, match="not a regular file"):
        run(tmp_path, tmp_path / "out.jsonl")
    with pytest.raises(FileNotFoundError):
        run(source, tmp_path / "missing" / "out.jsonl")


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl"])
def test_packed_input_gives_the_same_results(finished, tmp_path, name):
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress((finished / "in.jsonl").read_bytes()))
    run(source, target)
    assert by_line(target) == by_line(finished / "out.jsonl")
    assert run(source, target)[0].num_done == 0


def test_a_packed_input_may_have_more_lines_than_bytes(tmp_path):
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(b"\n" * 20_000 + b'{"prompt": "x"}\n'))
    run(source, target)
    assert run(source, target)[0].num_done == 0 and list(by_line(target)) == [20_001]


def test_damaged_packed_input_is_one_line_and_leaves_no_output_behind_lines(tmp_path):
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % i for i in range(500)))
    damaged = [whole[:-5], whole[:100], whole[:60] + b"\xff\x00" * 9 + whole[78:], whole + b"junk"]
    for content in (*damaged, whole[:-8] + bytes(8)):
        source.write_bytes(content)
        with pytest.raises(ValueError, match=r"in\.jsonl\.gz is damaged, or cut short: .+"):
            run(source, target)


@pytest.mark.parametrize(
    ("encode", "reason"),
    [
        (lambda text: text.encode("utf-16"), "is UTF-16"),
        (lambda text: text.encode("utf-16-le"), "is UTF-16 or UTF-32"),
        (lambda text: text.encode("utf-16-be"), "is UTF-16 or UTF-32"),
        (lambda text: text.encode("utf-32"), "is UTF-"),
        (lambda text: gzip.compress(text.encode("utf-16")), "is UTF-16"),
        (lambda text: bz2.compress(text.encode()), "is packed with bzip2"),
        (lambda text: lzma.compress(text.encode()), "is packed with xz"),
        (lambda text: b"\x28\xb5\x2f\xfd" + text.encode(), "is packed with zstd"),
        (lambda text: b"PK\x03\x04" + text.encode(), "is a zip archive"),
    ],
)
def test_input_in_another_encoding_gives_no_record(tmp_path, encode, reason):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(encode('{"prompt": "one"}\n{"prompt": "two"}\n'))
    with pytest.raises(ValueError, match=rf"in\.jsonl {reason}.*: it must be JSON lines in UTF-8"):
        run(source, target)
    assert not target.read_bytes()


def test_a_byte_order_mark_is_no_part_of_a_line_and_latin_1_is_named_by_line(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'\xef\xbb\xbf{"prompt": "one"}\r\n{"prompt": "caf\xe9"}\n{"prompt": "\xc3\xa9"}'
    )
    summary, errors, _ = run(source, target)
    assert {n: r["outputs"][0]["text"] for n, r in by_line(target).items()} == {1: "ONE", 3: "É"}
    assert list(errors) == [2] and errors[2].startswith("not UTF-8: ")
    assert summary.num_failed == 1


def test_a_line_of_utf_16_between_others_gives_no_record(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"prompt": "one"}\n' + '{"prompt": "two"}'.encode("utf-16"))
    assert list(run(source, target)[1]) == [2] and list(by_line(target)) == [1]


def test_results_are_not_packed(tmp_path):
    write_prompts(tmp_path / "in.jsonl", 1)
    with pytest.raises(ValueError, match=r"out\.jsonl\.gz: results are written uncompressed"):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz")


def test_lines_that_come_during_a_run_wait_for_the_next(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3)
    for appended in (2, 0):
        with jsonl.Job(source, target, SETTINGS) as job, source.open("a") as file:
            file.write('{"prompt": "late"}\n' * appended)
            file.flush()
            llm = fake_llm.FakeLLM("fake")
            summary = jsonl.run(
                llm, job, make_request=make_request, max_in_flight=8, on_error=lambda *_: None
            )
            assert job.num_appended == appended
            assert job.num_done + summary.num_done == job.num_lines
    assert sorted(by_line(target)) == [1, 2, 3, 4, 5]


def test_two_processes_cannot_write_one_output(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3)
    with (
        jsonl.Job(source, target, SETTINGS),
        pytest.raises(ValueError, match="another process is writing it"),
    ):
        run(source, target)
    assert run(source, target)[0].num_done == 3


def test_a_full_disk_leaves_whole_lines_and_the_job_goes_on_later(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="free some space and run the same command again"
        ) as error:
            run(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert error.value.errno == errno.EFBIG
    text = target.read_text()
    assert 0 < len(text) <= 2000 and text.endswith("\n")
    num_done = len(by_line(target))
    assert run(source, target)[0].num_done == 50 - num_done
    assert sorted(by_line(target)) == list(range(1, 51))


def test_a_device_without_space_gives_the_same_error(tmp_path):
    source = tmp_path / "in.jsonl"
    write_prompts(source, 3)
    with pytest.raises(OSError, match="No space left on device; the lines written"):
        run(source, Path("/dev/full"))


KILLED = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_jsonl", sys.argv[1])
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
test.run(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_killed_again_and_again_it_finishes_with_every_line_once(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 60)
    command = [sys.executable, "-c", KILLED, __file__, str(source), str(target)]
    path = os.pathsep.join([str(Path(fake_llm.__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "FAKE_LLM_STEP_S": "0.02", "PYTHONPATH": path}
    num_killed, sizes = 0, [0]
    for _ in range(30):
        process = subprocess.Popen(command, env=env)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if target.exists() and target.stat().st_size > sizes[-1] + 1500:
                process.kill()
            time.sleep(0.002)
        num_killed += process.wait() == -signal.SIGKILL
        sizes.append(target.stat().st_size)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert num_killed >= 3
    assert sizes == sorted(sizes)
    found = by_line(target)
    assert sorted(found) == list(range(1, 61))
    for number, record in found.items():
        prompt = json.loads(source.read_text().splitlines()[number - 1])["prompt"]
        assert record["outputs"][0]["text"] == prompt.upper()


def test_an_interrupt_while_writing_leaves_no_half_line(tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3)
    write = os.write

    def write_a_little(fd, data):
        write(fd, bytes(data)[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl.os, "write", write_a_little)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    assert target.read_bytes() == b""


def test_infinite_log_probabilities_become_null():
    entry = SimpleNamespace(logprob=float("-inf"), rank=3, decoded_token="x")
    completion = SimpleNamespace(
        text="x",
        token_ids=[5],
        finish_reason="length",
        stop_reason=None,
        logprobs=[{5: entry}],
        cumulative_logprob=float("-inf"),
    )
    output = SimpleNamespace(
        prompt_token_ids=[1, 2], prompt_logprobs=[None, {5: entry}], outputs=[completion]
    )
    record = jsonl.make_record(output, number=1, line_id="a", key=1)
    json.dumps(record, allow_nan=False)
    expected = [{"token_id": 5, "logprob": None, "rank": 3, "token": "x"}]
    assert record["prompt_logprobs"] == [None, expected]
    assert record["outputs"][0]["logprobs"] == [expected]

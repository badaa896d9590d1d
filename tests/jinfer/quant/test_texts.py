"""Files become documents, documents become sequences; what is too short or broken is named."""

import gzip
import json
import re

import numpy as np
import pytest

from jinfer.quant.texts import pack, read_texts, windows


def encode(text):
    return list(text.encode())


def test_a_text_file_is_one_document_plain_or_gz(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.txt.gz") == ["one\ntwo\n"]


def test_a_jsonl_row_is_its_text_or_its_known_parts(tmp_path):
    rows = [{"text": "a", "prompt": "x"}, {"prompt": "q", "completion": "r", "id": 3}, "plain"]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_texts(tmp_path / name) == ["a", "q\nr", "plain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not a text file in UTF-8"),
        # mtime=0: the bytes are part of the test's name, which every process must spell alike
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-12], "cut short"),
        ("a.txt.gz", b"not gzip", "not a text file"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 20, "not a text file"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.jsonl", b'{"label": "a"}\n', r"line 1: no text in fields \['label'\]"),
    ],
)
def test_a_file_without_text_is_refused_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_folders_and_paths_through_files_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(path))} is not a text file: [^\\n]*$"
        ):
            read_texts(path)


def test_packed_sequences_are_the_shuffled_documents_end_to_end():
    documents = [chr(97 + i) * 5 for i in range(6)]
    packed = pack(documents, encode, num_sequences=4, length=8, seed=1)
    assert packed.shape == (4, 8) and packed.dtype == np.int32
    text = bytes(packed.reshape(-1).tolist()).decode()
    parts = [part for part in text.split("\n\n") if len(part) == 5]
    assert len(set(parts)) == len(parts) >= 3 and set(parts) <= set(documents)
    np.testing.assert_array_equal(
        packed, pack(documents, encode, num_sequences=4, length=8, seed=1)
    )
    other = pack(documents, encode, num_sequences=4, length=8, seed=2)
    assert not np.array_equal(packed, other)
    with pytest.raises(ValueError, match="wants 9 sequences of 8 tokens, the text has 42 tokens"):
        pack(documents, encode, num_sequences=9, length=8)


def test_windows_are_consecutive_and_the_rest_is_dropped():
    got = windows("abcdefgh", encode, length=3)
    assert [bytes(row.tolist()).decode() for row in got] == ["abc", "def"]
    np.testing.assert_array_equal(windows("abcdefgh", encode, length=3, num_windows=1), got[:1])
    with pytest.raises(ValueError, match=r"has 2 windows of 3 tokens \(8 tokens\), wanted 3"):
        windows("abcdefgh", encode, length=3, num_windows=3)
    with pytest.raises(ValueError, match="has 0 windows"):
        windows("ab", encode, length=3)

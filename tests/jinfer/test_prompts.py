"""What users call a prompt: kinds that are read, and errors that name the rest."""

import numpy as np
import pytest
from tiny_models import byte_tokenizer

from jinfer.llm_options import as_list
from jinfer.prompts import apply_chat_template, chat_prompts, read_prompt

SIMPLE = "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}"
ADDING = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"
LOOPING = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m['content'] %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(300)


def chat(tokenizer, content, template):
    messages = [{"role": "user", "content": content}]
    return tokenizer.decode(apply_chat_template(tokenizer, messages, chat_template=template))


@pytest.mark.parametrize("template", [SIMPLE, ADDING])
def test_parts_of_text_are_joined_for_templates_that_read_strings(tokenizer, template):
    assert chat(tokenizer, PARTS, template) == "user: one\ntwo\n"
    assert chat(tokenizer, PARTS[:1], template) == chat(tokenizer, "one", template)


def test_a_template_that_loops_over_parts_gets_them(tokenizer):
    assert chat(tokenizer, PARTS, LOOPING) == "user: <one><two>"


@pytest.mark.parametrize("template", [SIMPLE, LOOPING])
@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, "text"])
def test_a_part_that_is_no_text_is_refused(tokenizer, template, part):
    with pytest.raises(ValueError, match="must be text, got '"):
        chat(tokenizer, [*PARTS, part], template)


@pytest.mark.parametrize("template", [ADDING, "{{ 1 / 0 }}", "{{ bad"])
def test_what_a_template_stumbles_over_is_said(tokenizer, template):
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        chat(tokenizer, 5, template)


@pytest.mark.parametrize("messages", ["hi", ["hi"], None, {"role": "user", "content": "hi"}])
def test_messages_of_another_kind_are_refused(tokenizer, messages):
    with pytest.raises(TypeError, match="messages must be a list of dicts with role and content"):
        chat_prompts(tokenizer, messages, chat_template=SIMPLE)


def test_half_a_surrogate_pair_is_no_prompt(tokenizer):
    with pytest.raises(ValueError, match=r"it holds '\\udcff'"):
        read_prompt("caf\udcff", tokenizer)
    with pytest.raises(ValueError, match=r"it holds '\\ud800'"):
        chat(tokenizer, "\ud800", SIMPLE)


def test_token_ids_are_any_integers(tokenizer):
    ids = list(np.array([11, 12]))
    assert as_list(ids) == [ids]
    read = read_prompt(ids, tokenizer).token_ids
    assert read == [11, 12] and all(type(token) is int for token in read)


@pytest.mark.parametrize(
    ("prompt", "named"), [([1, 2.0], "2.0"), ([True], "True"), (b"ab", "bytes"), ([[1]], r"\[1\]")]
)
def test_other_kinds_are_named(tokenizer, prompt, named):
    with pytest.raises(TypeError, match=f"text or token ids, got .*{named}"):
        read_prompt(prompt, tokenizer)

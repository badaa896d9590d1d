"""What users call a prompt: kinds that are read, and errors that name the rest."""

import copy
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import byte_tokenizer

from jinfer.text.prompts import apply_chat_template, as_list, chat_prompts, read_chat, read_prompt

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


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ bad"])
def test_what_a_template_stumbles_over_is_said(tokenizer, template):
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        chat(tokenizer, "hi", template)


@pytest.mark.parametrize("messages", ["hi", ["hi"], None, {"role": "user", "content": "hi"}])
def test_messages_of_another_kind_are_refused(tokenizer, messages):
    with pytest.raises(TypeError, match="messages must be a list of dicts with role and content"):
        chat_prompts(tokenizer, messages, chat_template=SIMPLE)


def test_half_a_surrogate_pair_is_no_prompt(tokenizer):
    with pytest.raises(ValueError, match=r"it holds '\\udcff'"):
        read_prompt("caf\udcff", tokenizer)
    with pytest.raises(ValueError, match=r"it holds '\\ud800'"):
        chat(tokenizer, "\ud800", SIMPLE)


ARRAYS = [np.array([4, 5]), np.array([4, 5], np.uint16), jnp.array([4, 5]), jnp.array([4, 5])[:]]


@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_of_ids_are_prompts(array):
    for prompts in (array, [array], {"prompt_token_ids": array}, (array,), list(array), [*array]):
        read = [read_prompt(prompt, None).token_ids for prompt in as_list(prompts)]
        assert read == [[4, 5]]
        assert all(type(token) is int for token in read[0])
    rows = [read_prompt(prompt, None).token_ids for prompt in as_list(np.stack([array, array]))]
    assert rows == [[4, 5], [4, 5]]


@pytest.mark.parametrize(
    "array", [np.array([4.0]), np.array([True]), np.array([[4]]), np.array(["a"]), jnp.ones(2)]
)
def test_arrays_of_anything_else_are_named(array):
    with pytest.raises(TypeError, match=r"got an array of .*ids are a 1-D array of integers"):
        read_prompt(array, None)
    with pytest.raises(TypeError, match="a prompt must be text or token ids, got"):
        for prompt in as_list([4, array]):
            read_prompt(prompt, None)


@pytest.mark.parametrize("prompts", [None, 5, np.int64(4), np.array(4), 1.5, len])
def test_what_is_neither_a_prompt_nor_a_list_of_them_is_named(prompts):
    with pytest.raises(TypeError, match="prompts must be text, token ids or a list of either, got"):
        as_list(prompts)


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


# What the templates of these families do with tool calls, and nothing else that they do.
QWEN = """{% for message in messages %}
{% if message.role != 'assistant' or not message.tool_calls %}
{{ message.role + ': ' + message.content }}{% else %}{{ message.role }}: {% if message.content %}
{{ message.content }}{% endif %}{% for tool_call in message.tool_calls %}
{% if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}{% endfor %}"""
LLAMA = """{% for message in messages %}
{% if not (message.role == 'ipython' or message.role == 'tool'
or 'tool_calls' in message) %}{{ message.role + ': ' + message['content'] | trim }}
{% elif 'tool_calls' in message %}{% if not message.tool_calls | length == 1 %}
{{ raise_exception("This model only supports single tool-calls at once!") }}{% endif %}
{% set tool_call = message.tool_calls[0].function %}
{{ tool_call.name }}.call(
{% for name, value in tool_call.arguments | items %}{{ name }}="{{ value }}"
{% endfor %}){"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
{% else %}{% if message.content is mapping or message.content is iterable %}
{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}{% endif %}{% endfor %}"""
HERMES = """{% for message in messages %}{% if message.tool_calls is defined %}
{% for tool_call in message.tool_calls %}<tool_call>{{ tool_call.function | tojson }}</tool_call>
{% endfor %}{% else %}{{ message.role }}: {{ message.content }}{% endif %}{% endfor %}"""
MISTRAL = """{% for message in messages %}{% if message['role'] == 'user' %}
[INST] {{ message['content'] }}[/INST]
{% elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] [
{% for tool_call in message.tool_calls %}{% set out = tool_call.function | tojson %}{{ out[:-1] }}
, "id": "{{ tool_call.id }}"}{% endfor %}]{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] | trim }}{% else %}
{% set content = message.content.content if message.content is mapping else message.content %}
[TOOL_RESULTS] {"content": {{ content | string }}}{% endif %}{% endfor %}"""
DEEPSEEK = """{% for message in messages %}{% if message['role'] == 'assistant' and
message['content'] is none %}{% for tool in message['tool_calls'] %}
{{ tool['type'] + tool['function']['name'] + '"arguments": ' + tool['function']['arguments'] }}
{% endfor %}{% elif message['role'] == 'assistant' and message['content'] is not none %}
{{ message['content'] }}{% else %}{{ message['role'] + ': ' + message['content'] }}{% endif %}
{% endfor %}"""
TEMPLATES = {
    "qwen": QWEN, "llama": LLAMA, "hermes": HERMES, "mistral": MISTRAL, "deepseek": DEEPSEEK
}  # fmt: skip
ARGUMENTS = '{"city": "Zürich", "days": 3}'


def history(arguments=ARGUMENTS, **changes):
    """A conversation as OpenAI's clients send it, of a call and its result."""
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_1234", "type": "function", "function": function}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], **changes}
    result = {"role": "tool", "tool_call_id": "call_1234", "content": "sunny"}
    return [{"role": "user", "content": "weather?"}, answer, result]


def write(tokenizer, messages, template, **options):
    return read_chat(tokenizer, messages, chat_template=template, **options).text


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, {"city": "Zürich", "days": 3}], ids=["text", "dict"]
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"content": ""}, {"content": []}, {"refusal": None, "function_call": None, "audio": None}],
)
def test_tool_calls_come_out_once_encoded(tokenizer, template, arguments, changes):
    text = write(tokenizer, history(arguments, **changes), template)
    assert text.count(f'"arguments": {ARGUMENTS}') == 1
    assert "None" not in text and "[]" not in text
    if template == LLAMA:
        assert 'city="Zürich"\ndays="3"' in text


def test_a_template_that_joins_arguments_gets_the_text_as_it_was_sent(tokenizer):
    sent = '{"city":"Z\\u00fcrich",\n "days": 3e0}'
    assert sent in write(tokenizer, history(sent), DEEPSEEK)
    printing = "{{ messages[1].tool_calls[0].function.arguments }}"
    assert write(tokenizer, history(sent), printing) == sent
    assert write(tokenizer, history({"a": 1}), printing) == '{"a": 1}'


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(tokenizer, template, arguments):
    assert '"arguments": {}' in write(tokenizer, history(arguments), template)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ('{"city": ', "are no JSON (Expecting value"), ("Paris", "are no JSON"),
        ('{"a": NaN}', "NaN is not JSON"), ("[" * 100_000, "nested too deeply"),
        ("[1]", "must be a JSON object, got [1]"), ('"text"', "must be a JSON object, got 'text'"),
        (5, "must be a JSON object, got 5"), ({"a": {1}}, "cannot be written as JSON"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_json_object_are_named(tokenizer, arguments, named):
    where = r"messages\[1\].tool_calls\[0\].function.arguments of 'get_weather' "
    with pytest.raises(ValueError, match=where + ".*" + re.escape(named)):
        write(tokenizer, history(arguments), QWEN)


def test_a_template_without_a_place_for_tool_calls_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no place for tool calls, such as messages\[1\] has"):
        write(tokenizer, history(), SIMPLE)


@pytest.mark.parametrize(
    ("calls", "named"),
    [
        ("f()", "tool_calls must be a list"), (["f"], r"tool_calls\[0\] must be an object"),
        ([{"function": 1}], "function must be an object"), ([{}], "must have the name"),
        ([{"function": {"arguments": "{}"}}], "must have the name of a function"),
    ],
)  # fmt: skip
def test_calls_of_another_form_are_named(tokenizer, calls, named):
    with pytest.raises(ValueError, match=named):
        write(tokenizer, history(tool_calls=calls), QWEN)


def test_the_conversation_that_was_given_stays_as_it_was(tokenizer):
    messages = history(refusal=None)
    before = copy.deepcopy(messages)
    write(tokenizer, messages, QWEN)
    assert messages == before and type(messages[1]["tool_calls"][0]["function"]["arguments"]) is str


def test_the_result_of_a_tool_may_be_an_object(tokenizer):
    messages = [{"role": "user", "content": "weather?"}, {"role": "tool"}]
    messages[1]["content"] = {"sky": "blue"}
    printing = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert write(tokenizer, messages, printing).endswith('{"sky": "blue"}')
    assert '{"sky": "blue"}' in write(tokenizer, messages, LLAMA)


@pytest.mark.parametrize("content", [{"content": None}, {}, {"contents": "hi"}])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_message_without_content_is_named(tokenizer, role, content):
    with pytest.raises(ValueError, match=rf"messages\[0\] \(role '{role}'\) has no content"):
        write(tokenizer, [{"role": role, **content}], SIMPLE)


# Gemma 3's, then one that knows parts of the user alone, then one that dumps the result of a tool.
GEMMA = """{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}
{% set first = messages[0]['content'] %}{% else %}
{% set first = messages[0]['content'][0]['text'] %}
{% endif %}{% set loop_messages = messages[1:] %}{% endif %}{% for message in loop_messages %}
{{ first }}{% if message['content'] is string %}{{ message['content'] }}{% elif message['content']
is iterable %}{% for item in message['content'] -%}{{ '<' + item['text'] + '>' }}
{%- endfor %}{% endif %}
{% endfor %}"""
GEMMA_TEXT = GEMMA.replace("[0]['text']", "+ ''")
GEMMA_REPR = GEMMA.replace("[0]['text']", "")


@pytest.mark.parametrize(
    "template", [GEMMA, GEMMA_TEXT, GEMMA_REPR, LLAMA, MISTRAL, SIMPLE, HERMES]
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_parts_are_text_for_every_role_whose_parts_a_template_does_not_read(
    tokenizer, template, role
):
    messages = [
        *({"role": "system", "content": "be kind"}, {"role": "user", "content": "ask"}),
        *({"role": "assistant", "content": "say"}, {"role": "tool", "content": "do"}),
    ]
    which = [m["role"] for m in messages].index(role)
    messages[which]["content"] = PARTS
    text = write(tokenizer, messages, template)
    assert "'text'" not in text and '"text"' not in text
    is_read = "<one><two>" in text
    assert is_read == (template in (GEMMA, GEMMA_TEXT, GEMMA_REPR) and role != "system")
    messages[which]["content"] = "one\ntwo"
    assert is_read or text == write(tokenizer, messages, template)


@pytest.mark.parametrize("text", [None, 5, ["a"]])
def test_a_part_whose_text_is_none_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="must be text"):
        chat(tokenizer, [{"type": "text", "text": text}], SIMPLE)


def test_no_template_is_said_in_one_line_with_what_to_do(tokenizer):
    with pytest.raises(
        ValueError, match=r"^the tokenizer has no chat template: pass chat_template"
    ):
        chat_prompts(tokenizer, history(), chat_template=None)
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"rag": SIMPLE, "short": QWEN}
    with pytest.raises(ValueError, match="no default: name one of rag, short as chat_template="):
        chat_prompts(several, history())
    assert chat_prompts(several, history(), chat_template="short")[0].text
    for template in ("template.jinja", "other"):
        with pytest.raises(ValueError, match=r"must be the text of a Jinja template or one of"):
            chat_prompts(several, history(), chat_template=template)
    with pytest.raises(TypeError, match="chat_template must be a Jinja template, got PosixPath"):
        chat_prompts(tokenizer, history(), chat_template=pathlib.Path("a"))


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOLS = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% if loud %}!{% endif %}"


def test_tools_and_variables_reach_a_template_that_reads_them(tokenizer):
    options = {"chat_template": TOOLS, "tools": [TOOL]}
    [prompt] = chat_prompts(tokenizer, history()[:1], **options, variables={"loud": True})
    assert prompt.text == "f!"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tools": TOOL}, "tools must be a list"), ({"tools": "f"}, "tools must be a list"),
        ({"tools": ["f"]}, "tools must be a list"),
        ({"tools": [TOOL], "chat_template": SIMPLE}, "does not read tools"),
        ({"variables": {"lout": True}}, "does not read lout"),
        ({"variables": {"padding": True}}, "does not read padding"),
        ({"variables": {"tokenize": True}}, "tokenize is an argument of chat"),
        ({"tools": [TOOL], "variables": {"tools": []}}, "tools is an argument of chat"),
        ({"variables": ["loud"]}, "chat_template_kwargs must be a dict, got list"),
        ({"variables": {True: 1}}, "chat_template_kwargs must have strings as keys, got True"),
    ],
)  # fmt: skip
def test_tools_and_variables_that_would_change_nothing_are_refused(tokenizer, options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        chat_prompts(tokenizer, history()[:1], **{"chat_template": TOOLS, **options})


@pytest.mark.parametrize("chats", [[[]], [history()[:1], []]])
def test_an_empty_conversation_is_refused(tokenizer, chats):
    with pytest.raises(ValueError, match="at least one message"):
        chat_prompts(tokenizer, chats, chat_template=SIMPLE)


def test_a_message_of_another_kind_behind_others_is_named(tokenizer):
    for other in ("hi", None, {"content": "hi"}, {"role": 5, "content": "hi"}):
        with pytest.raises(TypeError, match=r"messages must be .*got messages\[1\]"):
            chat_prompts(tokenizer, [*history()[:1], other], chat_template=SIMPLE)

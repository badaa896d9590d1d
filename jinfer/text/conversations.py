"""Converts conversations as clients send them into the form that a chat template reads.

Templates do not declare the forms that they read, so this is found by rendering marked texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message]], str]

_NEEDS_CONTENT = ("system", "developer", "user", "tool", "function")
_IS_NONE = re.compile(r"""((?:\w+\.|\w+\[['"])content(?:['"]\])?)\s+is\s+(not\s+)?none\b""", re.I)


class JsonObject(dict[str, Any]):
    """A JSON object, and the `text` from which it was read."""

    def __init__(self, value: Mapping[str, Any], text: str | None = None) -> None:
        super().__init__(value)
        self.text = json.dumps(value, ensure_ascii=False) if text is None else text


def read_messages(conversation: Any) -> list[Message]:
    """Returns copies of messages in a uniform form.

    Keys with null are dropped. Arguments of tool calls, JSON text in OpenAI's form, become objects.
    Null content of a message with tool calls becomes an empty text.

    Raises:
      TypeError: it is not a list of dicts with a role.
      ValueError: a message has no content, a part is not text, or arguments are not a JSON object.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)):
        raise TypeError(
            f"messages must be a list of dicts with role and content, or a list of such lists, got "
            f"{type(conversation).__name__}"
        )
    if not conversation:
        raise ValueError("a conversation must have at least one message, got an empty list")
    return [_read_message(m, f"messages[{i}]") for i, m in enumerate(conversation)]


def _read_message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise TypeError(
            f"messages must be a list of dicts with role and content, or a list of such lists, got "
            f"{where} = {given!r:.100}"
        )
    message = {name: value for name, value in given.items() if value is not None}
    calls = message.pop("tool_calls", ())
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise ValueError(f"{where}: tool_calls must be a list, got {calls!r:.100}")
    if calls:
        message["tool_calls"] = [
            _read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    if "function_call" in message:  # the predecessor of tool_calls
        message["function_call"] = _read_call(message["function_call"], f"{where}.function_call")
    if "content" in message:
        message["content"] = _read_content(message["content"], message["role"], where)
    elif message["role"] in _NEEDS_CONTENT or len(message) == 1:
        raise ValueError(
            f"{where} (role {message['role']!r}) has no content: only a message of the assistant "
            f"that calls tools goes without"
        )
    return {"role": message["role"], "content": "", **message}


def _read_content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        for part in content:
            is_object = isinstance(part, Mapping)
            kind = part.get("type") if is_object else part
            if not is_object or kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"a part of a message's content must be text, got {kind!r} ({where}); "
                    'write {"type": "text", "text": ...}'
                )
        return [dict(part) for part in content] or ""
    if role in ("tool", "function", "ipython") and isinstance(content, Mapping):
        return JsonObject(content)
    raise ValueError(
        f"{where}: content must be text or a list of parts, got {type(content).__name__}"
    )


def _read_call(call: Any, where: str) -> Message:
    """Returns {"function": {"name", "arguments"}}, or the inner dict if there is no outer level."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} must be an object with a function, got {call!r:.100}")
    if "function" in call:
        return {**call, "function": _read_call(call["function"], f"{where}.function")}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str):
        raise ValueError(f"{where} must have the name of a function, got {dict(call)!r:.100}")
    where = f"{where}.arguments of {name!r}"
    if arguments is None or arguments == "":
        arguments = "{}"
    text = None
    if isinstance(arguments, str):
        text = arguments
        try:
            arguments = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError(f"{where} are no JSON: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{where} are no JSON ({error}): {text!r:.100}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {arguments!r:.100}")
    try:
        return {**call, "arguments": JsonObject(arguments, text)}
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def reads_none(template: str) -> str:
    """Returns a template that treats empty content of a message with tool calls as null.

    Some templates (DeepSeek's) recognize a message of tool calls by its null content, which clients
    also write as an empty text, and which transformers drops.
    """

    def rewrite(match: re.Match[str]) -> str:
        content, negation = match.groups()
        test = f"({content} is none or {content} is undefined or {content} == '')"
        return f"(not {test})" if negation else test

    return _IS_NONE.sub(rewrite, template)


def fit(messages: Sequence[Message], render: Render) -> list[Message]:
    """Returns messages in the form that a template reads.

    For roles whose content parts the template does not read, parts are joined by line breaks, as in
    vLLM. Arguments are objects, or the original text for a template that concatenates it.

    Args:
      messages: from `read_messages`.
      render: renders messages with the template.

    Raises:
      ValueError: the template leaves out tool calls.
    """
    plain = [_as_text(m) for m in messages]
    has_calls = [bool(m.keys() & {"tool_calls", "function_call"}) for m in messages]
    if any(has_calls) and _wants_text(plain, render, f"messages[{has_calls.index(True)}]"):
        plain = [_map_arguments(m, lambda arguments: arguments.text) for m in plain]
        messages = [_map_arguments(m, lambda arguments: arguments.text) for m in messages]
    keeps = {
        role
        for role in {m["role"] for m in messages if not isinstance(m["content"], str)}
        if _reads_content(messages, plain, role, render)
    }
    return [m if m["role"] in keeps else p for m, p in zip(messages, plain, strict=True)]


def _as_text(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {**message, "content": content.text if isinstance(content, JsonObject) else content}


def _map_arguments(message: Message, change: Callable[[JsonObject], Any]) -> Message:
    """Returns a message with the arguments of all its calls changed."""

    def of(call: Message) -> Message:
        if "function" in call:
            return {**call, "function": of(call["function"])}
        return {**call, "arguments": change(call["arguments"])}

    message = dict(message)
    if "tool_calls" in message:
        message["tool_calls"] = [of(call) for call in message["tool_calls"]]
    if "function_call" in message:
        message["function_call"] = of(message["function_call"])
    return message


def _wants_text(plain: list[Message], render: Render, where: str) -> bool:
    """Whether a template prints the arguments of calls; raises ValueError if it drops them."""
    mark = JsonObject({"mark0key": "mark0end"})
    with_objects = _try(render, [_map_arguments(m, lambda _: mark) for m in plain])
    if with_objects is not None and "mark0" in with_objects and repr(mark) not in with_objects:
        return False
    with_text = _try(render, [_map_arguments(m, lambda _: mark.text) for m in plain])
    if with_text is not None and mark.text in with_text:
        return True
    if with_objects is None or "mark0" in with_objects:
        return False  # the template will raise its error for the real messages
    raise ValueError(
        f"this chat template has no place for tool calls, such as {where} has: write them into the "
        f"content, or pass a chat_template that shows them"
    )


def _reads_content(
    messages: Sequence[Message], plain: list[Message], role: str, render: Render
) -> bool:
    """Whether a template reads structured content of messages of a role.

    Each mark must be rendered, and not within a part or an object that was printed as a whole.
    """
    trial, marks, has_parts = list(plain), [], False
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] != role or isinstance(content, str):
            continue
        names = [f"mark{len(marks) + j}end" for j in range(len(content))]
        marks += names
        if isinstance(content, JsonObject):
            content = dict(zip(content, names, strict=True))
        else:
            has_parts = True
            content = [{**p, "text": name} for p, name in zip(content, names, strict=True)]
        trial[i] = {**message, "content": content}
    text = _try(render, trial)
    if text is None or not all(mark in text for mark in marks):
        return False
    dumped = r"""(['"])text\1: ?(['"])mark\d+end""" if has_parts else r"'[^']*': 'mark\d+end'"
    return not re.search(dumped, text)


def _try(render: Render, messages: list[Message]) -> str | None:
    try:
        return render(messages)
    except Exception:  # a template may raise anything for a form that it does not read
        return None

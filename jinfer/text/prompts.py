"""Reads prompts of any accepted kind into token ids."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jinfer.config.fields import shown
from jinfer.text.conversations import fit, read_messages, reads_none


class Prompt(NamedTuple):
    """A prompt as the engine takes it.

    Attributes:
      text: for a conversation, rendered with its template; None if the user gave token ids.
      token_ids: the encoded text, or the given ids.
      cache_salt: cached KV is shared only among prompts with the same one.
    """

    text: str | None
    token_ids: list[int]
    cache_salt: str | None


def read_prompt(prompt: Any, tokenizer: Any | None) -> Prompt:
    """Reads text, token ids, or a dict of either (see `LLM.add_request`).

    Raises:
      ValueError: a dict with other keys, or text without a tokenizer.
      TypeError: the prompt is of another kind.
    """
    text = salt = None
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, Mapping):
        salt = prompt.get("cache_salt")
        names = set(prompt) - {"cache_salt"}
        if len(names) != 1 or not names <= {"prompt", "prompt_token_ids"}:
            raise ValueError(
                'a prompt dict has one key, "prompt" or "prompt_token_ids", and at most a '
                f'"cache_salt" beside it, got {shown(list(prompt))}'
            )
        if salt is not None and not (isinstance(salt, str) and salt):
            raise ValueError(f"cache_salt must be a non-empty string, got {shown(salt)}")
        prompt = prompt[names.pop()]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this engine has no tokenizer: give prompts as prompt_token_ids")
        text, prompt = prompt, _encode(tokenizer, prompt)
    return Prompt(text, _token_ids(prompt), salt)


def _token_ids(prompt: Any) -> list[int]:
    """Returns the ids of a sequence, or of a 1-D array of integers (numpy, jax, torch)."""
    if hasattr(prompt, "__array__") and getattr(prompt, "ndim", 0):
        array = np.asarray(prompt)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(
                f"a prompt must be text or token ids, got an array of {array.dtype}"
                f"{list(array.shape)}; ids are a 1-D array of integers"
            )
        return array.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise TypeError(f"a prompt must be text or token ids, got {type(prompt).__name__}")
    if all(type(t) is int for t in prompt):
        return list(prompt)
    foreign = [t for t in prompt if not is_token_id(t)]
    if foreign:
        held = shown(foreign[0])
        raise TypeError(f"a prompt must be text or token ids, got a list that holds {held}")
    return [operator.index(t) for t in prompt]


def is_token_id(value: Any) -> bool:
    """Whether a value is an integer, of Python or of an array, and no bool."""
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def as_list(prompts: Any) -> list[Any]:
    """Returns one prompt or several as a list.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(prompts, (str, bytes, Mapping, Prompt)):
        return [prompts]
    if getattr(prompts, "ndim", 0) == 1 or (
        isinstance(prompts, Sequence) and prompts and is_token_id(prompts[0])
    ):
        return [prompts]
    if not isinstance(prompts, Iterable) or getattr(prompts, "ndim", None) == 0:
        raise TypeError(
            f"prompts must be text, token ids or a list of either, got {type(prompts).__name__}"
        )
    return list(prompts)


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is no Unicode text: it holds {text[error.start]!r} (was it UTF-8?)"
        ) from None
    return tokenizer.encode(text, **options)


def apply_chat_template(tokenizer: Any | None, conversation: Any, **options: Any) -> list[int]:
    """Returns the token ids of a conversation in a chat template; see `read_chat`."""
    return read_chat(tokenizer, conversation, **options).token_ids


def read_chat(tokenizer: Any | None, conversation: Any, **options: Any) -> Prompt:
    """Returns a conversation in a chat template.

    Messages may have OpenAI's form: content as a list of parts, {"type": "text", "text": ...}, tool
    calls whose arguments are JSON text, and null content beside them. `conversations` converts
    them into the form that the template reads.

    Args:
      tokenizer: has the template, unless `options` has a "chat_template".
      conversation: a list of messages.
      options: "tools", "add_generation_prompt" and the like, and other variables of the template.

    Raises:
      ValueError: no tokenizer, no chat template, an option that the template does not read, a part
        that is not text, arguments that are not JSON, or the template refuses the messages.
      TypeError: it is not a list of messages.
    """
    from jinja2 import TemplateError

    if tokenizer is None:
        raise ValueError("chat needs a tokenizer")
    template = _find_template(tokenizer, options.get("chat_template"), options.get("tools"))
    _check_options(template, options)
    messages = read_messages(conversation)
    if any("tool_calls" in m and not m["content"] for m in messages):
        patched = reads_none(template)
        options |= {"chat_template": patched} if patched != template else {}

    def render(messages: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    messages = fit(messages, render)
    try:
        text = render(messages)
    except (TemplateError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return Prompt(text, _encode(tokenizer, text, add_special_tokens=False), None)


def _find_template(tokenizer: Any, given: Any, tools: Any) -> str:
    """Returns the text of the template; "" for a tokenizer that formats by itself."""
    if given is not None and not isinstance(given, str):
        raise TypeError(f"chat_template must be a Jinja template, got {type(given).__name__}")
    own = getattr(tokenizer, "chat_template", None)
    names = sorted(own) if isinstance(own, Mapping) else []
    if given is not None and given not in names:
        if "{{" not in given and "{%" not in given:
            of = f" or one of the tokenizer's own ({', '.join(names)})" if names else ""
            raise ValueError(
                f"chat_template must be the text of a Jinja template{of}, got {given!r:.80}"
            )
        return given
    if given is None and not hasattr(tokenizer, "get_chat_template"):
        return own if isinstance(own, str) else ""
    if own is None:
        raise ValueError(
            "the tokenizer has no chat template: pass chat_template=, or put the messages into one "
            "text and call generate"
        )
    if given is None and names and not {"default", "tool_use" if tools else "default"} & {*names}:
        raise ValueError(
            f"the tokenizer has several chat templates and no default: name one of "
            f"{', '.join(names)} as chat_template="
        )
    return tokenizer.get_chat_template(given, tools)


def _check_options(template: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for tools that are none, and for a variable that nothing would read."""
    tools = options.get("tools")
    if tools is not None and not (
        isinstance(tools, (list, tuple))
        and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise TypeError(
            'tools must be a list of {"type": "function", "function": {...}}, got '
            f"{shown(tools)}"
        )
    for name, value in options.items():
        is_ours = name in ("chat_template", "add_generation_prompt", "continue_final_message")
        if is_ours or value is None or not template:
            continue
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"this chat template does not read {name}, which would change nothing: drop it, or "
                f"pass a chat_template that does"
            )


def chat_prompts(
    tokenizer: Any | None,
    messages: Any,
    *,
    variables: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Prompt]:
    """Returns a prompt for one conversation, or for each of several; raises as above.

    `variables` are further ones of the template.
    """
    variables = {} if variables is None else variables
    if not isinstance(variables, Mapping):
        raise TypeError(f"chat_template_kwargs must be a dict, got {type(variables).__name__}")
    unnamed = [name for name in variables if not isinstance(name, str)]
    if unnamed:
        raise TypeError(f"chat_template_kwargs must have strings as keys, got {shown(unnamed[0])}")
    twice = [name for name in variables if name in (*options, "tokenize", "conversation")]
    if twice:
        raise ValueError(f"{twice[0]} is an argument of chat: it cannot be in chat_template_kwargs")
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        read_messages(messages)  # raises
    tools = options.get("tools")
    if isinstance(tools, (list, tuple)) and not tools:
        options["tools"] = None
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
    return [read_chat(tokenizer, chat, **options, **variables) for chat in conversations]

"""From what users call a prompt to token ids; knows nothing of engines or requests."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_LOOPS_OVER_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+[\w.\[\]'\"]*content\b")


class Prompt(NamedTuple):
    """A prompt as the engine takes it.

    Attributes:
      text: a conversation's in its template; None where the user gave token ids.
      token_ids: at least what the text encodes to.
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
                f'"cache_salt" beside it, got {sorted(prompt)}'
            )
        if salt is not None and not (isinstance(salt, str) and salt):
            raise ValueError(f"cache_salt must be a text that is not empty, got {salt!r}")
        prompt = prompt[names.pop()]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this engine has no tokenizer: give prompts as prompt_token_ids")
        text, prompt = prompt, _encode(tokenizer, prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise TypeError(f"a prompt must be text or token ids, got {type(prompt).__name__}")
    foreign = next((t for t in prompt if isinstance(t, bool) or not hasattr(t, "__index__")), None)
    if foreign is not None:
        raise TypeError(f"a prompt must be text or token ids, got a list that holds {foreign!r}")
    return Prompt(text, [operator.index(t) for t in prompt], salt)


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

    Content may be a list of parts, {"type": "text", "text": ...}. A template that does not loop
    over them gets their texts, each on lines of its own, as in vLLM.

    Raises:
      ValueError: no tokenizer, no chat template, a part that is no text, or the template refuses
        the messages.
      TypeError: it is no list of messages.
    """
    from jinja2 import TemplateError

    if tokenizer is None:
        raise ValueError("chat needs a tokenizer")
    _check_list(conversation)
    if any(isinstance(m, Mapping) and isinstance(m.get("content"), list) for m in conversation):
        template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        conversation = [_read_parts(m, template) for m in conversation]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except (TemplateError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return Prompt(text, _encode(tokenizer, text, add_special_tokens=False), None)


def _read_parts(message: Any, template: str) -> Any:
    """Returns a message with its parts of text as one, unless `template` loops over parts."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(parts, list):
        return message
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and "text" in part):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"a part of a message's content must be text, got {kind!r}")
    if _LOOPS_OVER_PARTS.search(template):
        return message
    return {**message, "content": "\n".join(str(part["text"]) for part in parts)}


def _check_list(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TypeError(
            f"messages must be a list of dicts with role and content, or a list of such lists, got "
            f"{type(messages).__name__}"
        )


def chat_prompts(tokenizer: Any | None, messages: Any, **options: Any) -> list[Prompt]:
    """Returns a prompt for one conversation, or for each of several; raises as above."""
    _check_list(messages)
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
    return [read_chat(tokenizer, conversation, **options) for conversation in conversations]

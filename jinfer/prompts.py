"""From what users call a prompt to token ids; knows nothing of engines or requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """A prompt as the engine takes it.

    Attributes:
      text: None where the user gave token ids.
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
        text, prompt = prompt, tokenizer.encode(prompt)
    if not isinstance(prompt, Sequence) or not all(
        isinstance(t, int) and not isinstance(t, bool) for t in prompt
    ):
        raise TypeError(f"a prompt must be text or token ids, got {type(prompt).__name__}")
    return Prompt(text, list(prompt), salt)


def apply_chat_template(tokenizer: Any | None, conversation: Any, **options: Any) -> list[int]:
    """Returns the token ids of a conversation in a chat template.

    Raises:
      ValueError: no tokenizer, no chat template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer is None:
        raise ValueError("chat needs a tokenizer")
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return tokenizer.encode(text, add_special_tokens=False)


def chat_prompts(
    tokenizer: Any | None, messages: Any, **options: Any
) -> list[Mapping[str, list[int]]]:
    """Returns a prompt for one conversation, or for each of several; raises as above."""
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
    return [
        {"prompt_token_ids": apply_chat_template(tokenizer, c, **options)} for c in conversations
    ]

"""What is to be continued, as token ids: texts, chats by the tokenizer's own template, or ids as they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kithara_ray.errors import ConfigError, DataError

_EXPECTED = "a text, token ids, a chat as a list of {'role', 'content'}, or a list of these"


def prompt_ids(inputs: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        inputs: a text, an array or list of ids, a chat (a list of messages), or a list of these.

    Raises:
        ConfigError: something else.
        DataError: a prompt is empty, or a chat that the tokenizer's template does not take.
    """
    if isinstance(inputs, (str, np.ndarray)) or (isinstance(inputs, list) and inputs and _is_part(inputs[0])):
        inputs = [inputs]
    if not isinstance(inputs, (list, tuple)) or not len(inputs):
        raise ConfigError(f"generate: inputs must be {_EXPECTED}, got {type(inputs).__name__}")
    return [_ids(item, number, tokenizer) for number, item in enumerate(inputs)]


def _is_part(item: Any) -> bool:
    """Of one prompt, not a prompt of its own."""
    return isinstance(item, (int, np.integer, Mapping))


def _ids(item: Any, number: int, tokenizer: Any) -> list[int]:
    if isinstance(item, str):
        row = _encode(item, tokenizer)
    elif isinstance(item, (list, tuple, np.ndarray)) and all(isinstance(i, (int, np.integer)) for i in item):
        row = [int(i) for i in item]
    elif isinstance(item, (list, tuple)) and all(isinstance(message, Mapping) for message in item):
        row = _render(list(item), number, tokenizer)
    else:
        raise ConfigError(f"generate: prompt {number} is {type(item).__name__}, inputs must be {_EXPECTED}")
    if not row:
        raise DataError(f"generate: prompt {number} is empty")
    return row


def _encode(text: str, tokenizer: Any) -> list[int]:
    """With the special tokens that the tokenizer adds by itself, unless the text is rendered with its BOS already."""
    rendered = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not rendered)["input_ids"]


def _render(messages: list[Mapping], number: int, tokenizer: Any) -> list[int]:
    """The chat as the template writes it, up to where the model is to speak. A template writes its own BOS."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"generate: prompt {number} is a chat, and the tokenizer has no chat template; give the text that the "
            "model was trained on, or a tokenizer with tokenizer.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises: it is a program of the model's authors
        raise DataError(
            f"generate: prompt {number}: the tokenizer's chat template does not take it "
            f"({type(error).__name__}: {error})"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]

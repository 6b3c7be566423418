"""Convert prompts to token ids in the same way as training rows: texts, chats by the chat template, or ids unchanged.

`Prompting` holds the settings; training, decoding and a run's samples share one.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.hf.facts.generation import stops_of
from kithara_ray.hf.fetch import tokenizer_at
from kithara_ray.hf.model_files import GENERATION
from kithara_ray.sft.tokens.chat import ChatTemplate
from kithara_ray.sft.tokens.encode import encode, put_first
from kithara_ray.sft.tokens.messages import as_messages
from kithara_ray.sft.tokens.tokenizer import bos_of, load_tokenizer
from kithara_ray.storage.urls import absolute

_EXPECTED = "a text, token ids, a chat as a list of {'role', 'content'}, or a list of these"


@dataclass(frozen=True)
class Prompting:
    """Settings with which a model is prompted.

    Attributes:
        tokenizer: a transformers tokenizer, or its handle.
        chat_template: Jinja that replaces the tokenizer's own template.
        ends: ids that end answers in the training data; empty if unknown.
    """

    tokenizer: Any
    chat_template: str | None = None
    ends: tuple[int, ...] = ()

    @classmethod
    def at(cls, location: str) -> "Prompting":
        """Settings with the tokenizer at a directory or URL, and the end tokens in its generation settings."""
        settings = tokenizer_at(location).get(GENERATION)
        return cls(location, ends=tuple(stops_of({}, json.loads(settings))) if settings else ())

    def given(self, tokenizer: Any, tokenizer_handle: str | None) -> "Prompting":
        """Use the tokenizer that a user gives, if any, with its own template. Raises ConfigError."""
        if tokenizer is not None and tokenizer_handle is not None:
            raise ConfigError("generate takes one of tokenizer and tokenizer_handle")
        if tokenizer is None and tokenizer_handle is None:
            return self
        return Prompting(absolute(tokenizer_handle) if tokenizer_handle is not None else tokenizer, ends=self.ends)

    def loaded(self) -> Any:
        """The tokenizer itself."""
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer


def prompt_ids(
    inputs: Any, tokenizer: Any, chat_template: str | None = None, vocabulary: int | None = None
) -> list[list[int]]:
    """Token ids of each prompt, the same as at the start of a training row with this prompt.

    Args:
        inputs: a text, an array or list of ids, a chat (a list of messages), or a list of these.
        chat_template: Jinja that replaces the tokenizer's own template.
        vocabulary: rows of the model's embedding; None checks no id.

    Raises:
        ConfigError: `inputs` has another type.
        DataError: a prompt is empty, has an id without a row in the embedding, or is a chat that the template does not
            accept.
    """
    if isinstance(inputs, (str, np.ndarray)) or (isinstance(inputs, list) and inputs and _is_part(inputs[0])):
        inputs = [inputs]
    if not isinstance(inputs, (list, tuple)) or not len(inputs):
        raise ConfigError(f"generate: inputs must be {_EXPECTED}, got {type(inputs).__name__}")
    prompts = [_ids(item, number, tokenizer, chat_template) for number, item in enumerate(inputs)]
    for number, prompt in enumerate(prompts):
        wrong = beyond(prompt, vocabulary, tokenizer)
        if wrong:
            raise DataError(f"generate: prompt {number}: {wrong}")
    return prompts


def beyond(ids: Any, vocabulary: int | None, tokenizer: Any) -> str | None:
    """Describe the fault of ids without a row in the model's embedding; None if every id has one."""
    if vocabulary is None or not len(ids):
        return None
    smallest, largest = int(np.min(ids)), int(np.max(ids))
    if 0 <= smallest and largest < vocabulary:
        return None
    if smallest < 0:
        return f"{smallest} is not a token id; ids are 0 to {vocabulary - 1}"
    known = largest < len(tokenizer)
    token = f"token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}" if known else f"id {largest}"
    return (
        f"{token}{',' if known else ' is'} beyond the model's vocabulary of {vocabulary}, the rows of its embedding; "
        "give the model's own tokenizer, add rows with resize_token_embeddings=len(tokenizer), or leave the token out"
    )


def stop_ids(given: Any, known: Collection[int], vocabulary: int | None) -> tuple[int, ...]:
    """Ids at which decoding stops: the user's, or the known ones for "auto".

    Raises:
        ConfigError: a given id is not a token of the model.
    """
    if isinstance(given, str) and given == "auto":
        return tuple(sorted(number for number in known if vocabulary is None or 0 <= number < vocabulary))
    if not isinstance(given, (list, tuple, set, frozenset, np.ndarray)):
        raise ConfigError(f'generate: stop_token_ids must be "auto" or a list of ids, got {given!r}')
    for number in given:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ConfigError(f"generate: stop_token_ids must be ids, got {number!r}")
        if number < 0 or (vocabulary is not None and number >= vocabulary):
            bounds = ">= 0" if vocabulary is None else f"0 to {vocabulary - 1}"
            raise ConfigError(f"generate: stop_token_ids has {number}, and the model's ids are {bounds}")
    return tuple(int(number) for number in given)


def _is_part(item: Any) -> bool:
    """Return True if the item is part of one prompt, and not a prompt itself."""
    return isinstance(item, (int, np.integer, Mapping))


def _ids(item: Any, number: int, tokenizer: Any, chat_template: str | None) -> list[int]:
    if isinstance(item, str):
        row = put_first(bos_of(tokenizer), encode(item, tokenizer)) if item else []
    elif isinstance(item, (list, tuple, np.ndarray)) and all(isinstance(i, (int, np.integer)) for i in item):
        row = [int(i) for i in item]
    elif isinstance(item, (list, tuple)) and all(isinstance(message, Mapping) for message in item):
        row = put_first(bos_of(tokenizer), _render(list(item), number, tokenizer, chat_template))
    else:
        raise ConfigError(f"generate: prompt {number} is {type(item).__name__}, inputs must be {_EXPECTED}")
    if not row:
        raise DataError(f"generate: prompt {number} is empty")
    return row


def _render(messages: list[Mapping], number: int, tokenizer: Any, chat_template: str | None) -> list[int]:
    """Return the ids of the chat as the template renders it, up to the model's next turn."""
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"generate: prompt {number} is a chat, and the tokenizer has no chat template; give the text that the "
            "model was trained on, or a tokenizer with tokenizer.chat_template"
        )
    try:
        return encode(ChatTemplate(tokenizer, chat_template).prompt(as_messages(messages)), tokenizer)
    except DataError as error:
        what = f"generate: prompt {number}: the tokenizer's chat template does not take it"
        raise DataError(f"{what} ({error})") from error

"""Conversations to text by the tokenizer's own chat template, and which of its characters the assistant says.

A template that marks them by `{% generation %}` is taken at its word. With any other, a message of the assistant is
learned if the template asks for it as it then shows it: what it renders of the messages before, with its generation
prompt, and what it renders of the messages up to and with it, must both begin the text of the whole conversation. So a
message whose history the template rewrites later, or whose thinking it drops, is context there and not learned: no
model is asked for it in that way. Such messages are counted.

Templates are Jinja from a checkpoint of whoever made it. transformers renders them in Jinja's immutable sandbox, on
plain data; time, memory and length are bounded here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kithara_ray.errors import DataError
from kithara_ray.sft.rows import limits

MAX_SECONDS = 5.0  # of CPU time, for one rendering
MAX_MORE_BYTES = 2**31
MAX_CHARACTERS = 10_000_000

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Attributes:
    text: the conversation.
    spans: (start, stop) in it of what is learned, ascending.
    unlearned: messages of the assistant that are not, because the template shows them otherwise than it asks for them.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    unlearned: int = 0


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, or another in its place.

    Attributes:
        tokenizer: a transformers tokenizer.
        source: Jinja; None is the tokenizer's own.
    """

    tokenizer: Any
    source: str | None = None

    def __call__(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """A conversation's text and what of it is learned.

        Args:
            messages: as OpenAI's: `role`, `content`, and what else the template reads.
            tools: JSON schemas of the tools that the assistant may call.
            options: further variables of the template, e.g. `enable_thinking`.

        Raises:
            DataError: there is no template, it fails, goes on for too long, or shows nothing to learn.
        """
        template = self._template(tools)
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if _GENERATION.search(template):
            text, spans = self._render(template, messages, tools, options, mark=True)
            if not spans:
                raise DataError("the chat template marks nothing of this conversation as the assistant's")
            return Rendered(text, tuple(spans))
        text, _ = self._render(template, messages, tools, options)
        spans, unlearned = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = self._span(template, messages, number, tools, options, text)
            if span is None:
                unlearned += 1
            else:
                spans.append(span)
        if not spans:
            raise DataError(
                "nothing of this conversation can be learned: the chat template renders no message of the assistant "
                "behind its own generation prompt; pass chat_template= with {% generation %} around what is learned"
            )
        return Rendered(text, tuple(spans), unlearned)

    def _template(self, tools) -> str:
        if self.source is not None:
            return self.source
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template; pass chat_template=, or the tokenizer of the model's instruct "
                f"version ({' '.join(str(error).split())[:120]})"
            ) from error

    def _span(self, template, messages, number: int, tools, options, text: str) -> tuple[int, int] | None:
        """Where message `number` stands in `text`, from behind the generation prompt to the end of its turn."""
        try:
            before, _ = self._render(template, messages[:number], tools, options, prompt=True)
            through = text
            if number + 1 < len(messages):
                through, _ = self._render(template, messages[: number + 1], tools, options)
        except DataError:
            if number == 0:  # many templates read the first message
                return None
            raise
        start, stop = len(before), len(through)
        if not (text.startswith(before) and text.startswith(through) and start < stop):
            return None
        # White space behind the end of the turn is the template's.
        said = text[start:stop].rstrip()
        return start, start + len(said) if said.endswith(self._special_tokens()) else stop

    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    def _render(self, template, messages, tools, options, prompt: bool = False, mark: bool = False):
        """(text, spans that the template marks)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with limits.cpu_time(MAX_SECONDS), limits.memory(MAX_MORE_BYTES):
                texts, marks = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=mark,
                    add_generation_prompt=prompt,
                    **{**self.tokenizer.special_tokens_map, **(options or {})},
                )
        except limits.OutOfTime:
            raise DataError(f"the chat template did not end within {MAX_SECONDS:g} s") from None
        except MemoryError:
            raise DataError(f"the chat template takes more than {MAX_MORE_BYTES / 2**30:g} GiB of memory") from None
        except Exception as error:  # a template raises what it likes: it is data
            raise DataError(f"the chat template failed: {type(error).__name__}: {_short(error)}") from error
        if len(texts[0]) > MAX_CHARACTERS:
            raise DataError(f"the chat template renders {len(texts[0]):,} characters, more than {MAX_CHARACTERS:,}")
        return texts[0], marks[0] if marks else []

    def prompt(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation's text up to where the assistant is to speak, as a row of training has it there.

        Raises:
            DataError: there is no template, it fails, or goes on for too long.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._render(self._template(tools), messages, tools, options, prompt=True)[0]


def check_messages(messages: Any) -> list[dict]:
    """The messages of a conversation, as plain dicts.

    Raises:
        DataError: they are no list of dicts with a role and text; the assistant says nothing.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise DataError(f"is {type(messages).__name__}, not a list of messages")
    if not messages:
        raise DataError("is empty")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} is {type(message).__name__}, not a dict with role and content")
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no role, found {', '.join(map(repr, message)) or 'nothing'}")
        _check_content(number, message.get("content"))
    if not any(_says_something(message) for message in messages):
        raise DataError("has no message of role 'assistant' that says something: nothing is learned")
    return [dict(message) for message in messages]


def _check_content(number: int, content: Any) -> None:
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"message {number} is not valid Unicode at character {error.start}") from error
    elif isinstance(content, Sequence):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise DataError(f"message {number} has content of type {kind!r}; only text is trained on")
    elif content is not None:
        raise DataError(f"message {number} has content of type {type(content).__name__}, not text")


def _says_something(message: Mapping) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return message["role"] == "assistant" and bool(said or message.get("tool_calls"))


def check_tools(tools: Any) -> list[dict] | None:
    """JSON schemas of tools, given as such or as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"is no JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"is {type(tools).__name__}, not a list of JSON schemas")
    return [dict(tool) for tool in tools]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."

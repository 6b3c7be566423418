"""Convert conversations to text with the tokenizer's chat template, and find the assistant's characters in it.

A template may mark these characters with `{% generation %}`. With any other template, an assistant message is trained
on only if the template later shows it as it was asked for. Two texts must begin the text of the whole conversation:

- the earlier messages, rendered with the generation prompt;
- the messages up to and including this one.

If the template later rewrites a message's history or drops its thinking, the message is context and not trained on.
No model is asked for it in that form. Such messages are counted.

Templates are Jinja code from a checkpoint that anybody may have made. transformers renders them in Jinja's immutable
sandbox, on plain data; this module limits time, memory and length.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kithara_ray.errors import DataError
from kithara_ray.sft.rows import limits
from kithara_ray.sft.tokens.messages import says_something
from kithara_ray.sft.tokens.template_fit import Messages, TemplateFit, TooCostly

Span = tuple[int, int]  # (start, stop) characters

MAX_SECONDS = 5.0  # of CPU time, for one rendering
MAX_MORE_BYTES = 2**31
MAX_CHARACTERS = 10_000_000

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Attributes:
    text: the conversation.
    spans: (start, stop) of the trained parts of `text`, ascending.
    unlearned: assistant messages that are not trained on, because the template shows them in another form than it asks
        for them.
    notes: remarks on the conversation, such as a field that the template does not show.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    unlearned: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, or one that replaces it.

    Attributes:
        tokenizer: a transformers tokenizer.
        source: Jinja; None is the tokenizer's own.
        fit: findings about the template so far; conversations of one template share them.
    """

    tokenizer: Any
    source: str | None = None
    fit: TemplateFit = field(default_factory=TemplateFit, compare=False)

    def __call__(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Return a conversation's text and its trained spans.

        Args:
            messages: as returned by `messages.check_messages`. A message with `weight` 0 is context.
            tools: JSON schemas of the tools that the assistant may call.
            options: further variables of the template, e.g. `enable_thinking`.

        Raises:
            DataError: there is no template, it fails, takes too long, leaves out the row's content, or shows nothing to
                train on.
        """
        template = self._template(tools)
        silent = {number for number, message in enumerate(messages) if message.get("weight") == 0}

        def render(given: Sequence[Mapping], with_tools: Any = tools) -> str:
            return self._render(template, given, with_tools, options)[0]

        messages = self.fit.adapted(_plain(messages), render)
        if _GENERATION.search(template):
            text, marks = self._render(template, messages, tools, options, mark=True)
            spans, unlearned = self._without(silent, template, messages, tools, options, text, marks), 0
            if not spans:
                raise DataError("the chat template marks no part of this conversation as the assistant's")
        else:
            text = render(messages)
            spans, unlearned = self._spans(silent, template, messages, tools, options, text)
        notes = self.fit.check(template, messages, tools, options, text, render)
        if any(_is_empty(message) and number not in silent for number, message in enumerate(messages)):
            notes += ("a message of the assistant is empty; it is trained on as an empty turn",)
        return Rendered(text, tuple(spans), unlearned, notes)

    def _spans(
        self, silent: set[int], template: str, messages: Messages, tools: Any, options: Any, text: str
    ) -> tuple[list, int]:
        """Return the trained spans under a template that does not mark them, and the number of untrained messages."""
        spans: list[Span] = []
        unlearned = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number in silent:
                continue
            span = self._span(template, messages, number, tools, options, text)
            if span is None:
                unlearned += 1
            else:
                spans.append(span)
        if not spans:
            raise DataError(
                "nothing in this conversation can be trained on: the chat template renders no assistant message after "
                "its generation prompt; pass chat_template= with {% generation %} around the trained text"
            )
        return spans, unlearned

    def _without(
        self, silent: set[int], template: str, messages: Messages, tools: Any, options: Any, text: str, marks: list
    ) -> list:
        """Remove the marks of messages of weight 0: those that each such message adds to the marks before it."""
        gone: set[Span] = set()
        for number in sorted(silent):
            if messages[number]["role"] != "assistant":
                continue
            (before, old), (through, new) = (
                self._render(template, messages[:stop], tools, options, mark=True) if stop else ("", [])
                for stop in (number, number + 1)
            )
            if not (text.startswith(before) and text.startswith(through) and marks[: len(new)] == new):
                raise DataError(
                    f"message {number} has weight 0, but the chat template later shows it in another form, so it "
                    "cannot be found in the text; leave the conversation out"
                )
            gone |= set(new[len(old) :])
        return [mark for mark in marks if mark not in gone]

    def _template(self, tools: Any) -> str:
        if self.source is not None:
            return self.source
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template; pass chat_template=, or the tokenizer of the model's instruct "
                f"version ({' '.join(str(error).split())[:120]})"
            ) from error

    def _span(
        self, template: str, messages: Messages, number: int, tools: Any, options: Any, text: str
    ) -> tuple[int, int] | None:
        """The span of message `number` in `text`, from after the generation prompt to the end of its turn."""
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
        # White space after the end of the turn belongs to the template.
        said = text[start:stop].rstrip()
        return start, start + len(said) if said.endswith(self._special_tokens()) else stop

    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    def _render(
        self, template: str, messages: Messages, tools: Any, options: Any, prompt: bool = False, mark: bool = False
    ) -> tuple[str, list[Span]]:
        """Return (text, spans that the template marks)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with limits.cpu_time(MAX_SECONDS), limits.memory(MAX_MORE_BYTES):
                conversations: Any = [messages]
                made: Any = render_jinja_template(
                    conversations,
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=mark,
                    add_generation_prompt=prompt,
                    **{**self.tokenizer.special_tokens_map, **(options or {})},
                )
        except limits.OutOfTime:
            raise TooCostly(f"the chat template did not end within {MAX_SECONDS:g} s") from None
        except MemoryError:
            raise TooCostly(f"the chat template takes more than {MAX_MORE_BYTES / 2**30:g} GiB of memory") from None
        except Exception as error:  # a template is data and may raise anything
            raise DataError(f"the chat template failed: {type(error).__name__}: {_short(error)}") from error
        texts, marks = made
        if len(texts[0]) > MAX_CHARACTERS:
            raise TooCostly(f"the chat template renders {len(texts[0]):,} characters, more than {MAX_CHARACTERS:,}")
        return texts[0], marks[0] if marks else []

    def prompt(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation's text up to the assistant's next turn, as in a training row.

        Args: as of `__call__`.

        Raises:
            DataError: there is no template, it fails, or takes too long.
        """
        template = self._template(tools)
        given = self.fit.adapted(_plain(messages), lambda some: self._render(template, some, tools, options)[0])
        return self._render(template, given, tools, options, prompt=True)[0]


def _plain(messages: Sequence[Mapping]) -> list[dict]:
    """Messages with what the template reads."""
    return [{k: v for k, v in message.items() if v is not None and k != "weight"} for message in messages]


def _is_empty(message: Mapping) -> bool:
    return message["role"] == "assistant" and not says_something(message)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."

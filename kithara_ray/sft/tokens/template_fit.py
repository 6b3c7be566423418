"""Find by rendering which inputs a chat template accepts and shows, so that no part of a conversation vanishes.

A template is a program, and only rendering reveals which fields it reads. It shows a field if the text changes with it.
Each kind of message is tested once, in the first conversation that has it. A field that is missing from the text is
tested again in every conversation before it is refused.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kithara_ray.errors import DataError
from kithara_ray.sft.tokens.messages import ROLES, meant_role, text_of

# (messages, tools) -> text. Raises DataError if the template fails.
Messages = Sequence[Mapping]
Render = Callable[[Messages, Any], str]

_PROBE = "kithara"
_REMEDY = "pass chat_template= that shows it, or leave it out of the rows"
# Transformers passes each of these to a template under all of these names.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Fields whose loss would change the content of the row. The log reports others.
_REFUSED = ("content", "tool_calls", "reasoning_content")
# Fields that pair calls with results, or mark non-text parts.
_SILENT = ("role", "tool_call_id", "type")


class TooCostly(DataError):
    """A rendering exceeded its limit on time, memory or length."""


@dataclass
class TemplateFit:
    """Inputs that one chat template was found to accept; filled as conversations arrive.

    Attributes:
        content: role -> (accepts content as text, accepts it as a list of parts).
        arguments: (accepts arguments of tool calls as objects, accepts them as JSON text).
        shown, hidden: kinds of message fields that the template shows, and those that it does not.
    """

    content: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    arguments: tuple[bool, bool] | None = None
    shown: set[tuple] = field(default_factory=set)
    hidden: set[tuple] = field(default_factory=set)

    def adapted(self, messages: Sequence[Mapping], render: Callable[[Sequence[Mapping]], str]) -> list[dict]:
        """Return the messages with content and arguments in the form that the template accepts. Raises DataError."""
        adapted = [dict(message) for message in messages]
        for number, message in enumerate(messages):
            if message.get("content"):
                adapted[number]["content"] = self._content(messages, number, render)
        return [self._with_arguments(adapted, number, render) for number in range(len(adapted))]

    def _content(self, messages: Sequence[Mapping], number: int, render: Callable) -> str | list:
        message = messages[number]
        role, content = message["role"], message["content"]
        if role not in self.content:
            parts = [{"type": "text", "text": _PROBE}]
            as_text = _PROBE in (_try(render, _with(messages, number, content=_PROBE)) or "")
            found = _try(render, _with(messages, number, content=parts)) or ""
            as_parts = _PROBE in found and not re.search(rf"""['"]text['"]:\s*['"]{_PROBE}""", found)
            if not as_text and not as_parts:
                return text_of(message)  # the template shows neither here; `hidden_fields` reports it
            self.content[role] = as_text, as_parts
        as_text, as_parts = self.content[role]
        if isinstance(content, str):
            return content if as_text else [{"type": "text", "text": content}]
        return content if as_parts else text_of(message)

    def _with_arguments(self, messages: list[dict], number: int, render: Callable) -> dict:
        message = messages[number]
        calls = message.get("tool_calls") or []
        if not any("arguments" in call.get("function", call) for call in calls):
            return message
        if self.arguments is None:
            tried = [
                _try(render, _with_call(messages, number, each)) or ""
                for each in ({_PROBE: "a"}, f'{{"{_PROBE}": "a"}}')
            ]
            as_objects = _PROBE in tried[0] and f"{{'{_PROBE}'" not in tried[0]  # Python's representation of a dict
            as_text = _PROBE in tried[1] and f'\\"{_PROBE}' not in tried[1]  # JSON text encoded as JSON again
            if not as_objects and not as_text:
                return message
            self.arguments = as_objects, as_text
        accepted = self.arguments
        made = []
        for call in calls:
            function = call.get("function", call)
            if "arguments" in function:
                function = {**function, "arguments": _arguments(number, function["arguments"], *accepted)}
            made.append({**call, "function": function} if "function" in call else function)
        return {**message, "tool_calls": made}

    def check(
        self, template: str, messages: Sequence[Mapping], tools: Any, options: Mapping | None, text: str, render: Render
    ) -> tuple[str, ...]:
        """Return notes on fields that the template leaves out; `text` is the rendered conversation.

        Raises:
            DataError: the template does not know a role, or does not show a field that carries the row's content.
        """
        told = self._check_roles(template, messages, lambda other: render(other, tools), text)
        known = tuple(sorted((name, repr(value)) for name, value in (options or {}).items()))
        for number, message in enumerate(messages):
            for name in _fields(message):
                if self._shows(messages, number, name, tools, known, text, render):
                    continue
                if name in _REFUSED:
                    kind = f"content of role {message['role']!r}" if name == "content" else repr(name)
                    raise DataError(f"message {number}: the chat template does not show {kind}; {_REMEDY}")
                told.append(f"the chat template does not show {name!r} of messages of role {message['role']!r}")
        if tools:
            self._check_tools(messages, tools, known, text, render)
        told += [
            f"the chat template reads no variable {name!r} of chat_template_kwargs"
            for name in options or ()
            if not re.search(rf"\b{re.escape(str(name))}\b", template)
        ]
        return tuple(dict.fromkeys(told))

    def _check_roles(self, template: str, messages: Sequence[Mapping], render: Callable, text: str) -> list[str]:
        told = []
        for number, role in enumerate(message["role"] for message in messages):
            if role in ROLES:
                continue
            meant = meant_role(role)
            known = f"'{role}'" in template or f'"{role}"' in template
            if meant is not None and meant != "assistant" and not known:
                known = _try(render, _with(messages, number, role=meant)) == text
            if meant is not None and (meant == "assistant" or not known):
                raise DataError(f"message {number} has role {role!r}; did you mean {meant!r}?")
            if not known:
                told.append(f"the chat template does not name role {role!r}; its messages are context")
        return told

    def _shows(
        self, messages: Messages, number: int, name: str, tools: Any, known: tuple, text: str, render: Render
    ) -> bool:
        message = messages[number]
        around = (number == 0, number == len(messages) - 1, messages[number - 1]["role"] if number else None)
        value = message.get(name)
        size = len(value) if isinstance(value, list) else type(value).__name__
        kind = (message["role"], name, *around, tuple(sorted(message)), size, bool(tools), known)
        if kind in self.shown or kind in self.hidden:
            return kind in self.shown
        if all(_changes(messages, other, number, tools, text, render) for other in _altered(messages, number, name)):
            self.shown.add(kind)
            return True
        if name not in _REFUSED:
            self.hidden.add(kind)
        return False

    def _check_tools(
        self, messages: Messages, tools: Sequence[Mapping], known: tuple, text: str, render: Render
    ) -> None:
        kind = ("tools", len(tools), messages[0]["role"], messages[-1]["role"], known)
        if kind in self.shown:
            return
        for fewer in {0, len(tools) - 1}:
            if _try(lambda other, fewer=fewer: render(other, tools[:fewer] or None), messages) == text:
                raise DataError(f"the chat template does not show the tools; {_REMEDY}")
        self.shown.add(kind)


def _fields(message: Mapping) -> list[str]:
    """The non-empty fields of a message that the text should show; all reasoning fields count as one."""
    named = {"reasoning_content" if name in _REASONING else name: None for name, value in message.items() if value}
    return [name for name in named if name not in _SILENT]


def _altered(messages: Sequence[Mapping], number: int, name: str):
    """Yield copies of the conversation, each with one part of the field changed."""
    message = messages[number]
    if name == "content" and isinstance(message["content"], str):
        yield _with(messages, number, content=f"{message['content']} {_PROBE}")
    elif name == "content":
        for i in range(len(parts := message["content"])):
            changed = {**parts[i], "text": f"{parts[i]['text']} {_PROBE}"}
            yield _with(messages, number, content=[*parts[:i], changed, *parts[i + 1 :]])
    elif name == "tool_calls":
        for i, call in enumerate(calls := message["tool_calls"]):
            for changed in _altered_calls(call):
                yield _with(messages, number, tool_calls=[*calls[:i], changed, *calls[i + 1 :]])
    else:
        gone = _REASONING if name == "reasoning_content" else (name,)
        without = {key: value for key, value in message.items() if key not in gone}
        yield [*messages[:number], without, *messages[number + 1 :]]


def _altered_calls(call: Mapping):
    function = call.get("function", call)
    arguments = function.get("arguments")
    changes: list[dict] = [{"name": f"{function.get('name')}_{_PROBE}"}]
    if arguments:
        as_text = isinstance(arguments, str)
        changes.append({"arguments": f'{{"{_PROBE}": 0}}' if as_text else {**arguments, _PROBE: 0}})
    for change in changes:
        yield {**call, "function": {**function, **change}} if "function" in call else {**call, **change}


def _changes(messages: Messages, other: Messages, number: int, tools: Any, text: str, render: Render) -> bool:
    """Return True if the text changes, for the whole conversation or for the part that ends with message `number`.

    Many templates leave out the reasoning of earlier turns. A template that fails on the altered conversation reads the
    changed field.
    """
    if _try(lambda given: render(given, tools), other) != text:
        return True
    if number == len(messages) - 1:
        return False
    before = _try(lambda given: render(given, tools), messages[: number + 1])
    return before is not None and before != _try(lambda given: render(given, tools), other[: number + 1])


def _arguments(number: int, arguments: Any, as_objects: bool, as_text: bool) -> Any:
    """Return the arguments of a tool call in a form that the template accepts."""
    if isinstance(arguments, str) and not as_text:
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"message {number}: arguments of a tool call are not JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(
                f"message {number}: arguments of a tool call are JSON of {type(value).__name__}, not an object"
            )
        return value
    if not isinstance(arguments, str) and not as_objects:
        return json.dumps(arguments, ensure_ascii=False)
    return arguments


def _with(messages: Sequence[Mapping], number: int, **changed: Any) -> list[Mapping]:
    return [*messages[:number], {**messages[number], **changed}, *messages[number + 1 :]]


def _with_call(messages: Sequence[Mapping], number: int, arguments: Any) -> list[Mapping]:
    """Return the conversation with these arguments in the message's first call that has any."""
    calls = list(messages[number]["tool_calls"])
    place = next(i for i, call in enumerate(calls) if "arguments" in call.get("function", call))
    call = calls[place]
    function = {**call.get("function", call), "arguments": arguments}
    calls[place] = {**call, "function": function} if "function" in call else function
    return _with(messages, number, tool_calls=calls)


def _try(render: Callable[[Sequence[Mapping]], str], messages: Sequence[Mapping]) -> str | None:
    """Return the rendered text; None if the template fails. Raises TooCostly."""
    try:
        return render(messages)
    except TooCostly:
        raise
    except DataError:
        return None

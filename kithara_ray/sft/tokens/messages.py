"""Check the messages of a row's conversation, and convert them to the form that chat templates read.

The form is OpenAI's: `role`, `content`, and an assistant's `tool_calls`. A message may have `weight` 0 or 1; an
assistant message of weight 0 is context.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kithara_ray.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Names of roles in other formats.
_ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
}
_NEAR = 0.75  # of difflib: "asistant" and "tools" are near, "narrator" is not


def meant_role(role: str) -> str | None:
    """The known role that an unknown one misspells or renames; None if there is none."""
    folded = role.strip().casefold()
    if folded in ROLES or folded in _ALIASES:
        return _ALIASES.get(folded, folded)
    return next(iter(difflib.get_close_matches(folded, ROLES, n=1, cutoff=_NEAR)), None)


def check_messages(messages: Any) -> list[dict]:
    """Return a conversation's messages as plain dicts, with `function_call` as `tool_calls`, and `weight` only if 0.

    Args:
        messages: a list of messages, or its JSON text.

    Raises:
        DataError: the messages are not a list of dicts with a role and text, or the assistant says nothing.
    """
    checked = as_messages(messages)
    saying = [message for message in checked if says_something(message)]
    if not saying:
        meant = [m["role"] for m in checked if m["role"] != "assistant" and meant_role(m["role"]) == "assistant"]
        hint = f"; role {meant[0]!r} must be spelled 'assistant'" if meant else ""
        raise DataError(f"has no assistant message with content, so there is nothing to train on{hint}")
    if all("weight" in message for message in saying):
        raise DataError("has only assistant messages of weight 0, so there is nothing to train on")
    return checked


def as_messages(messages: Any) -> list[dict]:
    """`check_messages` of a conversation in which the assistant need not have spoken yet: a prompt."""
    messages = as_list(messages, "messages")
    if not messages:
        raise DataError("is empty")
    checked = [_checked(number, message) for number, message in enumerate(messages)]
    if any("tool_calls" in old for old in checked) and any("function_call" in old for old in messages):
        checked = [message | {"role": "tool"} if message["role"] == "function" else message for message in checked]
    return checked


def as_list(value: Any, what: str) -> Sequence:
    """Return a list of messages, given as a list or as JSON text."""
    found, why = type(value).__name__, ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            why = f", nor JSON text of one: {error}"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise DataError(f"is {found}, not a list of {what}{why}")
    return value


def _checked(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} is {type(message).__name__}, not a dict with role and content")
    if not isinstance(message.get("role"), str):
        found = ", ".join(map(repr, message)) or "nothing"
        hint = '; pass format="sharegpt"' if "from" in message and "value" in message else ""
        raise DataError(f"message {number} has no role, found {found}{hint}")
    made = dict(message)
    if isinstance(made.get("content"), str) or made.get("content") is None:
        _check_text(number, made.get("content"))
    else:
        made["content"] = _parts(number, made["content"])
    if made.get("function_call") is not None:
        made = _as_tool_call(number, made)
    if made.get("tool_calls") is not None:
        made["tool_calls"] = _calls(number, made["tool_calls"])
    if (weight := made.pop("weight", None)) is not None and not _weight(number, made["role"], weight):
        made["weight"] = 0
    return made


def _check_text(number: int, text: str | None) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"message {number} is not valid Unicode at character {error.start}") from error


def _parts(number: int, content: Any) -> list[dict[str, str]]:
    """Return content as a list of parts; only text parts are accepted."""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(f"message {number} has content of type {type(content).__name__}, not text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise DataError(f"message {number} has content of type {kind!r}; only text is trained on")
        if not isinstance(part.get("text"), str):
            raise DataError(f"message {number} has a text part whose 'text' is {type(part.get('text')).__name__}")
        if more := [key for key, value in part.items() if key not in ("type", "text") and value not in (None, [], {})]:
            raise DataError(
                f"message {number} has a text part with {', '.join(map(repr, more))}; only its text is trained on, "
                "remove the rest"
            )
        _check_text(number, part["text"])
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _as_tool_call(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """Convert OpenAI's older `function_call` to a tool call."""
    call = message.pop("function_call")
    if not isinstance(call, Mapping):
        raise DataError(f"message {number} has a function_call of type {type(call).__name__}, not a dict")
    if message.get("tool_calls"):
        raise DataError(f"message {number} has both function_call and tool_calls; give one")
    return message | {"tool_calls": [{"type": "function", "function": dict(call)}]}


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    try:
        calls = as_list(calls, "tool calls")
    except DataError as error:
        raise DataError(f"message {number}: tool_calls {error}") from error
    if not all(isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping) for call in calls):
        raise DataError(f"message {number}: tool_calls must be dicts with a function's name and arguments")
    return [{k: dict(v) if k == "function" else v for k, v in call.items()} for call in calls]


def _weight(number: int, role: str, weight: Any) -> bool:
    """Return True if a message of this weight is trained on."""
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise DataError(
            f"message {number} has weight {weight!r}; only 0 (context) and 1 (trained on) are accepted; losses are "
            "not weighted by message"
        )
    if weight and role != "assistant":
        raise DataError(f"message {number} has weight 1 and role {role!r}; only the assistant's are trained on")
    return bool(weight)


def says_something(message: Mapping) -> bool:
    return message["role"] == "assistant" and bool(text_of(message).strip() or message.get("tool_calls"))


def text_of(message: Mapping) -> str:
    """The text of the content, with each of several parts on its own line."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def check_tools(tools: Any) -> list[dict] | None:
    """Return JSON schemas of tools, given as a list or as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"is not JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"is {type(tools).__name__}, not a list of JSON schemas")
    return [dict(tool) for tool in tools]

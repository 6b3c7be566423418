"""Convert rows of common formats to a prompt and an answer, or to a conversation.

A conversion takes the format's own columns by name and returns `{"prompt", "answer"}` or `{"messages", ...}`. It knows
neither tokenizer nor template. It raises DataError, without the row's place.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kithara_ray.errors import DataError
from kithara_ray.sft.tokens.messages import as_list, check_messages, check_tools

Cells = Mapping[str, Any]

_MORE = ("tools", "chat_template_kwargs")
# Values of `from` in ShareGPT messages. LLaMA-Factory adds those for tools.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",
}
MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    columns: columns that a row of the format has.
    optional: columns that it may also have.
    texts: columns of text that must not be null.
    may_be_empty: columns of `texts` that may be empty.
    convert: converts the row's cells to a prompt and an answer, or to a conversation.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    texts: tuple[str, ...]
    convert: Callable[[Cells], dict[str, Any]]
    may_be_empty: tuple[str, ...] = ()


def messages(cells: Cells) -> dict[str, Any]:
    """Read a conversation in the form of OpenAI's API: `messages`, with `tools` or the older `functions`."""
    made = conversation(cells["messages"], cells)
    if functions := check_tools(cells.get("functions")):
        if made["tools"]:
            raise DataError("has both tools and functions; give one")
        made["tools"] = [{"type": "function", "function": function} for function in functions]
    return made


def conversation(given: Any, cells: Cells) -> dict[str, Any]:
    """Return checked messages, with the row's `system`, `tools` and `chat_template_kwargs`, if any."""
    given = as_list(given, "messages")
    system = cells.get("system")
    if not is_null(system) and system != "":
        if not isinstance(system, str):
            raise _in("system", DataError(f"is {type(system).__name__}, not text"))
        if given and isinstance(given[0], Mapping) and given[0].get("role") == "system":
            raise _in("system", DataError("has text, and the messages begin with one of role 'system' too; give one"))
        given = [{"role": "system", "content": system}, *given]
    if media := [name for name in MEDIA if cells.get(name) is not None and len(cells[name])]:
        raise _in(media[0], DataError("is not empty; only text is trained on"))
    options = cells.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise _in("chat_template_kwargs", DataError(f"is {type(options).__name__}, not a dict"))
    try:
        tools = check_tools(cells.get("tools"))
    except DataError as error:
        raise _in("tools", error) from error
    return {"messages": check_messages(given), "tools": tools, "options": options}


def sharegpt(cells: Cells) -> dict[str, Any]:
    """Read `conversations` of {"from", "value"}."""
    said = as_list(cells["conversations"], "messages")
    return conversation([_of_sharegpt(number, message) for number, message in enumerate(said)], cells)


def is_sharegpt(given: Any) -> bool:
    """Return True if the first message has the form of ShareGPT."""
    try:
        first = next(iter(as_list(given, "messages")), None)
    except DataError:
        return False
    return isinstance(first, Mapping) and "role" not in first and "from" in first and "value" in first


def _of_sharegpt(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "from" not in message or "value" not in message:
        found = ", ".join(map(repr, message)) if isinstance(message, Mapping) else type(message).__name__
        raise DataError(f"message {number} has no 'from' and 'value', found {found or 'nothing'}")
    speaker, value = message["from"], message["value"]
    if speaker not in _SPEAKERS:
        raise DataError(f"message {number} is from {speaker!r}; known are {', '.join(map(repr, _SPEAKERS))}")
    made = {"role": _SPEAKERS[speaker], "content": value}
    if speaker == "function_call":
        made = {"role": "assistant", "tool_calls": _calls(number, value)}
    return {key: item for key, item in message.items() if key not in ("from", "value")} | made


def _calls(number: int, text: Any) -> list[dict[str, Any]]:
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise DataError(f"message {number} is a function_call, but not JSON: {error}") from error
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError(f"message {number} is a function_call, but not a JSON object with name and arguments")
    return [{"type": "function", "function": dict(call)} for call in calls]


def chat(cells: Cells) -> dict[str, Any]:
    """Convert a prompt and an answer to a conversation of two messages."""
    return conversation(_turn(cells["prompt"], cells["answer"]), cells)


def alpaca(cells: Cells) -> dict[str, Any]:
    """Join `instruction` and, on a new line, `input`; `history` holds earlier turns, as [instruction, output]."""
    turns = []
    for number, pair in enumerate(_history(cells)):
        if not _is_list(pair) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise _in("history", DataError(f"turn {number} is not [instruction, output]"))
        turns += _turn(*pair)
    asked = f"{cells['instruction']}\n{cells['input']}" if _says(cells.get("input")) else cells["instruction"]
    return conversation([*turns, *_turn(asked, cells["output"])], cells)


def alpaca_text(cells: Cells) -> dict[str, Any]:
    """Put Alpaca's own prompt around `instruction` and `input`, for a model without a chat template."""
    if len(_history(cells)):
        raise _in("history", DataError('is not empty, and format "alpaca_text" has no place for it; use "alpaca"'))
    given = _says(cells.get("input"))
    head = "Below is an instruction that describes a task" + (
        ", paired with an input that provides further context. " if given else ". "
    )
    parts = [f"{head}Write a response that appropriately completes the request."]
    parts.append(f"### Instruction:\n{cells['instruction']}")
    parts += [f"### Input:\n{cells['input']}"] if given else []
    return {"prompt": "\n\n".join([*parts, "### Response:"]), "answer": cells["output"]}


def prompt_completion(cells: Cells) -> dict[str, Any]:
    """Read TRL's format: two texts, or two lists of messages, with only the completion trained on."""
    prompt, completion = cells["prompt"], cells["completion"]
    if not _is_list(prompt) and not _is_list(completion):
        for name in ("prompt", "completion"):
            if not isinstance(cells[name], str):
                raise _in(name, DataError(f"is {type(cells[name]).__name__}, neither text nor a list of messages"))
        return {"prompt": prompt, "answer": completion}
    before = list(prompt) if _is_list(prompt) else _turn(prompt, None)
    after = list(completion) if _is_list(completion) else _turn(None, completion)
    context = [{**m, "weight": 0} if isinstance(m, Mapping) and m.get("role") == "assistant" else m for m in before]
    return conversation([*context, *after], cells)


def _turn(asked: str | None, answered: str | None) -> list[dict[str, str]]:
    said = {"user": asked, "assistant": answered}
    return [{"role": role, "content": text} for role, text in said.items() if text is not None]


def _history(cells: Cells) -> Sequence:
    history = cells.get("history")
    if history is None or is_null(history) or history == "":
        return ()
    if not _is_list(history):
        raise _in("history", DataError(f"is {type(history).__name__}, not a list of [instruction, output]"))
    return history


def _says(value: Any) -> bool:
    if is_null(value):
        return False
    if not isinstance(value, str):
        raise _in("input", DataError(f"is {type(value).__name__}, not text"))
    return bool(value.strip())


def is_null(value: Any) -> bool:
    """Return True for a null of Arrow or pandas."""
    return value is None or (isinstance(value, float) and value != value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


class InColumn(DataError):
    """An error in a column other than the format's first."""

    def __init__(self, column: str, text: str):
        super().__init__(text)
        self.column = column


def _in(column: str, error: DataError) -> InColumn:
    return InColumn(column, str(error))


FORMATS: dict[str, Conversion] = {
    "prompt_answer": Conversion(("prompt", "answer"), (), ("prompt", "answer"), dict, ("prompt",)),
    "messages": Conversion(("messages",), (*_MORE, "functions"), (), messages),
    "chat": Conversion(("prompt", "answer"), ("system", *_MORE), ("prompt", "answer"), chat, ("prompt",)),
    "prompt_completion": Conversion(("prompt", "completion"), ("system", *_MORE), (), prompt_completion),
    "sharegpt": Conversion(("conversations",), ("system", *_MORE), (), sharegpt),
    "alpaca": Conversion(
        ("instruction", "output"), ("input", "system", "history", *_MORE), ("instruction", "output"), alpaca
    ),
    "alpaca_text": Conversion(("instruction", "output"), ("input", "history"), ("instruction", "output"), alpaca_text),
}

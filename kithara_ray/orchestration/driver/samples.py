"""Samples of a model's output before and after training, for the run's report."""

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


class Samples:
    """Continuations of some prompts by `generate`.

    Attributes:
        rows: one dict per prompt: prompt, before, after; for history.json.
    """

    def __init__(self, model: Any, prompts: Sequence[Any], max_length: int):
        self._model, self._prompts, self._max_length = model, list(prompts), max_length
        self.rows: list[dict[str, str]] = [{"prompt": _shown(prompt)} for prompt in self._prompts]

    def take(self, when: str) -> None:
        """Generate now, `when` being "before" or "after", then free the weights; "after" ends the actor too.

        The rows record a failure.
        """
        if not self._prompts:
            return
        try:
            texts = self._model.generate(self._prompts, max_length=self._max_length, strip_prompt=True)
        except Exception as error:
            logger.warning("no samples %s training: %s", when, error)
            texts = [f"not generated: {type(error).__name__}: {error}"] * len(self._prompts)
        finally:
            self._model.unload() if when == "before" else self._model.release()
        for row, text in zip(self.rows, texts, strict=True):
            row[when] = text


def _shown(prompt: Any) -> str:
    """Return a text, or a chat with one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)

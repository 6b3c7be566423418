"""Load a tokenizer, and find the tokens with which it begins, ends and pads a sequence.

The functions import `transformers`, so importing this module costs nothing. They load no model, but the tokenizer
module of transformers imports torch if it is installed.
"""

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kithara_ray.errors import DataError, KitharaRayError

_PROBE = "a"
# Formerly, transformers kept the template of a processor here, and the tokenizer beside it had none.
_OF_PROCESSORS = "chat_template.json"

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=8)
def load_tokenizer(handle: str) -> Any:
    """The tokenizer at `hf://org/name`, a local directory or `gs://...`; loaded once per process, so do not modify it.

    Raises DataError, which names the handle and the cause, if there is none.
    """
    from transformers import AutoTokenizer

    from kithara_ray.hf.fetch import fetch_headers

    try:
        directory = fetch_headers(handle)[0]
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (KitharaRayError, OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise DataError(_unloadable(handle, error)) from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises bare Exception for a malformed tokenizer.json
            raise
        raise DataError(_unloadable(handle, error)) from error
    if not tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
        # AutoTokenizer invents an empty vocabulary for some directories that hold a config.json and no tokenizer.
        raise DataError(f"the tokenizer at {handle!r} encodes {_PROBE!r} to no tokens; are its tokenizer files there?")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _of_processor(directory, handle)
    return tokenizer


def _of_processor(directory: Path, handle: str) -> str | None:
    """Return the template of chat_template.json, which only processors read; None if there is no such file.

    Raises:
        DataError: the file holds no template.
    """
    file = directory / _OF_PROCESSORS
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_without_template(handle, f"{type(error).__name__}: {error}")) from error
    if not isinstance(template, str):
        raise DataError(_without_template(handle, f"'chat_template' is {type(template).__name__}"))
    log.info("chat template of %s: %s, as the tokenizer has none of its own", handle, _OF_PROCESSORS)
    return template


def _without_template(handle: str, cause: str) -> str:
    return f"{_OF_PROCESSORS} of {handle!r} holds no template ({cause}); mend the file, or pass chat_template="


def _unloadable(handle: str, error: Exception) -> str:
    cause = " ".join(str(error).split())
    cause = cause if len(cause) <= 300 else f"{cause[:300]}..."
    return (
        f"no tokenizer at {handle!r}: {type(error).__name__}: {cause}; "
        f"pass tokenizer_handle= of a directory with tokenizer.json, or tokenizer="
    )


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts first, or None if it puts none.

    Found by encoding a text, as the model's own pipeline does, and not inferred from the name of a family.
    """
    probe_ids = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
    adds_one = tokenizer.bos_token_id is not None and bool(probe_ids) and probe_ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token_id if adds_one else None


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that begin, end and pad a sequence of this tokenizer.

    bos_id: the token the tokenizer itself puts first, or None if it puts none. Many tokenizers name a BOS token without
        ever adding it (SmolLM2's is the chat marker `<|im_start|>`); such a model was not trained with one.
    eos_id: the token that ends an answer.
    pad_id: the token that fills a row; `eos_id` if the tokenizer names none. Only the mask identifies padding, because
        this id may also be that of a trained token.
    all_ids: every special token, including chat markers.
    marks: the texts of these tokens.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    all_ids: frozenset[int] = frozenset()
    marks: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        eos_id = tokenizer.eos_token_id
        if eos_id is None:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DataError(
                f"tokenizer {name!r} has no EOS token, so no answer would end; set tokenizer.eos_token to the token "
                f"that ends an answer"
            )
        pad_id = tokenizer.pad_token_id
        return cls(
            bos_id=bos_of(tokenizer),
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            all_ids=frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special) | {eos_id},
            marks=tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        )

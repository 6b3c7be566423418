"""The files of a training run's tokenizer: the run keeps them, and every export of the run carries them."""

import copy
import json
import tempfile
from pathlib import Path

from kithara_ray.errors import ConfigError
from kithara_ray.hf.facts.generation import with_stops
from kithara_ray.hf.fetch import fetch_headers
from kithara_ray.hf.model_files import GENERATION, TEMPLATE, TEMPLATES, TOKENIZER_CONFIG, names_in, read_tokenizer
from kithara_ray.sft.tokens.prompts import Prompting
from kithara_ray.storage.urls import is_url

_JINJA = ("{{", "{%", "{#")


def files_of(prompting: Prompting, base: str) -> dict[str, bytes]:
    """Return the files of a tokenizer with the chat template of training, and generation settings for its model.

    A handle's files stay as they are, byte for byte, except for the template. transformers saves a tokenizer object.

    Args:
        base: handle of the base; the tokens that end answers are added to its generation_config.json.
    """
    template = prompting.chat_template
    if isinstance(prompting.tokenizer, str):
        files = read_tokenizer(str(fetch_headers(prompting.tokenizer)[0]))
        files.pop(GENERATION, None)
        files = _with_template(files, template) if template is not None else files
    else:
        tokenizer = copy.copy(prompting.tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        with tempfile.TemporaryDirectory(prefix="kithara_ray_tokenizer_") as directory:
            tokenizer.save_pretrained(directory)
            files = {name: Path(directory, name).read_bytes() for name in names_in(Path(directory))}
    generation = with_stops(fetch_headers(base)[0], prompting.ends)
    return files | ({GENERATION: generation} if generation is not None else {})


def _with_template(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    """Replace all chat templates in a tokenizer's files by one, wherever the files hold them."""
    kept = {
        name: data
        for name, data in files.items()
        if not name.startswith((f"{TEMPLATES}/", "chat_template")) or name == TEMPLATE
    }
    if TOKENIZER_CONFIG in kept:
        config = json.loads(kept[TOKENIZER_CONFIG])
        if config.pop("chat_template", None) is not None:
            kept[TOKENIZER_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return kept | {TEMPLATE: template.encode()}


def read_template(given: str | Path | None) -> str | None:
    """Return a chat template's text, given the text itself or the path of a file with it.

    Raises:
        ConfigError: the text has no Jinja and names no file, or the file has no Jinja.
    """
    if given is None:
        return None
    if not isinstance(given, (str, Path)):
        raise ConfigError(f"chat_template must be Jinja text or the path of a file, got {type(given).__name__}")
    text = str(given)
    if isinstance(given, str) and any(mark in text for mark in _JINJA):
        return text
    if is_url(text):
        raise ConfigError(f"chat_template={text!r}: give a local file, or the template's text")
    path = Path(text).expanduser()
    if "\n" in text or not path.is_file():
        raise ConfigError(
            f"chat_template={text[:80]!r} is not Jinja text, and there is no such file. Give the template's text, or "
            "the path of a .jinja file on this host"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={text!r} cannot be read as text ({error})") from error
    if path.suffix == ".json" or not any(mark in content for mark in _JINJA):
        raise ConfigError(f"chat_template={text!r}: the file holds no Jinja template; give a .jinja file")
    return content

"""Remove secrets from text and settings before they are written or shown."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_NAME = re.compile(r"token|secret|passw|credential|api_?key|access_?key|private_?key|signature|authorization", re.I)
# Forms that are secret under any name: Hugging Face, W&B in URLs, Google, AWS, GitHub, JSON web tokens, PEM.
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bya29\.[\w-]{20,}|\bAIza[\w-]{30,}|\bAKIA[A-Z0-9]{16}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.I)
_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|signature|sig|credential|password)[^=&\s]*=)[^&\s]+", re.I)
# Harmless settings whose names contain such a word.
_HARMLESS = re.compile(r"(^|_)(tokenizer|max_tokens|tokens|.*tokens_per_s|special_tokens|stop_token_ids)(_|$)", re.I)
_SHORTEST = 6


def secret_values(env: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables with secret-sounding names, longest first."""
    env = os.environ if env is None else env
    found = {value for name, value in env.items() if is_secret_name(name) and len(value) >= _SHORTEST}
    return sorted((value for value in found if not os.path.exists(value)), key=lambda value: (-len(value), value))


def is_secret_name(name: str) -> bool:
    return bool(_NAME.search(name)) and not _HARMLESS.search(name)


def redact(value: Any, secrets: Sequence[str] | None = None) -> Any:
    """Replace secrets in a JSON-like value by ***: by their names, values in this environment, and known forms."""
    secrets = secret_values() if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if is_secret_name(str(name)) and isinstance(inner, str) else redact(inner, secrets)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(inner, secrets) for inner in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1{HIDDEN}@", _SHAPES.sub(HIDDEN, value)))

"""Arguments of `KerasHubModel.from_preset` that are refused: unknown ones, wrong ones, and contradictions."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kithara_ray.errors import ConfigError

# Kithara's arguments that mean nothing here, and what to do instead.
_ELSEWHERE = {
    "sharding_strategy": "give Trainer(mesh=MeshShape(data=..., fsdp=..., tensor=...))",
    "scan_layers": "leave it out",
    "dtype": "give precision=",
    "preprocessor": "leave it out; rows are tokenised by the dataset",
}


def check_unset(function: Callable, given: dict[str, Any], why: str) -> None:
    """An argument that contradicts another, or does nothing beside it, is refused."""
    defaults = inspect.signature(function).parameters
    for name, value in given.items():
        if value != defaults[name].default:
            raise ConfigError(f"from_preset: {name}={value!r} {why}; leave it out")


def check_known(unknown: Iterable[str]) -> None:
    """An argument that is not taken is refused, with what is given in its place."""
    for name in unknown:
        raise ConfigError(
            f"KerasHubModel.from_preset takes no argument {name!r}"
            + (f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else "")
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError for a value that is not among the choices."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

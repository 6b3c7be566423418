"""Refuse wrong arguments of `KerasHubModel.from_preset`: unknown ones, invalid values and contradictions."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kithara_ray.errors import ConfigError

# Kithara's arguments that have no meaning here, with their replacement.
_ELSEWHERE = {
    "sharding_strategy": "give Trainer(mesh=MeshShape(data=..., fsdp=..., tensor=...))",
    "scan_layers": "leave it out",
    "dtype": "give precision=",
    "preprocessor": "leave it out; rows are tokenised by the dataset",
}


def check_unset(function: Callable, given: dict[str, Any], why: str) -> None:
    """Refuse an argument that contradicts another, or has no effect with it."""
    defaults = inspect.signature(function).parameters
    for name, value in given.items():
        if value != defaults[name].default:
            raise ConfigError(f"from_preset: {name}={value!r} {why}; leave it out")


def check_known(unknown: Iterable[str]) -> None:
    """Refuse an unknown argument, and name its replacement."""
    for name in unknown:
        raise ConfigError(
            f"KerasHubModel.from_preset takes no argument {name!r}"
            + (f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else "")
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError for a value that is not among the choices."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

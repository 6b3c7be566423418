"""Arguments of `KerasHubModel.from_preset` that are refused: unknown ones, and those that do nothing beside others."""

import inspect
from collections.abc import Callable, Iterable
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


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises ConfigError for the first, and says what to do instead where Kithara has an argument of that name."""
    for name in names:
        raise ConfigError(
            f"KerasHubModel.from_preset takes no argument {name!r}"
            + (f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else "")
        )

"""Checks of a `LoraConfig`'s fields; each returns the field as the config keeps it."""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from kithara_ray.errors import ConfigError, UnsupportedError

ALL_LINEAR = "all-linear"  # PEFT's word, in upper or lower case, for every linear layer except the head
EMBEDDING, HEAD = "embed_tokens", "lm_head"


def is_number(value: object) -> TypeGuard[float]:
    # An integer too large for float64 cannot scale anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def checked_targets(targets: object, optional: bool = False) -> tuple[str, ...] | str:
    """Check the modules to adapt; with `optional` there may be none."""
    if optional and targets is not None and not isinstance(targets, str) and not targets:
        return ()
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        raise ConfigError(f'target_modules: spell out the modules that "{ALL_LINEAR}" stands for')
    return checked_names("target_modules", targets)


def checked_names(field: str, given: object) -> tuple[str, ...] | str:
    """Check a regular expression given as one string, or a list of names."""
    if isinstance(given, str) and given:
        check_expression(field, given, given)
        return given
    entries = tuple(given) if isinstance(given, list | tuple | set | frozenset) else ()
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise ConfigError(f"{field} must name at least one module, got {given!r}")
    return entries


def checked_parameters(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    entries: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple | set | frozenset) else (None,)
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise ConfigError(
            f'target_parameters must be a list of names such as "mlp.experts.gate_up_proj", got {given!r}; PEFT takes '
            "no regular expression here"
        )
    return tuple(sorted(entries)) if isinstance(given, set | frozenset) else entries


def checked_exclusions(given: object) -> tuple[str, ...] | str | None:
    """Check the modules to exclude. None, and as in PEFT any empty value, excludes nothing."""
    if given is None or (isinstance(given, str | list | tuple | set | frozenset) and not given):
        return None
    checked = checked_names("exclude_modules", given)
    return tuple(sorted(checked)) if isinstance(given, set | frozenset) else checked


def checked_layers(given: object) -> tuple[int, ...] | None:
    if given is None or (isinstance(given, list | tuple) and not given):
        return None
    layers: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        raise ConfigError(f"layers_to_transform must be a layer's number >= 0 or a list of them, got {given!r}")
    return layers


def checked_layer_patterns(given: object) -> tuple[str, ...] | None:
    if given is None or (isinstance(given, str | list | tuple) and not given):
        return None
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) and one for one in patterns):
        raise ConfigError(f"layers_pattern must be the name of a list of blocks or several, got {given!r}")
    for pattern in patterns:
        check_expression("layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
    return tuple(patterns)


def checked_modules(given: object) -> tuple[str, ...]:
    """Return the embedding and the head by the last part of their names, in this order."""
    entries = tuple(given) if isinstance(given, list | tuple | set | frozenset) else (given,) if given else ()
    names = [entry for entry in entries if isinstance(entry, str)]
    if len(names) != len(entries):
        raise ConfigError(f"modules_to_save must be a module's name or a list of them, got {given!r}")
    leaves = {name.rpartition(".")[2] for name in names}
    other = sorted(leaves - {EMBEDDING, HEAD})
    if other:
        raise UnsupportedError(
            f"modules_to_save={given!r} is not supported: {other[0]!r} is neither {EMBEDDING!r} nor {HEAD!r}, which "
            "are the modules that are trained as a whole beside LoRA; leave it out, or train all weights"
        )
    return tuple(name for name in (EMBEDDING, HEAD) if name in leaves)


def checked_tokens(given: object) -> dict[str, tuple[int, ...]]:
    if given is None:
        return {}
    by_name = given if isinstance(given, Mapping) else {EMBEDDING: given}
    made: dict[str, tuple[int, ...]] = {}
    for name, tokens in by_name.items():
        leaf = str(name).rpartition(".")[2]
        if leaf not in (EMBEDDING, HEAD):
            raise UnsupportedError(
                f"trainable_token_indices: {name!r} is neither {EMBEDDING!r} nor {HEAD!r}; leave it out"
            )
        rows = tuple(tokens) if isinstance(tokens, list | tuple) else ()
        if not rows or not all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in rows):
            raise ConfigError(f"trainable_token_indices must list the ids of tokens, >= 0, got {tokens!r} for {leaf}")
        if len(set(rows)) < len(rows):
            raise ConfigError(f"trainable_token_indices: an id of {leaf} is given twice in {list(rows)}")
        made[leaf] = rows
    return made


def checked_rows(given: object) -> int | None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise ConfigError(
            f"resize_token_embeddings must be the number of rows, such as len(tokenizer), or None, got {given!r}"
        )
    return given


def check_expression(field: str, given: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{field}: {given!r} is not a regular expression ({error})") from error


def check_rank(name: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{name} must be >= 1, got {rank!r}")


def check_alpha(name: str, alpha: object) -> None:
    if not is_number(alpha) or alpha <= 0:
        raise ConfigError(f"{name} must be finite and > 0, got {alpha!r}")


def checked_patterns(name: str, patterns: object) -> dict[str, Any]:
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{name} must map regular expressions to values, got {patterns!r}")
    for key in patterns:
        check_expression(name, key, rf"(.*\.)?({key})$")
    return dict(patterns)

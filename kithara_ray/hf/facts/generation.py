"""generation_config.json: a model's stop tokens, and the settings that `generate` ignores."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kithara_ray.hf.checkpoint import CONFIG, read_json
from kithara_ray.hf.model_files import GENERATION

# Sampling settings: greedy decoding ignores them, in transformers too.
_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
# Settings that change the output of transformers' greedy decoding, with the values that turn them off.
_CHANGES_GREEDY: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1, 1.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": (),
    "max_time": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "dola_layers": (),
}


def read_generation(directory: Path) -> dict[str, Any]:
    """Read generation_config.json of a model directory; {} without one. Raises CheckpointError."""
    path = directory / GENERATION
    return read_json(path) if path.is_file() else {}


def stops_of(config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """Return the ids that end generation: those of generation_config.json, else those of config.json."""
    named = generation.get("eos_token_id")
    if named is None:
        named = config.get("eos_token_id")
    if named is None and isinstance(config.get("text_config"), Mapping):
        named = config["text_config"].get("eos_token_id")
    return [named] if isinstance(named, int) else [int(number) for number in named or ()]


def with_stops(directory: Path, ends: Iterable[int]) -> bytes | None:
    """Return a base's generation_config.json, made to stop at the ends of trained answers too; None without either."""
    config, generation = read_json(directory / CONFIG), read_generation(directory)
    stops = stops_of(config, generation)
    gained = [*stops, *(number for number in dict.fromkeys(ends) if number not in stops)]
    if gained == stops:
        return (directory / GENERATION).read_bytes() if generation else None
    if not generation:  # as transformers derives it if there is no file
        names = ("bos_token_id", "pad_token_id")
        generation = {name: config[name] for name in names if isinstance(config.get(name), int)}
    value = {**generation, "eos_token_id": gained if len(gained) > 1 else gained[0]}
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def not_done(generation: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a generation_config.json that `generate` ignores.

    Returns: the sampling settings, if the file asks for sampling; and those that change transformers' greedy decoding
    too.
    """
    sampling: dict[str, Any] = {}
    if generation.get("do_sample"):
        sampling = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    changes = {}
    for name, off in _CHANGES_GREEDY.items():
        value = generation.get(name)
        if value is not None and value not in off and value not in ([], {}):
            changes[name] = value
    return sampling, changes


def describe_not_done(generation: Mapping[str, Any]) -> list[str]:
    """Describe the result of `not_done` in sentences for a log."""
    sampling, changes = not_done(generation)
    told = []
    if sampling:
        told.append(
            f"generate decodes greedily and ignores the sampling that {GENERATION} asks for ({_listed(sampling)})"
        )
    if changes:
        told.append(
            f"generate ignores {_listed(changes)} of {GENERATION}, so transformers' texts may differ, greedy ones too"
        )
    return told


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in settings.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

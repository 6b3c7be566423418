"""Rotary frequencies from config.json, as transformers' `ROPE_INIT_FUNCTIONS` compute them; no jax, no keras.

    R  rotated width of a head    F = R // 2  frequencies

transformers computes in float32 with a base that is a Python float. So does this module: numpy's and torch's float32
powers agree to the last bit or two, which moves no logit by more than 1e-6.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kithara_ray.errors import UnsupportedError

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Rotation:
    """One kind of block's rotation of queries and keys.

    Attributes:
        frequencies: F angles per position, float32 values.
        scale: factor of cosines and sines, so that logits get its square.
        interleaved: True if a pair is (2i, 2i + 1) of a head's first R places, False if it is (i, i + F).
        limit: number of tokens of a sample up to which `frequencies` hold; None for any length.
        longer: the F frequencies of longer samples (longrope); None to stretch the base with the length (dynamic).
        base, factor: rope_theta and factor of a stretched base; 0 elsewhere.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    limit: int | None = None
    longer: tuple[float, ...] | None = None
    base: float = 0.0
    factor: float = 0.0


def rotation_of(
    rope: Mapping[str, Any], head_dim: int, max_positions: int | None = None, interleaved: bool = False
) -> Rotation:
    """Compute the rotation that config.json's rope settings describe.

    Args:
        rope: the settings, with `rope_type` and `rope_theta`; see `family.rope_of`.
        head_dim: a head's width; `partial_rotary_factor` of it is rotated.
        max_positions: the config's `max_position_embeddings`. "dynamic" needs it; yarn and longrope need it only
            where they give no `original_max_position_embeddings` or no `factor`.

    Raises:
        UnsupportedError: the type is unknown.
        KeyError: a setting that the type needs is missing.
        ArithmeticError, ValueError: a setting is senseless.
    """
    kind = rope["rope_type"]
    if kind not in TYPES:
        raise UnsupportedError(f"config.json: rope type {kind!r} is not supported; supported are {', '.join(TYPES)}")
    share = rope.get("partial_rotary_factor", 1.0)
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor of rope_parameters is {share!r}, not between 0 and 1")
    width = int(head_dim * share)
    # Senseless settings raise an ArithmeticError in place of a warning.
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        made = _computed(kind, rope, width, max_positions)
    for name in ("frequencies", "longer"):
        if made.get(name) is not None:
            made[name] = tuple(np.asarray(made[name], np.float32).tolist())
    return Rotation(**made, interleaved=interleaved)


def _computed(kind: str, rope: Mapping[str, Any], width: int, max_positions: int | None) -> dict[str, Any]:
    """Compute the fields of a Rotation of one type, with arrays for its frequencies."""
    theta = rope["rope_theta"]
    wavelengths = np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    plain = np.float32(1) / wavelengths
    if kind == "linear":
        return {"frequencies": plain / np.float32(rope["factor"])}
    if kind == "dynamic":
        settings = {"limit": _needed(max_positions), "base": float(theta), "factor": float(rope["factor"])}
        return {"frequencies": plain} | settings
    if kind == "llama3":
        return {"frequencies": _llama3(rope, plain, _original(rope, max_positions))}
    if kind == "yarn":
        original = _original(rope, max_positions)
        frequencies, scale = _yarn(rope, wavelengths, width, original, max_positions)
        return {"frequencies": frequencies, "scale": scale}
    if kind == "longrope":
        return _longrope(rope, wavelengths, _original(rope, max_positions), max_positions)
    return {"frequencies": plain}


def _original(rope: Mapping[str, Any], max_positions: int | None) -> int:
    original = rope.get("original_max_position_embeddings")
    return _needed(max_positions) if original is None else original


def _needed(max_positions: int | None) -> int:
    if max_positions is None:
        raise KeyError("max_position_embeddings")
    return max_positions


def _factor(rope: Mapping[str, Any], original: int, max_positions: int | None) -> float:
    factor = rope.get("factor")
    return _needed(max_positions) / original if factor is None else factor


def _llama3(rope: Mapping[str, Any], plain: np.ndarray, original: int) -> np.ndarray:
    """Slow rotations are divided by the factor, fast ones kept, those between interpolated."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    lengths = np.float32(2 * math.pi) / plain
    slowed = np.where(lengths > original / low, plain / np.float32(rope["factor"]), plain)
    smooth = (np.float32(original) / lengths - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * slowed / np.float32(rope["factor"]) + smooth * slowed
    return np.where((lengths >= original / high) & (lengths <= original / low), between, slowed)


def yarn_range(rope: Mapping[str, Any], width: int, original: int) -> tuple[float, float]:
    """The dims of a head's width between which yarn goes over from kept to divided frequencies."""

    def place_of(rotations: float) -> float:
        """The dim that makes so many rotations within the original length."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = place_of(rope.get("beta_fast") or 32), place_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, width - 1)


def _yarn(
    rope: Mapping[str, Any], wavelengths: np.ndarray, width: int, original: int, max_positions: int | None
) -> tuple[np.ndarray, float]:
    """Peng et al. 2023, arXiv:2309.00071: frequencies between kept and divided ones, and the factor of cosines."""
    factor = _factor(rope, original, max_positions)
    low, high = yarn_range(rope, width, original)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - ramp
    divided = np.float32(1) / (np.float32(factor) * wavelengths)
    frequencies = divided * (1 - kept) + np.float32(1) / wavelengths * kept
    return frequencies, _yarn_scale(rope, factor)


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def grown(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown()


def _longrope(
    rope: Mapping[str, Any], wavelengths: np.ndarray, original: int, max_positions: int | None
) -> dict[str, Any]:
    """Ding et al. 2024, arXiv:2402.13753: a factor for each frequency, and others for longer samples."""
    scale, factor = rope.get("attention_factor"), _factor(rope, original, max_positions)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (np.asarray(rope[name], np.float32) for name in ("short_factor", "long_factor"))
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if factors.shape != wavelengths.shape:
            raise ValueError(f"{name} of rope_parameters has {factors.size} numbers, not {wavelengths.size}")
    made = {"frequencies": np.float32(1) / (short * wavelengths), "scale": scale}
    return made | {"limit": original, "longer": np.float32(1) / (long * wavelengths)}

"""Notes of an export for users who will serve it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import CONFIG, BaseCheckpoint, read_json
from kithara_ray.hf.facts.experts import is_parameter, part_of
from kithara_ray.hf.facts.generation import read_generation, stops_of
from kithara_ray.hf.model_files import GENERATION, end_of_sequence, read_tokenizer, token_texts
from kithara_ray.hf.tower import ALONE, is_beside

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for --max-lora-rank


def max_lora_rank(adapter: Adapter) -> int | None:
    """Return vLLM's smallest --max-lora-rank that fits this adapter; None if none does."""
    rank = max(adapter.config.rank_of(module) for module in adapter.modules)
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def adapter_notes(adapter: Adapter, counts: Mapping[str, int]) -> list[str]:
    """Note an adapter that changes nothing, or less than it should."""
    if adapter.is_zero:
        return ["every lora_B is zero: the adapter is untrained and the model computes what the base computes"]
    unchanged = counts.get("merged", 0) - counts.get("merged_and_changed", 0)
    if unchanged:
        return [f"{unchanged} of {counts['merged']} merged tensors equal the base: their delta is zero or rounds away"]
    return []


def tower_notes(base: BaseCheckpoint, dtype: str = "auto") -> list[str]:
    """Note the parts of a multimodal model beside the text model: an export of the model carries them as they are."""
    beside = [name for name in base.names if is_beside(base.config, name)]
    parts = sorted({name.removeprefix(ALONE).partition(".")[0] for name in beside})
    if not parts:
        return []
    how = "byte for byte the base's" if dtype == "auto" else f"the base's, cast to {dtype}"
    return [f"only the text model was trained: the {len(beside)} tensors of {', '.join(parts)} are {how}"]


def serving_notes(base: BaseCheckpoint, adapter: Adapter) -> list[str]:
    """Note what a server of the adapter (vLLM) computes wrongly or refuses; a merged model has no such limits."""
    notes, config = [], adapter.config
    if max_lora_rank(adapter) is None:
        notes.append(f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}; serve the merged layout")
    if config.use_dora:
        notes.append("vLLM does not serve DoRA adapters; serve the merged layout")
    if config.has_beside or config.lora_bias:
        notes.append("vLLM applies no biases, trained tokens or saved modules of an adapter; serve the merged layout")
    if (rows := config.resize_token_embeddings) is not None:
        notes.append(
            f"the embedding has {rows} rows: PEFT loads the adapter on a base that transformers' "
            f"resize_token_embeddings({rows}) made as large, and vLLM adds no rows; serve the merged layout"
        )
    scales = {config.scale_of(module) for module in adapter.modules}
    if len(scales) > 1:
        notes.append(
            "modules have different scales (rank_pattern, alpha_pattern), and vLLM reads one r and one lora_alpha: "
            "it would compute something else; serve the merged layout"
        )
    elif scales != {config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)}:
        notes.append("vLLM scales by r of adapter_config.json, which no rank_pattern changes; serve the merged layout")
    notes += _expert_notes(base, adapter)
    known = {module.rpartition(".")[2] for module in adapter.modules}
    for leaf in sorted(known & {"embed_tokens", "lm_head"}):
        notes.append(f"{leaf} is a target: vLLM does not apply adapters to embeddings; serve the merged layout")
    return notes


# Model types whose class in vLLM reads packed factors of experts (`is_3d_moe_weight`), and those that read no form.
_PACKED_IN_VLLM = frozenset({"gpt_oss", "qwen3_5_moe"})
_UNREAD_IN_VLLM = frozenset({"gemma4", "gemma4_text", "qwen3_5_moe_text"})


def _expert_notes(base: BaseCheckpoint, adapter: Adapter) -> list[str]:
    """Note factors of experts that vLLM would not apply: it drops names that it does not know without an error."""
    kind = base.config.get("model_type")
    packed = any(map(is_parameter, adapter.modules))
    apart = [part for module in adapter.modules if (part := part_of(f"{module}.weight"))]
    if packed and kind in _UNREAD_IN_VLLM:
        return [f"vLLM applies no factors of {kind}'s experts, and serves without them; serve the merged layout"]
    if packed and kind not in _PACKED_IN_VLLM:
        return [
            f"vLLM reads factors of {kind}'s experts by expert, and drops PEFT's packed ones without an error: export "
            'the adapter with experts="per_expert", or serve the merged layout'
        ]
    if apart and {part.half for part in apart} != {0, 1, None}:
        return ["vLLM reads factors of experts only for all of their matrices; serve the merged layout"]
    return []


def unserved_ends(
    base: BaseCheckpoint, directory: Path, tokenizer: Mapping[str, bytes] | None, with_model: bool
) -> tuple[list[str], list[int] | None]:
    """Find ends of trained answers at which a server of the export would not stop.

    Args:
        directory: the export's.
        tokenizer: the files that the run kept, whose generation settings hold the trained ends. None if they are not
            known: then this looks for the tokenizer's own end of sequence.
        with_model: True if the export has a config.json and generation_config.json; else a server reads the base's.

    Returns: notes, and all ids to stop at; None if there is nothing to report.
    """
    files = read_tokenizer(str(directory)) or read_tokenizer(str(base.directory))
    config = read_json(directory / CONFIG) if with_model else base.config
    stops = stops_of(config, read_generation(directory if with_model else base.directory))
    if tokenizer and GENERATION in tokenizer:
        ends, what = stops_of({}, json.loads(tokenizer[GENERATION])), "trained answers end with"
    else:
        end = end_of_sequence(files)
        ends, what = [end[1]] if end else [], "the tokenizer ends sequences with"
    missing = [number for number in ends if number not in stops]
    if not missing:
        return [], None
    shown = ", ".join(f"{text!r} ({n})" for n, text in zip(missing, token_texts(files, missing), strict=True))
    whose = "this model's" if with_model else "the base's"
    note = (
        f"{what} {shown}, which is no eos_token_id of {whose} config.json or {GENERATION} ({sorted(stops)}): "
        "give it as a stop token"
    )
    return [note], [*stops, *missing]

"""Names of an adapter's tensors without the parts that wrappers and PEFT add, and reasons why a base lacks a module."""

import logging
from collections.abc import Iterable, Mapping

from kithara_ray.errors import AdapterError, UnsupportedError
from kithara_ray.hf import beside
from kithara_ray.hf.tied_head import is_tied
from kithara_ray.hf.unused import layer_of, layers_of

log = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
WEIGHT_SUFFIX = ".weight"
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
BIAS_SUFFIX = ".lora_B.bias"
SUFFIXES = (A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX, BIAS_SUFFIX)
_BESIDE = (beside.BIAS, beside.TOKENS, beside.WEIGHT)
# Names that torch.compile, activation checkpointing and FSDP (torch, torch_xla) add. No model has such a module.
_WRAPPERS = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_orig_module"}
)
_DISTRIBUTED = "module"  # DDP, DeepSpeed: around a whole model
_PEFT = ("base_model", "model")
# Suffixes that follow PEFT's name of the adapter, if there is one; "" is no suffix.
_ENDINGS = {
    "lora_A": ("weight",),
    "lora_B": ("weight", "bias"),
    "lora_magnitude_vector": ("", "weight"),
    "trainable_tokens_delta": ("",),
}


def without_wrappers(name: str) -> str:
    """Return a tensor's name without the parts that wrappers around modules add."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _DISTRIBUTED:
        del parts[0]
    return ".".join(parts)


def adapter_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Map names in an adapter's file to `<module>.lora_A.weight`, `.lora_B.weight` or `.lora_magnitude_vector`.

    Remove each part that does not name a module: wrappers, every copy of PEFT's prefix, and the name of PEFT's adapter
    ("default") after lora_A. Log names that PEFT itself would not load.

    Raises:
        UnsupportedError: a tensor is neither a LoRA factor nor a weight that PEFT trains besides the factors.
        AdapterError: two tensors get the same name, as in a file of two adapters.
    """
    plain: dict[str, str] = {}
    adapters: set[str] = set()
    for name in names:
        module, suffix, adapter = _split(name, where)
        plain[name] = module + suffix
        adapters |= {adapter} if adapter else set()
    if len(adapters) > 1:
        raise AdapterError(
            f"{where}: holds the adapters {', '.join(sorted(adapters))}. Save one of them: "
            "model.save_pretrained(directory, selected_adapters=[name])"
        )
    first_of: dict[str, str] = {}
    for name, short in plain.items():
        if short in first_of:
            raise AdapterError(f"{where}: {first_of[short]!r} and {name!r} are both {short!r}; save the adapter again")
        first_of[short] = name
    unusual = [name for name, short in plain.items() if name != PEFT_PREFIX + short]
    if unusual:
        log.warning(
            "%s: the names of %d tensors are not those that PEFT saves; %r is read as %r",
            where, len(unusual), unusual[0], PEFT_PREFIX + plain[unusual[0]],
        )  # fmt: skip
    return plain


def _split(name: str, where: str) -> tuple[str, str, str]:
    """Split a name into (module, suffix, PEFT's name of the adapter or "")."""
    parts = without_wrappers(name).split(".")
    at = next((at for at in reversed(range(len(parts))) if parts[at] in _ENDINGS), None)
    if at:
        kind, behind = parts[at], parts[at + 1 :]
        ending = behind.pop() if behind and behind[-1] in _ENDINGS[kind] else ""
        if ending in _ENDINGS[kind] and len(behind) <= 1:
            kept = [kind] if "" in _ENDINGS[kind] else [kind, ending]
            module = ".".join(_without_prefix(parts[:at]))
            return module, "." + ".".join(kept), "".join(behind)
    elif at is None and name.endswith((beside.BIAS, beside.WEIGHT)) and not any("lora_" in part for part in parts):
        return ".".join(_without_prefix(parts[:-1])), f".{parts[-1]}", ""
    raise UnsupportedError(
        f"{where}: tensor {name!r} is not {PEFT_PREFIX}<module> and {listed(SUFFIXES + _BESIDE)}; "
        "adapters of embeddings are not supported"
    )


def _without_prefix(parts: list[str]) -> list[str]:
    """Remove PEFT's prefix, which may be missing or doubled, and wrappers of a whole model before, in or after it."""
    while len(parts) > 1:
        if parts[0] == _DISTRIBUTED:
            parts = parts[1:]
        elif len(parts) > 2 and tuple(parts[:2]) == _PEFT:
            parts = parts[2:]
        else:
            break
    return parts


def listed(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


# --- a module that the base does not have ----------------------------------------------------------------------------


def why_absent(module: str, tensors: Iterable[str], config: Mapping) -> str:
    """Explain why a base has no weight for an adapter's module, as the end of a message: the cause and what to do."""
    tensors, weight = set(tensors), module + WEIGHT_SUFFIX
    if module.rpartition(".")[2] == "lm_head" and is_tied(config):
        return "its head is tied to the token embedding and has no tensor; leave lm_head out of target_modules"
    if weight.removeprefix("model.") in tensors and weight.startswith("model."):
        return (
            f"it has {weight.removeprefix('model.')!r}, as it was saved from the bare decoder (AutoModel): save it "
            "with AutoModelForCausalLM"
        )
    if f"model.{weight}" in tensors:
        return "the adapter was trained on the bare decoder (AutoModel): train it on AutoModelForCausalLM"
    by_plain = {without_wrappers(name): name for name in tensors}
    if weight in by_plain:
        return f"it has {by_plain[weight]!r}, which keeps a wrapper's name: save the base without its wrapper"
    by_text = {_text_name(name): name for name in sorted(tensors)}
    if _text_name(weight) in by_text:
        return (
            f"it has {by_text[_text_name(weight)]!r}: one of the two is a multimodal model and the other its text "
            "model. "
            "Merge into the checkpoint that the adapter was trained on"
        )
    from_layer, layers = layer_of(module), layers_of(config)
    if from_layer is not None and layers is not None and from_layer >= layers:
        return f"it has {layers} layers, and the adapter's model has more: give the adapter's own base"
    example = next((name for name in sorted(tensors) if name.endswith(WEIGHT_SUFFIX)), "none")
    return f"it has names like {example!r}, so the adapter belongs to another architecture: give the adapter's own base"


def _text_name(name: str) -> str:
    """Remove the parts that distinguish a text model inside a multimodal one from a standalone one."""
    return ".".join(part for part in name.split(".") if part not in ("language_model", "model", "text_model"))

"""The definition of a family, and the checks that several families share."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kithara_ray.errors import KitharaRayError, UnsupportedError
from kithara_ray.model import keras_compat
from kithara_ray.model.decoder.description import Description


def _as_it_is(config: Mapping) -> dict:
    return dict(config)


def with_defaults(**fields: Any) -> Callable[[Mapping], dict]:
    """Make a `complete` that fills in transformers' values of fields that a config.json may leave out."""
    return lambda config: fields | dict(config)


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face, computed by KerasHub's blocks, by the block of `model.decoder`, or by either.

    Attributes:
        converter: name of KerasHub's converter, for `keras_compat.converter_of`; "" if KerasHub has none.
        causal_lm: class name in `keras_hub.models`.
        check: raises UnsupportedError for fields that no block here can express.
        correct: changes the keyword arguments that the converter made for the backbone.
        finish: changes the built backbone.
        complete: returns the config with the values that transformers would fill in.
        converts_as: the `model_type` that the converter knows, if not the config's own.
        takes_dtype: True if the backbone hands its dtype on to its layers; if not, a global policy sets theirs.
        quantisations: quantisation methods of checkpoints that are dequantised as they are read.
        limits: raises UnsupportedError for fields that KerasHub's block cannot express and `general` can.
        general: describes the decoder of ours that computes what KerasHub cannot; None if there is none.
        prepare: changes the causal LM that `task` builds.
        tensor: the name in a text model's checkpoint of a tensor that the converter asks for; None if there is none.
    """

    converter: str = ""
    causal_lm: str = ""
    check: Callable[[Mapping], None] = lambda config: None
    correct: Callable[[Mapping, dict], None] = lambda config, kwargs: None
    finish: Callable[[Mapping, Any], None] = lambda config, backbone: None
    complete: Callable[[Mapping], dict] = _as_it_is
    converts_as: str | None = None
    takes_dtype: bool = True
    quantisations: tuple[str, ...] = ()
    limits: Callable[[Mapping], None] = lambda config: None
    general: Callable[[Mapping], Description] | None = None
    prepare: Callable[[Any], None] = lambda model: None
    tensor: Callable[[str], str | None] = lambda name: name

    def described(self, config: Mapping) -> Description | None:
        """Describe the decoder of ours that computes a completed config; None if KerasHub's block computes it.

        Raises:
            UnsupportedError: neither can.
        """
        if self.general is None:
            self.limits(config)
            return None
        if self.converter:
            try:
                self.limits(config)
                return None
            except UnsupportedError:
                pass
        return self.general(config)

    def build(self, config: Mapping, dtype_policy):
        """Build the backbone that a checked config describes.

        Raises:
            UnsupportedError: the config lacks a field that the converter reads.
        """
        config = completed(self, config)
        with fields_needed(config):
            description = self.described(config)
        if description is not None:
            from kithara_ray.model.decoder.backbone import DecoderBackbone

            return DecoderBackbone(description, dtype=dtype_policy)
        converter = keras_compat.converter_of(self.converter)
        with fields_needed(config):
            kwargs = converter.convert_backbone_config(self.for_converter(config))
            self.correct(config, kwargs)
        if self.takes_dtype:
            backbone = converter.backbone_cls(**kwargs, dtype=dtype_policy)
        else:
            with _global_policy(dtype_policy):
                backbone = converter.backbone_cls(**kwargs)
        self.finish(config, backbone)
        return backbone

    def task(self, backbone):
        """Build the causal LM around a backbone from `build`."""
        import keras_hub

        from kithara_ray.model.decoder.backbone import DecoderBackbone, DecoderCausalLM

        own = isinstance(backbone, DecoderBackbone)
        made = DecoderCausalLM if own else getattr(keras_hub.models, self.causal_lm)
        model = made(backbone=backbone, preprocessor=None)
        self.prepare(model)
        return model

    def for_converter(self, config: Mapping) -> dict:
        """The config of a text model as KerasHub's converter reads it."""
        return dict(config) | ({"model_type": self.converts_as} if self.converts_as else {})


# Fields that change transformers' computation only while it trains. Here they are off: no block reads them.
_TRAINING_ONLY = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "residual_dropout",
    "embedding_dropout", "router_jitter_noise", "output_router_logits",
)  # fmt: skip


def training_note(config: Mapping) -> str | None:
    """A note for the user about fields with which transformers would train otherwise; None if there are none."""
    used = [f"{field}={config[field]!r}" for field in _TRAINING_ONLY if config.get(field)]
    if not used:
        return None
    return (
        f"config.json: {', '.join(used)}: off in training here, as in inference. The base's own dropout and losses "
        "of its routers are not computed; lora_dropout drops inputs of the factors"
    )


def completed(family: Family, config: Mapping) -> dict:
    """Fill in the config's defaults, and put its rope settings where transformers 5 and the converters have them.

    Fields that only training would read are off.
    """
    whole = family.complete(config)
    whole |= {field: type(whole[field])() for field in _TRAINING_ONLY if whole.get(field)}
    if "num_attention_heads" in whole and whole.get("num_key_value_heads", 1) is None:
        whole["num_key_value_heads"] = whole["num_attention_heads"]
    rope = rope_of(whole)
    former = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    return {field: value for field, value in whole.items() if field not in former} | {"rope_parameters": rope}


@contextlib.contextmanager
def fields_needed(config: Mapping) -> Iterator[None]:
    """Refuse a config that lacks a field read in this context, by name, or has a malformed one, with the cause."""
    try:
        yield
    except KeyError as error:
        raise UnsupportedError(
            f"config.json: this {config['model_type']} model has no field {error}; "
            "write it anew with transformers' save_pretrained"
        ) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, KitharaRayError):
            raise
        raise UnsupportedError(
            f"config.json: a field of this {config['model_type']} model is not what it should be ({error}); "
            "write it anew with transformers' save_pretrained"
        ) from error


@contextlib.contextmanager
def _global_policy(dtype_policy) -> Iterator[None]:
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype_policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


# --- checks ----------------------------------------------------------------------------------------------------------


_MOST_LAYERS = 10_000  # a number that is no typing error; the models of today have up to 128


def refuse(config: Mapping, field: str, why: str) -> None:
    raise UnsupportedError(f"config.json: {field}={config.get(field)!r} of this {config['model_type']} model: {why}")


def check_causal(config: Mapping) -> None:
    """Refuse attention that looks ahead. transformers' masks read this field of a whole config.json; no class has it.

    transformers reads null as false, except in some models and attention implementations that do not look at it.
    """
    why = "each token would see all others; only causal models are trained here"
    if config.get("is_causal", True) is not True:
        refuse(config, "is_causal", why)
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("is_causal", True) is not True:
        refuse({**text, "model_type": config.get("model_type")}, "is_causal", f"in text_config, {why}")


def check_sizes(config: Mapping) -> None:
    """Refuse a size that is no count, before it is computed with."""
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        size = config.get(field, 1)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
            refuse(config, field, "expected a whole number above 0")
    if config.get("num_hidden_layers", 1) > _MOST_LAYERS:
        refuse(config, "num_hidden_layers", f"no model has more than {_MOST_LAYERS:,}")


def expect(config: Mapping, **allowed: tuple) -> None:
    """Refuse fields whose value changes the mathematics in a way that KerasHub does not know."""
    for field, values in allowed.items():
        if field in config and config[field] not in values:
            refuse(config, field, f"KerasHub computes it as {values[0]!r} only")


def rope_of(config: Mapping) -> dict:
    """The rope settings under either of transformers' names for them; by layer type for gemma3.

    The former name goes before the present one, as in transformers.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "full_attention" in rope:
        return rope
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] == "mrope":
        # A text's positions are the same in all three directions, and so is the rotation.
        rope["rope_type"] = "default"
    original = "original_max_position_embeddings"
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        if config.get(original) is not None:
            rope[original] = config[original]
        elif config.get("max_position_embeddings") is not None:
            rope.setdefault(original, config["max_position_embeddings"])
    return rope


def check_rope_type(config: Mapping, *types: str) -> None:
    rope, family = rope_of(config), config["model_type"]
    if rope["rope_type"] not in types:
        refuse(config, "rope_parameters", f"rope type {rope['rope_type']!r} is dropped by KerasHub's {family}")


def check_rope(config: Mapping, *types: str) -> None:
    check_rope_type(config, *types)
    rope = rope_of(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(config, "rope_parameters", "KerasHub rotates all of a head's width")


def check_derived_head_dim(config: Mapping) -> None:
    head_dim, family = config.get("head_dim"), config["model_type"]
    if head_dim is not None and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        refuse(config, "head_dim", f"KerasHub's {family} derives head_dim as hidden_size / num_attention_heads")


def check_no_window(config: Mapping) -> None:
    """Refuse a sliding window on some of the blocks only: KerasHub puts it on all blocks or on none.

    Without `layer_types`, the window begins at block `max_window_layers`, as in transformers.
    """
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return
    kinds = config.get("layer_types")
    begins = config.get("max_window_layers", 0) < config["num_hidden_layers"]
    if begins if kinds is None else "sliding_attention" in kinds:
        refuse(config, "use_sliding_window", "KerasHub has no sliding window on a part of the blocks")

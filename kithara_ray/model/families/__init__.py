"""Corrections, family by family, that KerasHub needs to compute what Hugging Face's config says.

A family is listed here once its parity test (tests/model/test_parity.py) is in the suite. Every other family is refused
by name before a weight is read. KerasHub's converters drop fields silently, and a silently wrong model is worse than
none.
"""

from collections.abc import Mapping

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.tower import text_of
from kithara_ray.model.families import decoder_mixtures, decoders, gemma, gemma4, gpt_oss, llama, moe, qwen3_5
from kithara_ray.model.families.family import Family, check_causal, check_sizes, completed, fields_needed, refuse
from kithara_ray.model.families.refused import why_refused

FAMILIES: dict[str, Family] = (
    llama.FAMILIES
    | gemma.FAMILIES
    | gemma4.FAMILIES
    | moe.FAMILIES
    | gpt_oss.FAMILIES
    | decoders.FAMILIES
    | decoder_mixtures.FAMILIES
    | qwen3_5.FAMILIES
)
# How an error ends where the table of families is not at hand.
LISTED = ". `kithara-ray models` lists the families"


def family_of(config: Mapping) -> Family:
    """Look up the family of a Hugging Face config and check the config's fields; of a wrapper, the text model's family.

    Raises:
        UnsupportedError: an unknown `model_type`, or a field that KerasHub cannot express.
    """
    whole_model, of_all, config = config, config.get("model_type"), text_of(config)
    model_type = model_type_of(config)
    if model_type not in FAMILIES:
        given = config.get("model_type")
        loaded = "" if model_type == given else f" with layer_types, which transformers loads as {model_type!r},"
        raise UnsupportedError(
            f"config.json: model_type={given!r}{loaded} is not supported: {why_refused(config)}{LISTED}"
        )
    family = FAMILIES[model_type]
    quantised = config.get("quantization_config")
    quantisation = str(quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised)
    if quantised and quantisation not in family.quantisations:
        raise UnsupportedError(
            f"config.json: a base quantised by {quantisation!r} (quantization_config) cannot be trained or merged; "
            "use the unquantised checkpoint. It would take dequantising its tensors as they are read"
        )
    check_causal(whole_model)
    check_sizes(config)
    with fields_needed(config):
        whole = completed(family, config)
        family.check(whole)
        family.described(whole)
    if of_all == "gemma3" and config.get("final_logit_softcapping") is not None:
        refuse(config, "final_logit_softcapping", "transformers applies it in the text model alone, not in gemma3")
    return family


def model_type_of(config: Mapping) -> str | None:
    """Return the `model_type` as which transformers loads a config.json; None if it has none.

    A mistral whose config.json has `layer_types`, even null, is loaded as ministral, whose blocks differ.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    return "ministral" if model_type == "mistral" and "layer_types" in config else model_type

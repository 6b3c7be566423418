"""Corrections, family by family, that KerasHub needs to compute what Hugging Face's config says.

A family is listed here once its parity test (tests/model/test_parity.py) is in the suite. Every other family is refused
by name before a weight is read. KerasHub's converters drop fields silently, and a silently wrong model is worse than
none.
"""

from collections.abc import Mapping

from kithara_ray.errors import UnsupportedError
from kithara_ray.model.families import gemma, gemma4, gpt_oss, llama, moe
from kithara_ray.model.families.family import Family, completed, fields_needed

FAMILIES: dict[str, Family] = llama.FAMILIES | gemma.FAMILIES | gemma4.FAMILIES | moe.FAMILIES | gpt_oss.FAMILIES

_REFUSED = {
    "gemma4": "it reads images; take a checkpoint of its text model, gemma4_text",
    "gemma3": "it reads images; take a checkpoint of its text model, gemma3_text",
    "phi3": "KerasHub has no converter for it",
}


def family_of(config: Mapping) -> Family:
    """Look up the family of a Hugging Face config and check the config's fields.

    Raises:
        UnsupportedError: an unknown `model_type`, or a field that KerasHub cannot express.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type={model_type!r} is not supported{_reason(model_type)}; supported are "
            f"{', '.join(sorted(FAMILIES))} (a family is added with a test that its logits equal transformers')"
        )
    family = FAMILIES[model_type]
    quantised = config.get("quantization_config")
    quantisation = str(quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised)
    if quantised and quantisation not in family.quantisations:
        raise UnsupportedError(
            f"config.json: a base quantised by {quantisation!r} cannot be trained or merged; "
            "use the unquantised checkpoint"
        )
    with fields_needed(config):
        family.check(completed(family, config))
    return family


def _reason(model_type: str | None) -> str:
    return f": {_REFUSED[model_type]}" if isinstance(model_type, str) and model_type in _REFUSED else ""

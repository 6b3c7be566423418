"""One batch through a model here and in transformers."""

import jax
import numpy as np
import torch
from tiny import PARAMETERS, TARGETS, VOCABULARY, model_type

from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.model.lora.targets import of_text_model
from kithara_ray.sharding.mesh import batch_sharding, make_mesh

LORA = {
    family: of_text_model(
        LoraConfig(r=4, lora_alpha=12, target_modules=targets, target_parameters=PARAMETERS.get(family, ())),
        {"model_type": model_type(family)},
    )
    for family, targets in TARGETS.items()
}
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (4, 24)).astype(np.int32)
# The last row is padded, as a batch's rows are.
SEGMENTS = np.ones_like(TOKENS)
SEGMENTS[3, 15:] = 0


def adapter_of(model, seed=1):
    """Random factors. Those of experts are smaller: they are in every path of a token, and amplify float32's noise."""
    rng, shapes = np.random.default_rng(seed), model.adapter_shapes
    deviations = {name: 0.1 if ".experts." in name else 0.2 for name in shapes}
    return {name: rng.normal(0, deviations[name], shape).astype(np.float32) for name, shape in shapes.items()}


def logits(directory, adapter=None, **options):
    base = BaseCheckpoint.open(directory)
    mesh = make_mesh(options.pop("mesh", None))
    lora = LORA[base.config["model_type"]] if adapter is not None else None
    model = build(base.config, lora, mesh, "float32", **options)
    factors = model.place_factors(adapter) if adapter is not None else {}
    place = lambda array: jax.device_put(array, batch_sharding(mesh))  # noqa: E731
    return np.asarray(jax.jit(model.logits_BTV)(factors, model.load(base), place(TOKENS), place(SEGMENTS)))


def reference(model, tokens=TOKENS, segments=SEGMENTS):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(segments).long()).logits.numpy()


def assert_equal(ours, theirs, atol):
    """On real tokens; what padding computes is nobody's."""
    real = SEGMENTS.astype(bool)
    np.testing.assert_allclose(ours[real], theirs[real], atol=atol, rtol=0)


def factors_of(peft_model):
    """PEFT's factors by their names here: PEFT wraps experts first for their gate_up_proj, then for their down_proj."""
    named = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            name = name.replace("experts.base_layer.", "experts.gate_up_proj.")
            named[name.replace("experts.lora_", "experts.down_proj.lora_")] = parameter
    return named


def by_name(model, arrays):
    """Trained arrays by adapter tensor name, stacked ones taken apart."""
    tensors = {}
    for slot in model.factor_slots:
        whole = np.asarray(arrays[slot.key])
        tensors |= dict(zip(slot.names, whole if slot.stacked else [whole], strict=True))
    return tensors


def assert_close_as_one(ours, theirs):
    """1e-5 as one vector; one tensor's own gradient can be a small difference of large terms."""
    assert ours.keys() == theirs.keys()
    norms = {name: np.linalg.norm(tensor) for name, tensor in theirs.items()}
    errors = {name: np.linalg.norm(ours[name] - tensor) for name, tensor in theirs.items()}
    assert all(norms.values())
    assert np.hypot.reduce(list(errors.values())) < 1e-5 * np.hypot.reduce(list(norms.values()))
    assert all(errors[name] < 1e-4 * norms[name] for name in norms)

"""The step of every family against torch and PEFT in float64, each sample alone: packed rows, scanned, in chunks of
blocks, of logits and of recurrent states, weights split."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from double import in_float64
from parity import LORA, adapter_of, assert_close_as_one, by_name, factors_of
from peft import PeftModel
from sizes import SIZES, VOCABULARY
from tiny import SHORT_FAMILIES, load, mostly_long, with_mild_attention

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.blocks import exchange
from kithara_ray.model.causal_lm import build
from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.batches.collate import collate
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train import loss as loss_module
from kithara_ray.train import step

pytestmark = pytest.mark.usefixtures("hastily")

# Lengths of the samples of each pack. A device has one: three chunks, whose borders are inside samples and at their
# ends; a sample longer than windows and chunks; padding.
PACKS = ([9, 8, 7], [24], [13, 4], [3, 11, 2])
T = K = 24


def sample(rng, length):
    """A row of which some tokens are trained, and never the first."""
    return TokenizedRow(
        rng.integers(3, VOCABULARY, length).astype(np.int32),
        np.append(0, rng.random(length - 1) < 0.7).astype(np.uint8),
    )


_RNG = np.random.default_rng(3)
SAMPLES = [[sample(_RNG, length) for length in lengths] for lengths in PACKS]


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 1)
    monkeypatch.setattr(loss_module, "_DEVICE_LOGITS", 1)
    monkeypatch.setattr("kithara_ray.model.options._CHUNK_TOKENS", 8)
    monkeypatch.setattr("kithara_ray.model.options._EXPERT_TOKENS", 1)
    monkeypatch.setattr("kithara_ray.model.blocks.delta_rule._CHUNK", 8)


# Mixtures that are trained with their routers' auxiliary loss too.
BALANCED = {"gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}
AUX_COEF = 0.5


@dataclass(frozen=True)
class Case:
    """A model and an adapter, and what torch computes with them.

    Attributes:
        gradients: by adapter tensor name.
        routed: the routers' auxiliary loss and the tokens of each expert, (L, E), of a mixture in BALANCED.
    """

    directory: Path
    adapter: dict[str, np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]
    routed: tuple[float, np.ndarray] | None


@pytest.fixture(scope="module")
def cases(tiny_models, tmp_path_factory):
    """family -> its case, made when first asked for."""

    class Cases(dict):
        def __missing__(self, family):
            place = tmp_path_factory.mktemp("gradients")
            directory = with_mild_attention(tiny_models[family], place / "model")
            model = build(BaseCheckpoint.open(directory).config, LORA[family], make_mesh(), "float32")
            # Small enough that float32's own noise stays below what is asserted.
            adapter = {name: tensor / 4 for name, tensor in adapter_of(model).items()}
            Adapter(LORA[family], adapter).write(place / "adapter", str(directory))
            self[family] = by_torch(directory, adapter, place / "adapter", balanced=family in BALANCED)
            return self[family]

    return Cases()


def by_torch(directory, adapter, adapter_directory, balanced):
    """In float64, of each sample alone; the auxiliary loss is of all samples' tokens."""
    base = load(directory, experts_implementation="eager")
    model = PeftModel.from_pretrained(base, adapter_directory, is_trainable=True).double().eval()
    samples = [row for pack in SAMPLES for row in pack]
    count, loss, scores, routed = sum(int(row.loss_mask.sum()) for row in samples), 0.0, [], None
    with in_float64():
        for row in samples:
            ids = torch.tensor(row.token_ids).long()
            out = model(ids[None], **({"output_router_logits": True} if balanced else {}))
            each = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")
            loss = loss + (each * torch.tensor(row.loss_mask[1:])).sum() / count
            if balanced:
                scores.append(out.router_logits)
        whole = loss
        if balanced:
            scores = [torch.cat(of_a_layer) for of_a_layer in zip(*scores, strict=True)]
            experts, chosen = scores[0].shape[-1], base.config.get_text_config().num_experts_per_tok
            aux = sys.modules[type(base).__module__].load_balancing_loss_func(tuple(scores), experts, chosen)
            tokens = [torch.bincount(each.topk(chosen).indices.flatten(), minlength=experts) for each in scores]
            routed, whole = (aux.item(), torch.stack(tokens).numpy()), loss + AUX_COEF * aux
        whole.backward()
    gradients = {name: factor.grad.numpy() for name, factor in factors_of(model).items()}
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype("float64")}
    return Case(directory, adapter, loss.item(), gradients, routed)


@pytest.mark.parametrize("family", mostly_long(SHORT_FAMILIES, SIZES))
def test_loss_and_gradients_of_packed_samples(family, cases):
    assert_gradients(family, cases)


ROUTED = ["gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("mesh", [MeshShape(fsdp=4), MeshShape(fsdp=2, tensor=2)])
@pytest.mark.parametrize("family", mostly_long([], ROUTED))
def test_gradients_through_the_chosen_experts(family, mesh, cases):
    """With the routers' auxiliary loss, which takes part in them."""
    assert_gradients(family, cases, mesh, routed=True)


EXPERTS_APART = {
    "qwen3_moe": MeshShape(fsdp=1, expert=4),
    "qwen2_moe": MeshShape(fsdp=2, expert=2),
    "gpt_oss": MeshShape(fsdp=1, expert=2, tensor=2),
}


@pytest.mark.long
@pytest.mark.parametrize("family", EXPERTS_APART)
def test_gradients_where_tokens_are_sent_to_their_experts(family, cases, monkeypatch):
    """In as many rounds as the fullest device needs; a round has room for few more rows than an even choice."""
    monkeypatch.setattr(exchange, "_ROWS_MULTIPLE", 1)
    assert_gradients(family, cases, EXPERTS_APART[family])


def assert_gradients(family, cases, mesh=None, **options):
    case, mesh = cases[family], make_mesh(mesh)
    base = BaseCheckpoint.open(case.directory)
    if case.routed:
        options["router_aux_loss_coef"] = AUX_COEF
    model = build(base.config, LORA[family], mesh, "float32", **options)
    packed = collate(SAMPLES, T, K, pad_id=2)
    batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in packed.items()}
    compute = jax.jit(partial(step.losses_and_gradients, model))
    loss, told, gradients = compute(model.place_factors(case.adapter), model.load(base), batch)
    assert float(loss) == pytest.approx(case.loss, rel=1e-6)
    assert_close_as_one(by_name(model, gradients), case.gradients)
    if case.routed:
        aux, tokens = case.routed
        assert float(told["aux"]) == pytest.approx(aux, rel=1e-6)
        np.testing.assert_array_equal(told["counts"], tokens)

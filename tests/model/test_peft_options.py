"""Every option of PEFT against PEFT: logits, gradients of a step in float64, and the adapter's files, of random
factors."""

import re
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
from tiny import VOCABULARY, mostly_long, with_mild_attention
from transformers import AutoModelForCausalLM

from kithara_ray import KerasHubModel
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.beside import tensor_of
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.resizing.tables import resized
from kithara_ray.model.causal_lm import build
from kithara_ray.model.weights.quantized import NF4
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train.step import loss_and_gradients

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (4, 20)).astype(np.int32)
# With rows for these five tokens, whose ids are beyond the bases' vocabularies.
ROWS = VOCABULARY + 5
WITH_ADDED = TOKENS.copy()
WITH_ADDED[:, 1::3] = np.random.default_rng(3).integers(VOCABULARY, ROWS, WITH_ADDED[:, 1::3].shape)
SEEN = [int(token) for token in TOKENS[0, [9, 4, 16]]]
APART = {"embed_tokens": SEEN, "lm_head": SEEN[:0:-1]}
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.[12]\..*down_proj": 8},
    "alpha_pattern": {"down_proj": 3},
}
# With "quantize", ours is of the base as integers, and PEFT's of a base in floats that says the same.
# qwen2 has biases; kernels of llama, qwen2 and gemma2 have their dims in different orders.
OPTIONS = {
    "LoRA": ("qwen2", dict(target_modules=LINEAR)),
    "rsLoRA, dropout evaluated": ("llama", dict(use_rslora=True, lora_dropout=0.5)),
    "patterns, dotted endings": (
        "llama",
        dict(target_modules=("q_proj", "1.self_attn.k_proj", "down_proj"), **PATTERNS),
    ),
    "some layers": ("llama", dict(target_modules=LINEAR, layers_to_transform=[0, 2], layers_pattern="layers")),
    # Of five blocks in pairs the last stands behind the scan.
    "the last layer": ("gemma2", dict(layers_to_transform=4, exclude_modules=["v_proj"])),
    "all but": ("gemma2", dict(target_modules=LINEAR, exclude_modules=r".*\.(0|3)\..*|.*\.1\.mlp.*")),
    "DoRA of some layers": ("llama", dict(use_dora=True, layers_to_transform=1)),
    "DoRA": ("qwen2", dict(use_dora=True, target_modules=LINEAR)),
    "DoRA, rsLoRA, patterns": ("gemma2", dict(use_dora=True, use_rslora=True, target_modules=LINEAR, **PATTERNS)),
    "biases": ("qwen2", dict(bias="all", target_modules=("q_proj", "up_proj"))),
    "biases of some": (
        "qwen2",
        dict(bias="lora_only", lora_bias=True, target_modules=LINEAR, layers_to_transform=[0, 2]),
    ),
    "a bias of B alone": ("llama", dict(lora_bias=True, use_rslora=True)),
    "DoRA beside a bias": ("qwen2", dict(use_dora=True, bias="lora_only", layers_to_transform=1)),
    "tokens, tied": ("gemma2", dict(trainable_token_indices=SEEN)),
    "tokens of both, int8": (
        "mistral",
        dict(trainable_token_indices={"embed_tokens": SEEN, "lm_head": SEEN[::-1]}, quantize="int8"),
    ),
    "int4": ("qwen2", dict(quantize="int4", target_modules=LINEAR)),
    "embedding, tied": ("llama", dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "embedding and head": ("mistral", dict(modules_to_save=["embed_tokens", "lm_head"], bias="lora_only")),
    "a head, tokens": ("mistral", dict(modules_to_save=["lm_head"], trainable_token_indices=SEEN)),
    "added tokens, tied": ("gemma2", dict(resize_token_embeddings=ROWS, trainable_token_indices=[ROWS - 1, 7])),
    "added tokens, whole": (
        "mistral",
        dict(resize_token_embeddings=ROWS, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "added tokens, a head": (
        "mistral",
        dict(resize_token_embeddings=ROWS, modules_to_save=["lm_head"], trainable_token_indices=[ROWS - 1, ROWS - 2]),
    ),
    "added tokens, factors": ("llama", dict(resize_token_embeddings=ROWS)),
    "DoRA on int8": ("gemma2", dict(quantize="int8", use_dora=True, lora_alpha=5)),
    "DoRA on nf4": ("gemma2", dict(quantize="nf4", use_dora=True, lora_alpha=5)),
}
BEGUN = [
    ("qwen2", dict(bias="all")),
    ("mistral", dict(modules_to_save=["lm_head"], trainable_token_indices=SEEN)),
]
MESHES = {"gemma2": MeshShape(fsdp=2, tensor=2), "mistral": MeshShape(fsdp=2, tensor=2)}

POSITIONS = np.tile(np.arange(6, 19, dtype=np.int32), (4, 1))


def batch_of(tokens):
    return {
        "token_ids": tokens,
        "segment_ids": np.ones_like(tokens),
        "target_positions": POSITIONS,
        "target_ids": np.take_along_axis(tokens, POSITIONS + 1, axis=1),
        "target_weights": (np.random.default_rng(1).random(POSITIONS.shape) < 0.7).astype(np.float32),
    }


BATCH = batch_of(TOKENS)


def random_adapter(shapes, magnitudes):
    """Factors that change the logits by much, small enough that float32's noise stays small.

    Magnitudes stand near the rows' norms, as training leaves them.
    """
    rng = np.random.default_rng(1)
    return {
        name: (
            rng.uniform(0.8, 1.2, shape) * magnitudes[name] if name in magnitudes else rng.normal(0, 0.1, shape)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def row_norms(base, shapes):
    """From the files' rows, in float64."""
    names = (name for name in shapes if name.endswith(".lora_magnitude_vector"))
    weight = lambda name: base.view(name.removesuffix(".lora_magnitude_vector") + ".weight")  # noqa: E731
    return {name: np.linalg.norm(weight(name).astype(np.float64), axis=1) for name in names}


def whole(model, factors):
    """Sharded, stacked arrays by the names of the adapter's tensors."""
    tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in model.adapter_shapes.items()}
    for shard in model.adapter_shards(factors, 0):
        tensors[shard.name][tuple(slice(*bounds) for bounds in shard.bounds)] = shard.data
    return tensors


def named(parameters):
    """PEFT's parameters, or their gradients, by the names of the adapter's tensors."""
    plain = lambda name: re.sub(r"\.modules_to_save(?=\.)|\.default\b", "", name.removeprefix("base_model.model."))  # noqa: E731
    names = {plain(name): parameter for name, parameter in parameters if parameter.requires_grad}
    return {n.removesuffix(".weight") if "magnitude" in n else n: p for n, p in names.items()}


def step_of_torch(model, tokens):
    """Logits and gradients of the mean loss over the trained tokens."""
    batch, logits = batch_of(tokens), model(torch.tensor(tokens).long()).logits
    picked = torch.gather(logits, 1, torch.tensor(POSITIONS).long()[..., None].expand(-1, -1, logits.shape[-1]))
    targets, weights = torch.tensor(batch["target_ids"]).long(), torch.tensor(batch["target_weights"])
    each = torch.nn.functional.cross_entropy(picked.flatten(0, 1), targets.reshape(-1), reduction="none")
    ((each * weights.reshape(-1)).sum() / weights.sum()).backward()
    return logits.detach().numpy(), {n: p.grad.numpy() for n, p in named(model.named_parameters()).items()}


def rounded(weight, kind, width):
    """Round a weight (rows, columns) by plain torch, to four bits in groups that divide each `width` columns."""
    if kind == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / scale).round() * scale
    group = max(size for size in range(2, 65, 2) if width % size == 0)
    groups = weight.reshape(-1, group)
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    if kind == "int4":
        scale = (largest / -8).bfloat16().float()
        return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)
    scale, levels = largest.abs().bfloat16().float(), torch.tensor(NF4)
    return (levels[((groups / scale)[..., None] - levels).abs().argmin(-1)] * scale).reshape(weight.shape)


def quantise(model, kind):
    """Round every linear layer's weight; an attention's output contracts heads one by one."""
    heads = model.config.num_attention_heads
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            width = module.in_features // (heads if name.endswith("o_proj") else 1)
            module.weight.data = rounded(module.weight.data, kind, width)


def in_float64(compute):
    """Call this with all that transformers' modules compute in float32 in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        return compute()


def loaded_by_peft(base, directory, quantize=None, rows=None, **options):
    plain = AutoModelForCausalLM.from_pretrained(base.directory, attn_implementation="eager")
    if rows:
        plain.resize_token_embeddings(rows)  # at random: the adapter's file has the values
    if quantize:
        quantise(plain, quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are warnings in peft
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        return peft.PeftModel.from_pretrained(plain, directory, **options)


def step_of_ours(model, mesh, tensors, frozen, tokens=TOKENS):
    """Logits and gradients of the same loss, by the names of the adapter's tensors."""
    batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in batch_of(tokens).items()}

    @jax.jit
    def compute(factors, frozen):
        logits = model.logits_BTV(factors, frozen, batch["token_ids"], batch["segment_ids"])
        return logits, loss_and_gradients(model, factors, frozen, batch)[1]

    logits, gradients = compute(model.place_factors(tensors), frozen)
    return np.asarray(logits), whole(model, gradients)


def assert_as_peft_s(ours, gradients, reference, tokens=TOKENS):
    reference.double()
    theirs, their_gradients = in_float64(lambda: step_of_torch(reference, tokens))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    with torch.no_grad(), reference.disable_adapter():
        plain = reference(torch.tensor(tokens).long()).logits.numpy()
    assert np.abs(ours - plain).max() > 0.1
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        norm = np.linalg.norm(gradient)
        assert norm > 1e-4, name
        assert np.linalg.norm(gradients[name] - gradient) < 1e-5 * norm, name


# One of each kind: patterns, magnitudes, biases, tokens, whole modules; the others are among the long tests.
SHORT = ["DoRA, rsLoRA, patterns", "biases of some", "tokens of both, int8", "int4", "embedding, tied", "some layers"]


@pytest.mark.parametrize("option", mostly_long(SHORT, OPTIONS))
def test_an_option_computes_and_trains_as_peft_s(option, tiny_models, tmp_path, monkeypatch):
    family, fields = OPTIONS[option]
    quantize = fields.get("quantize")
    fields = {name: value for name, value in fields.items() if name != "quantize"}
    rows = fields.get("resize_token_embeddings")
    tokens = WITH_ADDED if rows else TOKENS
    monkeypatch.setenv("KITHARA_RAY_CACHE", str(tmp_path / "cache"))
    base = BaseCheckpoint.open(with_mild_attention(tiny_models[family], tmp_path / "base"))
    mesh, config = make_mesh(MESHES.get(family)), LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
    big = resized(base, config)
    model = build(big.config, config, mesh, "float32", quantize=quantize)
    tensors = random_adapter(model.adapter_shapes, row_norms(base, model.adapter_shapes))
    adapter = Adapter(config, tensors)
    export(base, adapter, str(tmp_path / "out"), Layout.ADAPTER, base_name=str(base.directory))

    ours, gradients = step_of_ours(model, mesh, tensors, model.load(big), tokens)

    reference = loaded_by_peft(base, tmp_path / "out", quantize, rows, is_trainable=True)
    read = named(reference.named_parameters())
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name].detach().numpy(), tensor) for name, tensor in tensors.items())
    # In training mode, but for dropout, whose draws are torch's own.
    assert_as_peft_s(ours, gradients, reference.train(not config.lora_dropout), tokens)


def test_a_continued_adapter_of_peft_computes_and_trains_as_peft_s(tiny_models, tmp_path):
    """PEFT's own file, its targets a regular expression, taken by `from_preset(adapter=)`."""
    base, mesh = BaseCheckpoint.open(with_mild_attention(tiny_models["llama"], tmp_path / "base")), make_mesh()
    targets = r"model\.layers\.[12]\.(self_attn\.(q|o)|mlp\.down)_proj"
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True, init_lora_weights=False)
    torch.manual_seed(0)
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.directory), config)
    for name, parameter in named(made.named_parameters()).items():
        parameter.data *= torch.empty_like(parameter).uniform_(0.8, 1.2) if "magnitude" in name else 0.2
    made.save_pretrained(tmp_path / "peft")

    handle = KerasHubModel.from_preset(str(base.directory), adapter=str(tmp_path / "peft"), precision="float32")
    model = build(base.config, handle.lora, mesh, handle.precision)
    assert model.adapter_shapes.keys() == handle.adapter.keys()
    ours, gradients = step_of_ours(model, mesh, handle.adapter, model.load(base))
    assert_as_peft_s(ours, gradients, loaded_by_peft(base, tmp_path / "peft", is_trainable=True).train())


@pytest.mark.parametrize("selection", [dict(layers_to_transform=(1, 3)), dict(exclude_modules=r".*\.0\..*")], ids=str)
def test_blocks_without_a_target_stay_in_the_scan(selection, tiny_models):
    """Else each of them would be compiled by itself: gemma2's five blocks are pairs and one over, as without LoRA."""
    base = BaseCheckpoint.open(tiny_models["gemma2"])
    config = LoraConfig(r=4, **selection)
    model = build(base.config, config, make_mesh(), "float32")
    assert model.chain.periods == build(base.config, None, make_mesh(), "float32").chain.periods == (2,)
    assert {name.split(".")[2] for name in model.adapter_shapes} == {
        str(n) for n in range(5) if config.matches(f"model.layers.{n}.self_attn.q_proj")
    }
    assert not build(base.config, config, make_mesh(), "float32", scan=False).zeros


@pytest.mark.parametrize("options", [{}, {"stack_factors": False}, {"scan": False}], ids=str)
def test_first_magnitudes_are_the_rows_norms_and_change_nothing(options, tiny_models):
    base, mesh = BaseCheckpoint.open(tiny_models["gemma2"]), make_mesh()
    config = LoraConfig(r=4, use_dora=True, target_modules=LINEAR)
    model = build(base.config, config, mesh, "float32", **options)
    frozen = model.load(base)
    tensors = whole(model, model.initial_factors(0, frozen))
    norms = row_norms(base, model.adapter_shapes)
    assert len(norms) == len(LINEAR) * base.config["num_hidden_layers"]
    for name, norm in norms.items():
        np.testing.assert_allclose(tensors[name], norm, rtol=1e-6)
    if not options:
        place = [jax.device_put(BATCH[name], batch_sharding(mesh)) for name in ("token_ids", "segment_ids")]
        ours = jax.jit(model.logits_BTV)(model.initial_factors(0, frozen), frozen, *place)
        plain = build(base.config, None, mesh, "float32")
        np.testing.assert_allclose(ours, jax.jit(plain.logits_BTV)({}, frozen, *place), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"stack_factors": False}, {"scan": False}], ids=str)
@pytest.mark.parametrize(("family", "fields"), BEGUN, ids=[family for family, _ in BEGUN])
def test_weights_of_the_base_begin_as_they_are_and_change_nothing(family, fields, options, tiny_models):
    base, mesh = BaseCheckpoint.open(tiny_models[family]), make_mesh(MESHES.get(family))
    model = build(base.config, LoraConfig(r=4, **fields), mesh, "float32", **options)
    frozen = model.load(base)
    first = model.initial_factors(0, frozen)
    tensors, counted = whole(model, first), 0
    for name, tensor in tensors.items():
        if "lora_" not in name:
            view = base.view(tensor_of(name))
            np.testing.assert_array_equal(tensor, view if name == tensor_of(name) or "bias" in name else view[SEEN])
            counted += 1
    assert counted == {"qwen2": 9, "mistral": 2}[family]
    assert sum(array.size for array in first.values()) == sum(tensor.size for tensor in tensors.values())
    for name, abstract in model.abstract_params().items():
        assert (abstract.shape, abstract.sharding) == (first[name].shape, first[name].sharding), name
    if not options:
        place = [jax.device_put(BATCH[name], batch_sharding(mesh)) for name in ("token_ids", "segment_ids")]
        plain = build(base.config, None, mesh, "float32")
        expected = jax.jit(plain.logits_BTV)({}, plain.load(base), *place)
        np.testing.assert_allclose(jax.jit(model.logits_BTV)(first, frozen, *place), expected, atol=1e-5)


def test_dropout_before_the_magnitude_is_peft_s(tiny_models, tmp_path):
    """With DoRA the dropped input goes through the kernel too. One layer, both libraries dropping the same elements."""
    base, mesh = BaseCheckpoint.open(tiny_models["qwen2"]), make_mesh(devices=jax.devices()[:1])
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=0.4, target_modules=("0.self_attn.q_proj",))
    model = build(base.config, config, mesh, "float32", scan=False)
    tensors = random_adapter(model.adapter_shapes, row_norms(base, model.adapter_shapes))
    Adapter(config, tensors).write(tmp_path, str(base.directory))
    from kithara_ray.model.blocks import dropout
    from kithara_ray.model.lora import layers

    x = np.random.default_rng(2).normal(size=(3, 7, 64)).astype(np.float32)
    (layer,) = {id(slot.layers[0]): slot.layers[0] for slot in model.factor_slots}.values()
    factors, frozen = model.place_factors(tensors), model.load(base)
    with model.bind(factors, frozen, unstack=True), dropout.dropping(jax.random.key(0)):
        kept = np.asarray(layers.dropped(x, 0.4, layer.lora_number))
        ours = np.asarray(layer(x))
    reference = loaded_by_peft(base, tmp_path).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    reference.lora_dropout["default"].forward = lambda _: torch.tensor(kept)
    with torch.no_grad():
        theirs = reference.train()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=2e-5)
    with torch.no_grad():
        assert np.abs(reference.eval()(torch.tensor(x)).numpy() - theirs).max() > 0.1

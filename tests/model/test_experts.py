"""The chosen experts' results: routed, dense and one token at a time give the same, however uneven the choice."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import LORA, SEGMENTS, TOKENS, adapter_of, assert_close_as_one, assert_equal, by_name, reference
from tiny import MIXTURES, mostly_long
from transformers import AutoModelForCausalLM

from kithara_ray.errors import ConfigError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.blocks import exchange, experts
from kithara_ray.model.blocks.experts import Choice, Factors, Kernels, SidePaths
from kithara_ray.model.blocks.mixtures import gated
from kithara_ray.model.causal_lm import build
from kithara_ray.model.options import chunk_length
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape

B, T, D, E, K, WIDTH, L, SCALE = 4, 6, 8, 8, 2, 12, 3, 0.5
# With the layouts that are computed on each.
MESHES = {
    "1x4": (MeshShape(fsdp=4), ["halves", "plain"]),
    "2x2": (MeshShape(data=2, fsdp=2), ["apart"]),
    "split inside": (MeshShape(fsdp=2, tensor=2), ["apart", "halves", "turns"]),
    "experts apart": (MeshShape(fsdp=1, expert=4), ["halves"]),
    "two by two experts": (MeshShape(fsdp=2, expert=2), ["apart"]),
    "experts split inside": (MeshShape(fsdp=1, expert=2, tensor=2), ["halves", "turns"]),
}
# The kernels' gradients are compared on these as well; the others do not need the ones that `grouped` computes.
WITH_KERNELS = {"two by two experts", "experts split inside"}
# One row is padded at its end, and one is nothing else.
REAL = np.ones((B, T), np.int32)
REAL[1, 4:], REAL[2] = 0, 0


def random(rng, *shape):
    return rng.normal(0, 0.5, shape).astype(np.float32)


def choices(rng) -> dict[str, np.ndarray]:
    """Experts of each token: at random, all of one pair, and with experts that nobody chooses."""
    some = np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)
    few = np.where(rng.random((B, T, 1)) < 0.8, [3, 0], [0, 4])
    return {"random": some, "one pair": np.broadcast_to([4, 1], some.shape), "three of eight": few}


def lora(rng) -> dict[str, np.ndarray]:
    """PEFT's A and B of gate and up projection, and of the last product's matrices."""
    shapes = {"wide_A": (E * L, D), "wide_B": (2 * WIDTH, L * E), "down_A": (E * L, WIDTH), "down_B": (D, L * E)}
    return {name: random(rng, *shape) for name, shape in shapes.items()}


# The same for all layouts; each takes the rows of `wide_B` in its own order.
LORA_ARRAYS = lora(np.random.default_rng(7))
SIDE_PATHS = SidePaths(
    *(Factors.of(LORA_ARRAYS[f"{name}_A"], LORA_ARRAYS[f"{name}_B"], E, SCALE) for name in ("wide", "down"))
)


def added(name: str, expert: int, x: np.ndarray) -> np.ndarray:
    """An expert's update of a product, float64: rows expert * L.. of A, every E-th column of B."""
    a, b = LORA_ARRAYS[f"{name}_A"], LORA_ARRAYS[f"{name}_B"]
    return SCALE * b[:, expert::E].astype(float) @ (a[expert * L : (expert + 1) * L].astype(float) @ x)


def layouts(rng) -> dict[str, Kernels]:
    """Gate and up projection apart, in halves of one matrix, and column by column with biases; with LoRA's factors."""
    gate, up, down = random(rng, E, D, WIDTH), random(rng, E, D, WIDTH), random(rng, E, WIDTH, D)
    inner = gated(jax.nn.silu)
    turns = np.stack([gate, up], axis=-1).reshape(E, D, 2 * WIDTH)
    biases = dict(wide_biases=(random(rng, E, 2 * WIDTH),), down_bias_ED=random(rng, E, D), factors=SIDE_PATHS)
    return {
        "apart": Kernels((gate, up), down, inner, factors=SIDE_PATHS),
        "halves": Kernels((np.concatenate([gate, up], -1),), down, inner, in_halves=True, factors=SIDE_PATHS),
        "plain": Kernels((gate, up), down, inner),
        "turns": Kernels((turns,), down, lambda both: inner(both[..., ::2], both[..., 1::2]), **biases),
    }


def one_by_one(x, choice, factors, kernels):
    """The sum over a token's experts in float64, with gate and up projection taken apart by hand."""
    out = np.zeros(x.shape)
    for place in np.ndindex(B, T):
        for expert, factor in zip(choice[place], factors[place], strict=True):
            wide = [x[place].astype(float) @ kernel[expert] for kernel in kernels.wide]
            if kernels.factors.wide is not None:
                more = np.split(added("wide", expert, x[place]), len(wide))
                wide = [product + own for product, own in zip(wide, more, strict=True)]
            if kernels.wide_biases:
                wide = [wide[0] + kernels.wide_biases[0][expert]]
            if len(wide) == 1:
                wide = [wide[0][:WIDTH], wide[0][WIDTH:]] if kernels.in_halves else [wide[0][::2], wide[0][1::2]]
            gate, up = wide
            inner = gate / (1 + np.exp(-gate)) * up
            result = inner @ kernels.down_EID[expert].astype(float)
            if kernels.factors.down is not None:
                result = result + added("down", expert, inner)
            out[place] += factor * (result + (0 if kernels.down_bias_ED is None else kernels.down_bias_ED[expert]))
    return out


def undefined(x_RX, rows_R):
    """The array with not-a-numbers where no group has rows, as a TPU may leave anything there."""
    return jnp.where((jnp.arange(len(x_RX)) < rows_R)[:, None], x_RX, jnp.nan)


@jax.custom_vjp
def grouped(x_RX, kernel_EXY, order):
    return undefined(jax.lax.ragged_dot(x_RX, kernel_EXY, order.counts_E), jnp.sum(order.counts_E))


def grouped_backward(residuals, grad_RY):
    kernel_EXY, order = residuals
    back = jax.lax.ragged_dot(grad_RY, jnp.swapaxes(kernel_EXY, 1, 2), order.counts_E)
    return undefined(back, jnp.sum(order.counts_E)), None, None


grouped.defvjp(lambda *args: (grouped(*args), args[1:]), grouped_backward)


@pytest.mark.parametrize("mesh", MESHES)
def test_routed_and_dense_are_the_sum_over_each_token_s_experts(mesh, monkeypatch):
    """Whatever the products leave in rows of padding, nothing of it is seen. Devices exchange rows in 1 to 3 rounds."""
    monkeypatch.setattr(exchange, "_ROWS_MULTIPLE", 1)
    # The gradient of the tokens is a sum over devices where the mesh splits experts inside.
    if "split inside" not in mesh and mesh not in WITH_KERNELS:
        monkeypatch.setattr(experts, "_grouped", grouped)
    wanted_of = (0, 1, 3, 4) if mesh in WITH_KERNELS else (0, 1)
    rng = np.random.default_rng(2)
    x, factors, weight = random(rng, B, T, D), rng.random((B, T, K)).astype(np.float32), random(rng, B, T, D)
    shape, names = MESHES[mesh]
    real, devices = REAL.astype(bool), make_mesh(shape)
    routed = partial(experts.routed, mesh=devices)
    for layout, kernels in ((name, layouts(rng)[name]) for name in names):

        def both(x, factors, chosen, wide, down, kernels=kernels):
            """Outputs, and gradients of what real tokens get."""

            def loss(compute, x, factors, chosen, wide, down):
                given = dataclasses.replace(kernels, wide=wide, down_EID=down)
                out = compute(x, Choice(chosen, factors), given)
                return jnp.sum(jnp.where(REAL[..., None] != 0, out * weight, 0)), out

            with experts.padded(jnp.asarray(REAL)):
                return [
                    jax.value_and_grad(partial(loss, compute), wanted_of, has_aux=True)(x, factors, chosen, wide, down)
                    for compute in (routed, experts.dense)
                ]

        program = jax.jit(both)
        for name, chosen in choices(rng).items():
            placed = [jax.device_put(array, batch_sharding(devices)) for array in (x, factors, chosen.astype(np.int32))]
            ((_, ours), grads), ((_, plain), wanted) = program(*placed, kernels.wide, kernels.down_EID)
            told = f"{layout}, {name}"
            expected = one_by_one(x, chosen, factors, kernels)
            np.testing.assert_allclose(np.asarray(ours)[real], expected[real], atol=1e-5, err_msg=told)
            np.testing.assert_allclose(plain, expected, atol=1e-5, err_msg=told)
            for grad, want in zip(grads[:2], wanted[:2], strict=True):
                np.testing.assert_allclose(grad, want, atol=1e-5, err_msg=told)
                assert np.abs(np.asarray(want)[real]).max() > 0.01
                assert not np.asarray(grad)[~real].any()
            for grad, want in zip(jax.tree.leaves(grads[2:]), jax.tree.leaves(wanted[2:]), strict=True):
                np.testing.assert_allclose(grad, want, atol=1e-5, err_msg=told)


@pytest.mark.parametrize(("family", "found"), [("llama", "no experts"), ("mixtral", "5 experts a block")])
def test_an_axis_that_does_not_divide_the_experts_is_refused(family, found, tiny_models):
    base = BaseCheckpoint.open(tiny_models[family])
    with pytest.raises(ConfigError, match=f"mesh expert=2: the model has {found}; take a divisor"):
        build(base.config, LORA[family], make_mesh(MeshShape(fsdp=2, expert=2)), "float32")


def test_rows_are_in_the_order_of_experts_and_padding_is_in_no_group():
    rng = np.random.default_rng(3)
    chosen, real = choices(rng)["random"].reshape(-1, K), REAL.reshape(-1).astype(bool)
    order = experts._sorted(jnp.asarray(chosen), jnp.asarray(real), E)
    rows, counts = np.asarray(order.rows_R), np.asarray(order.counts_E)
    assert counts.tolist() == np.bincount(chosen[real].reshape(-1), minlength=E).tolist()
    assert sorted(rows) == list(range(B * T * K))
    wanted = np.repeat(np.arange(E), counts)
    assert (chosen.reshape(-1)[rows[: len(wanted)]] == wanted).all()
    assert not real[rows[len(wanted) :] // K].any()
    assert (rows[np.asarray(order.places_CK)] == np.arange(B * T * K).reshape(-1, K)).all()


FAMILIES = sorted({*MIXTURES, "gemma4 experts"})


def packed(segments: np.ndarray) -> np.ndarray:
    """Ten tokens of one sample, and then another, padded as before."""
    return np.where(np.arange(segments.shape[1]) < 10, 1, 2 * segments).astype(np.int32)


@pytest.mark.parametrize("family", mostly_long(["gpt_oss", "qwen3_moe"], FAMILIES))
def test_families_compute_the_chosen_experts_of_packed_rows_as_transformers_does(family, tiny_models, monkeypatch):
    """In three chunks, weights split both ways; each sample against transformers by itself."""
    monkeypatch.setattr("kithara_ray.model.options._CHUNK_TOKENS", 8)
    monkeypatch.setattr("kithara_ray.model.options._EXPERT_TOKENS", 1)
    base, mesh = BaseCheckpoint.open(tiny_models[family]), make_mesh(MeshShape(fsdp=2, tensor=2))
    model = build(base.config, None, mesh, "float32", routed=True)
    assert 0 < model.share < 1
    batch = [jax.device_put(array, batch_sharding(mesh)) for array in (TOKENS, packed(SEGMENTS))]
    frozen = model.load(base)
    program = jax.jit(model.logits_BTV).trace({}, frozen, *batch)
    # A CPU's program no longer shows it.
    assert "ragged_dot" in str(program.jaxpr)
    ours = program.lower().compile()({}, frozen, *batch)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    both = [reference(theirs, TOKENS[:, part], SEGMENTS[:, part]) for part in (slice(10), slice(10, None))]
    assert_equal(np.asarray(ours), np.concatenate(both, axis=1), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma4 experts", "qwen3_5_moe_text"])
@pytest.mark.parametrize("remat", ["block", "dots"])
def test_gradients_through_chosen_experts_are_those_through_all(family, remat, tiny_models):
    """Torch gives no gradients to compare with for these families; test_gradients.py has the others."""
    base, mesh = BaseCheckpoint.open(tiny_models[family]), make_mesh()
    found = []
    for routed in (True, False):
        model = build(base.config, LORA[family], mesh, "float32", routed=routed, remat=remat)
        adapter = {name: tensor / 4 for name, tensor in adapter_of(model).items()}
        frozen = model.load(base)

        def loss(factors, model=model, frozen=frozen):
            logits = model.logits_BTV(factors, frozen, TOKENS, SEGMENTS)
            return jnp.mean(SEGMENTS * jax.nn.logsumexp(logits, axis=-1))

        value, grads = jax.jit(jax.value_and_grad(loss))(model.place_factors(adapter))
        found.append((float(value), by_name(model, grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_close_as_one(found[0][1], found[1][1])


def test_chunks_of_a_mixture_give_each_expert_enough_tokens():
    assert chunk_length(1, 8192, "block") == 1024
    assert chunk_length(1, 8192, "block", share=2 / 8) == 1024
    assert chunk_length(1, 16384, "block", share=8 / 128) == 4096
    assert chunk_length(2, 4096, "block", share=8 / 128) == 4096

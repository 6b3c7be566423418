"""What is looked up in a split table are its vectors, either way, and no device holds those of all rows at once."""

import math

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.model.blocks import embedding
from kithara_ray.plan.hlo import cost_of
from kithara_ray.plan.hlo_text import arrays_of
from kithara_ray.sharding.mesh import BATCH_AXES, WEIGHT_AXES, make_mesh
from kithara_ray.sharding.shape import MeshShape

D, B, T = 32, 4, 128
# Tokens are 512, of two data groups 256 each: so many times as many as the vocabulary, and a small part of it.
FEW, MANY = 64, 4096


def layer_of(vocabulary, mesh):
    layer = keras.layers.ReversibleEmbedding(vocabulary, D)
    layer.build((None, None))
    embedding.install(layer, mesh)
    return layer


@pytest.mark.parametrize("vocabulary", [FEW, MANY])
@pytest.mark.parametrize(
    "shape", [MeshShape(fsdp=2, expert=2), MeshShape(fsdp=2, tensor=2), MeshShape(data=2, tensor=2, fsdp=1)]
)
def test_lookups_are_those_of_the_table_and_so_is_its_gradient(shape, vocabulary, monkeypatch):
    """In four chunks where it is done in parts."""
    monkeypatch.setattr(embedding, "_CHUNK_ELEMENTS", B * 32 * D)
    mesh = make_mesh(shape, jax.devices()[:4])
    layer = layer_of(vocabulary, mesh)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(vocabulary, D)).astype(np.float32)
    weights_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    ids = rng.integers(0, vocabulary, (B, T)).astype(np.int32)
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def look_up(table, ids):
        with keras.StatelessScope(state_mapping=[(layer._embeddings, table)]):
            return jax.lax.with_sharding_constraint(layer(ids), on(BATCH_AXES))

    arrays = jax.device_put(table, on(WEIGHT_AXES)), jax.device_put(ids, on(BATCH_AXES))
    compiled = jax.jit(look_up).lower(*arrays).compile()
    np.testing.assert_array_equal(compiled(*arrays), table[ids])
    gradient = jax.jit(jax.grad(lambda table, ids: jnp.sum(look_up(table, ids) * weights_BTD)))(*arrays)
    wanted = np.zeros((vocabulary, D))
    np.add.at(wanted, ids, weights_BTD)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
    data, *gathered, tensor = shape.resolve(4)
    fsdp = math.prod(gathered)
    whole = [dims for _, dims in arrays_of(compiled.as_text()) if dims[-3:] == (B // data, T, D)]
    assert not whole or fsdp == 1
    moved = sum(bytes_ for kind, bytes_ in cost_of(compiled.as_text()).collectives.items() if kind != "all-gather")
    tokens = B * T // data
    turned, in_parts = (2 * vocabulary + tokens) / (fsdp * tensor), tokens * (1 if fsdp > 1 else 2)
    assert 0 < moved <= 4 * D * (in_parts if vocabulary == MANY else turned)


@pytest.mark.parametrize("rows", [4, 8])
def test_a_token_a_row(rows):
    """As in decoding."""
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4])
    layer = layer_of(MANY, mesh)
    table = np.random.default_rng(0).normal(size=(MANY, D)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, MANY, (rows, 1)).astype(np.int32)
    with keras.StatelessScope(state_mapping=[(layer._embeddings, jnp.asarray(table))]):
        np.testing.assert_array_equal(jax.jit(layer)(ids), table[ids])


@pytest.mark.parametrize(("vocabulary", "rows"), [(30, B), (MANY, 3)])
def test_what_does_not_divide_is_left_to_xla(vocabulary, rows):
    layer = layer_of(vocabulary, make_mesh(devices=jax.devices()[:4]))
    program = jax.jit(lambda ids: layer(ids)).lower(jnp.zeros((rows, 8), jnp.int32)).as_text()
    assert "reduce_scatter" not in program
    assert "sharding_constraint" not in program


@pytest.mark.parametrize(
    ("positions", "bound", "chunk"), [(4096, 910, 512), (128, 0, 1), (96, 200, 96), (127, 64, 127)]
)
def test_chunks(positions, bound, chunk):
    assert embedding._chunk_length(positions, bound) == chunk

"""The turned table gives the same vectors, and no device holds those of all rows."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.model import embedding
from kithara_ray.plan.hlo import cost_of
from kithara_ray.sharding.mesh import BATCH_AXES, make_mesh
from kithara_ray.sharding.shape import MeshShape

V, D, B, T = 64, 32, 4, 128


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(fsdp=2, tensor=2), MeshShape(data=2, tensor=2, fsdp=1)])
def test_lookups_are_those_of_the_table(shape):
    mesh = make_mesh(shape, jax.devices()[:4])
    layer = keras.layers.ReversibleEmbedding(V, D)
    layer.build((None, None))
    table = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    embedding.install(layer, mesh)

    def look_up(table, ids):
        with keras.StatelessScope(state_mapping=[(layer._embeddings, table)]):
            return jax.lax.with_sharding_constraint(layer(ids), on(BATCH_AXES))

    arrays = jax.device_put(table, on(("fsdp", "tensor"))), jax.device_put(ids, on(BATCH_AXES))
    compiled = jax.jit(look_up).lower(*arrays).compile()
    np.testing.assert_array_equal(compiled(*arrays), table[ids])
    ways = shape.resolve(4)[1] * shape.resolve(4)[2]
    group = B * T // shape.resolve(4)[0]
    moved = sum(bytes_ for kind, bytes_ in cost_of(compiled.as_text()).collectives.items() if kind != "all-gather")
    assert 0 < moved <= 4 * D * (2 * V + group) / ways


@pytest.mark.parametrize(("vocabulary", "why"), [(8192, "large beside the tokens"), (30, "not to be split")])
def test_a_table_that_is_not_turned(vocabulary, why):
    mesh = make_mesh(devices=jax.devices()[:4])
    layer = keras.layers.ReversibleEmbedding(vocabulary, D)
    layer.build((None, None))
    embedding.install(layer, mesh)
    program = jax.jit(lambda ids: layer(ids)).lower(jnp.zeros((B, 8), jnp.int32))
    assert "sharding" not in program.as_text().split("func.func public @main")[1].split("return")[0].lower()

"""A run's data as the workers read it: from a DataSpec to the global batches that every rank reads its rows of."""

from typing import Any

from jax.sharding import Mesh

from kithara_ray.orchestration.data.batches import HostStream
from kithara_ray.orchestration.data.data_spec import DataSpec
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.data.unbounded import WINDOW_ROWS, EndlessOrder, EndlessStore
from kithara_ray.orchestration.data.unbounded_batches import EndlessStream
from kithara_ray.sft.batches.order import BatchOrder, PackedOrder
from kithara_ray.sharding.mesh import batch_sharding

# Batches to make in advance while steps run.
_AHEAD = 2


def training_batches(data: DataSpec, mesh: Mesh, platform: str) -> HostStream | EndlessStream:
    """Open the training batches, made in advance of their steps."""
    if isinstance(data.store, EndlessStore):
        return _endless(data, data.store, mesh, platform)
    return _stream(data, data.store, mesh, platform, data.store.parts, _AHEAD)


def held_out_batches(data: DataSpec, max_samples: int | None, mesh: Mesh, platform: str) -> HostStream:
    """Open the batches of one pass over all evaluation rows, a mixture's included, or over the first `max_samples`."""
    assert isinstance(data.store, TokenStore)  # an evaluation has an end
    store = data.store.head(max_samples) if max_samples else data.store
    return _stream(data, store, mesh, platform, parts=(), ahead=0)


def _stream(data: DataSpec, store: TokenStore, mesh: Mesh, platform: str, parts: tuple, ahead: int) -> HostStream:
    shapes = store.shapes(platform, data.packed_len, data.buckets)
    common: dict[str, Any] = {"batch_rows": data.rows_per_device * mesh.size, "seed": data.seed, "parts": parts}
    common |= {"shuffle": data.shuffle, "shuffle_rows": data.shuffle_rows}
    if data.packed_len is None:
        order = BatchOrder(size=store.num_rows, lengths=store.lengths if len(shapes) > 1 else None, **common)
    else:
        seq_len, predictions = shapes[0]
        room = {"seq_len": seq_len, "predictions": predictions}
        order = PackedOrder(lengths=store.lengths, trained=store.trained, **room, **common)
    return HostStream(store, order, shapes, batch_sharding(mesh), ahead)


def _endless(data: DataSpec, store: EndlessStore, mesh: Mesh, platform: str) -> EndlessStream:
    shapes = store.shapes(platform, data.packed_len, data.buckets)
    rows = data.rows_per_device * mesh.size
    order = EndlessOrder(rows, data.seed, data.shuffle, data.shuffle_rows or WINDOW_ROWS)
    packed = data.packed_len is not None
    return EndlessStream(store, order, shapes, batch_sharding(mesh), packed, _AHEAD)

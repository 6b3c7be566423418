"""Segment-aware causal attention that replaces KerasHub's own.

    B  rows    T  positions    N  query heads    K  key and value heads    G = N // K    H  head width
    Q  positions of a block of queries    S  positions of the keys that it may see

A token attends to itself and to the earlier tokens of its own segment, so packed samples do not see each other.
Positions need no new numbering, since rotary attention depends only on distances. On a TPU, Pallas' splash kernel
computes this without any T x T array. Elsewhere XLA computes the same from masks.

KerasHub's decoder blocks build a T x T mask and hand it to their attention layer. `install` makes them hand over the
segment ids instead, as a (B, T, 1) column. Decoding puts attention over a cache in this one's place, see `cached`.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from kithara_ray.errors import UnsupportedError
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks.kept import INPUTS, RESIDUALS, with_named_result
from kithara_ray.model.options import FUSED_KEYS, fuses_backward
from kithara_ray.sharding.mesh import BATCH_AXES

# Splash tile length in positions; if it does not divide the sequence, the largest smaller power of two that does.
_MAX_TILE = 512
_MIN_TILE = 128
# Limits of XLA's blocks of queries: shorter blocks make products inefficient, and more blocks slow compilation down.
_MIN_QUERIES = 64
_MAX_BLOCKS = 8
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# State while a block is traced in parts: the list that records its attention's output, or the output to return.
_RECORD: ContextVar[list[jax.Array] | None] = ContextVar("what attention gave", default=None)
_GIVEN: ContextVar[jax.Array | None] = ContextVar("what attention gives", default=None)
# The function that computes attention in place of the installed one.
_INSTEAD: ContextVar[Callable | None] = ContextVar("what attends instead", default=None)


@dataclass(frozen=True)
class Settings:
    """Parameters of one layer's attention.

    Attributes:
        scale: factor of the logits.
        window: number of tokens that a token sees, itself included; None sees all before it.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


def xla_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, settings: Settings, sinks_N=None) -> jax.Array:
    """Compute (B, T, N, H) by plain products, one block of queries at a time; logits and softmax are float32.

    Each block is multiplied only with the keys that its tokens may see. Half of a causal T x T product is therefore
    never computed, nor held at once.

    Args:
        segments_BT: int; tokens of different segments do not see each other.
        sinks_N: an extra logit of each head that takes probability but has no value.
    """
    b, t, n, h = q_BTNH.shape
    kv = k_BTKH.shape[2]
    q_BKGTH = jnp.transpose(q_BTNH.reshape(b, t, kv, n // kv, h), (0, 2, 3, 1, 4))
    k_BKTH, v_BKTH = (jnp.swapaxes(array, 1, 2) for array in (k_BTKH, v_BTKH))
    blocks = _query_blocks(t, settings.window)
    # Split instead of slicing: the gradient of slices is a sum of padded arrays; that of a split concatenates them.
    parts = jax.lax.split(q_BKGTH, [stop - start for start, stop, _ in blocks], axis=3)
    outs = []
    for q_BKGQH, (start, stop, first) in zip(parts, blocks, strict=True):
        queries, keys = slice(start, stop), slice(first, stop)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        seen = distance >= 0 if settings.window is None else (distance >= 0) & (distance < settings.window)
        seen_BQS = seen & (segments_BT[:, queries, None] == segments_BT[:, None, keys])
        logits = jnp.einsum("bkgqh,bksh->bkgqs", q_BKGQH, k_BKTH[:, :, keys], preferred_element_type=jnp.float32)
        weights = softmax(logits * settings.scale, seen_BQS, settings.soft_cap, sinks_N)
        outs.append(jnp.einsum("bkgqs,bksh->bkgqh", weights.astype(v_BKTH.dtype), v_BKTH[:, :, keys]))
    return jnp.transpose(jnp.concatenate(outs, axis=3), (0, 3, 1, 2, 4)).reshape(b, t, n, h)


def _query_blocks(t: int, window: int | None) -> list[tuple[int, int, int]]:
    """List (first query, end, first key that it may see) of each block of queries."""
    size = max(_MIN_QUERIES, -(-t // _MAX_BLOCKS))
    starts = range(0, t, size)
    return [(start, min(start + size, t), 0 if window is None else max(0, start - window + 1)) for start in starts]


def softmax(logits_BKGQS, seen_BQS, soft_cap: float | None, sinks_N) -> jax.Array:
    """Softmax over the visible keys, with logits soft-capped and the sinks' share taken off."""
    if soft_cap:
        logits_BKGQS = soft_cap * jnp.tanh(logits_BKGQS / soft_cap)
    logits_BKGQS = jnp.where(seen_BQS[:, None, None], logits_BKGQS, _MASKED)
    if sinks_N is None:
        return jax.nn.softmax(logits_BKGQS, axis=-1)
    _, kv, groups, *_ = logits_BKGQS.shape
    sinks = sinks_N.astype(jnp.float32).reshape(1, kv, groups, 1, 1)
    sinks = jnp.broadcast_to(sinks, (*logits_BKGQS.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([logits_BKGQS, sinks], axis=-1), axis=-1)[..., :-1]


@dataclass(frozen=True)
class Kernel:
    """Settings of the TPU's kernel.

    Attributes:
        mesh: the devices; rows are split over the batch axes, heads over `tensor`.
        remat: one of `options.REMAT`; it decides whether the gradients of q, k and v come from one kernel, see
            `options.fuses_backward`.
        interpret: run the kernel on any device, slowly; for tests.
    """

    mesh: Mesh
    remat: str = "block"
    interpret: bool = False


def splash_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    segments_BT,
    settings: Settings,
    sinks_N=None,
    *,
    how: Kernel,
) -> jax.Array:
    """Compute the same with Pallas' TPU kernel: rows split over the batch axes, heads over `tensor`.

    Raises:
        UnsupportedError: the sequence is not a multiple of 128, or `tensor` does not divide the key and value heads.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, t, n, _ = q_BTNH.shape
    tile = next((size for size in (_MAX_TILE, 256, _MIN_TILE) if t % size == 0), None)
    tensor = how.mesh.shape["tensor"]
    if tile is None:
        raise UnsupportedError(f"attention on TPU needs a sequence that is a multiple of {_MIN_TILE} tokens, got {t}")
    if k_BTKH.shape[2] % tensor:
        raise UnsupportedError(
            f"mesh tensor={tensor} does not divide the model's {k_BTKH.shape[2]} key and value heads; "
            "take a smaller tensor axis"
        )
    if settings.window is None:
        mask = splash.CausalMask((t, t))
    else:
        mask = splash.LocalMask((t, t), (settings.window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (n // tensor)),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=settings.soft_cap,
        block_sizes=_block_sizes(t, tile, fuses_backward(how.remat, t)),
        residual_checkpoint_name=RESIDUALS,
        interpret=how.interpret,
    )

    def local(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N):
        def row(q_TNH, k_TKH, v_TKH, segments_T):
            heads_first = [jnp.swapaxes(array, 0, 1) for array in (q_TNH * settings.scale, k_TKH, v_TKH)]
            segments = splash.SegmentIds(segments_T, segments_T)
            attended: Any = kernel(*heads_first, segment_ids=segments, sinks=sinks_N)
            return jnp.swapaxes(attended, 0, 1)

        return jax.vmap(row)(q_BTNH, k_BTKH, v_BTKH, segments_BT)

    heads = PartitionSpec(BATCH_AXES, None, "tensor")
    specs = (heads, heads, heads, PartitionSpec(BATCH_AXES), None if sinks_N is None else PartitionSpec("tensor"))
    # The kernel's output carries no record of the mesh axes it varies over.
    split = jax.shard_map(local, mesh=how.mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return split(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)


def _block_sizes(t: int, tile: int, fused: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if fused:
        wide = FUSED_KEYS if t % FUSED_KEYS == 0 else tile
        return splash.BlockSizes(
            block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=wide, block_kv_dkv_compute=tile,
            use_fused_bwd_kernel=True,
        )  # fmt: skip
    return splash.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_kv_dkv_compute=tile,
        block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[jax.Array]]:
    """Record the output of segment attention, (B, T, N, H), in the yielded list while this context is active."""
    outputs: list[jax.Array] = []
    with _set(_RECORD, outputs):
        yield outputs


def given(output: jax.Array) -> contextlib.AbstractContextManager[None]:
    """Make segment attention return this output for any input inside this context.

    Nothing then uses the queries, keys and values, so the compiler leaves them out.
    """
    return _set(_GIVEN, output)


def computed_by(attend: Callable) -> contextlib.AbstractContextManager[None]:
    """Make segment attention call this function, with the arguments of `xla_attention`, inside this context."""
    return _set(_INSTEAD, attend)


def mixed(compute: Callable[[], jax.Array]) -> jax.Array:
    """Compute what a block's positions take from each other, (B, T, N, H), unless it is given; record it if asked to.

    All of a block's arithmetic outside this is by position, so a block can run in chunks.
    """
    if (output := _GIVEN.get()) is not None:
        return output
    output = compute()
    if (record := _RECORD.get()) is not None:
        record.append(output)
    return output


# --- replacement of KerasHub's own -----------------------------------------------------------------------------------


def _gemma(block, layer) -> Settings:
    width = layer.head_dim if layer.query_head_dim_normalize else layer.hidden_dim // layer.num_query_heads
    window = layer.sliding_window_size if layer.use_sliding_window_attention else None
    return Settings(width**-0.5, window, layer.logit_soft_cap)


def _gemma4(block, layer) -> Settings:
    local = block.use_sliding_window_attention and not block.is_global_attention
    return Settings(1.0, layer.sliding_window_size if local else None, layer.logit_soft_cap)


def _unwindowed(block, layer) -> Settings:
    return Settings(keras_compat.attention_scale_of(layer))


def _windowed_by_block(block, layer) -> Settings:
    return Settings(keras_compat.attention_scale_of(layer), block.sliding_window)


def _windowed_by_layer(block, layer) -> Settings:
    return Settings(keras_compat.attention_scale_of(layer), layer.sliding_window_size)


def _qwen2(block, layer) -> Settings:
    return _windowed_by_layer(block, layer) if layer.use_sliding_window_attention else _unwindowed(block, layer)


# The attention of `model.decoder`, which takes segment ids as they are.
_OWN = "DecoderAttention"
# Settings by the class of the attention layer. KerasHub has no common interface for these.
_SETTINGS: dict[str, Callable[[Any, Any], Settings]] = {
    "LlamaAttention": _unwindowed,
    "SmolLM3Attention": _unwindowed,
    "CachedGemmaAttention": _gemma,
    "CachedGemma3Attention": _gemma,
    "Gemma4TextAttention": _gemma4,
    "CachedMistralAttention": _windowed_by_block,
    "CachedMixtralAttention": _windowed_by_block,
    "QwenAttention": _qwen2,
    "Qwen3Attention": _windowed_by_layer,
    "Qwen3MoeAttention": _windowed_by_layer,
    "GptOssAttention": _windowed_by_block,
    _OWN: lambda block, layer: layer.settings,
    "Qwen3_5Attention": _unwindowed,
    "QwenMoeAttention": _unwindowed,
}
# Layers that mix positions in another way and take the segment ids by themselves: see `blocks.delta_rule`.
_SEGMENTED = {"GatedDeltaNet", "FusedDeltaNet"}

# The families' names for the padding mask and the cache that their mask builders take.
_PADDING_MASKS = ("decoder_padding_mask", "padding_mask")
_CACHES = ("self_attention_cache", "cache")
# Layers that repeat keys and values before they pass them to their attention.
_REPEATED_BY_CALL = {
    "LlamaAttention", "SmolLM3Attention", "CachedMistralAttention", "CachedMixtralAttention", "QwenAttention",
    "Qwen3Attention", "Qwen3MoeAttention", "GptOssAttention", "Qwen3_5Attention", "QwenMoeAttention",
}  # fmt: skip


def install(blocks: tuple[keras.layers.Layer, ...], mesh: Mesh, remat: str = "block") -> None:
    """Make these decoder blocks attend within segments whenever they run without a KV cache.

    Args:
        remat: one of `options.REMAT`; see `options.fuses_backward`.

    Raises:
        UnsupportedError: the library does not know a block's attention.
    """
    attend = xla_attention
    if mesh.devices.flat[0].platform == "tpu":
        attend = partial(splash_attention, how=Kernel(mesh, remat))
    for block in blocks:
        if not attends(block):
            continue
        layer = layer_of(block)
        layer.call = partial(with_named_result, layer.call)
        if type(layer).__name__ == _OWN:
            layer.attend = partial(_attended, attend)
            continue
        _hand_over_segments(block)
        _attend_by_segments(layer, settings_of(block), attend)


def attends(block: keras.layers.Layer) -> bool:
    """False for a block that mixes its positions in another way, and has no attention."""
    return not any(type(layer).__name__ in _SEGMENTED for layer in keras_compat.all_layers(block))


def segments_in(arguments: Mapping[str, Any]) -> Any:
    """The segment ids (B, T) among the arguments of a block's call, or of its mask builder; None without any."""
    return next((arguments[name] for name in _PADDING_MASKS if name in arguments), None)


def settings_of(block: keras.layers.Layer) -> Settings:
    """The parameters of a decoder block's attention."""
    layer = layer_of(block)
    return _SETTINGS[type(layer).__name__](block, layer)


def layer_of(block: keras.layers.Layer) -> keras.layers.Layer:
    """The layer of a decoder block that holds attention and its products. Raises UnsupportedError."""
    layer = next((layer for layer in keras_compat.all_layers(block) if type(layer).__name__ in _SETTINGS), None)
    if layer is None:
        raise UnsupportedError(f"the attention of {type(block).__name__} is not known")
    return layer


def _hand_over_segments(block: keras.layers.Layer) -> None:
    """Replace the block's mask with the (B, T, 1) column of segment ids. Padding has id 0, which as a mask hides it."""
    original = keras_compat.mask_builder_of(block)
    signature = inspect.signature(original)

    def mask(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        cache, padding = next((given[name] for name in _CACHES if name in given), None), segments_in(given)
        if cache is not None or padding is None:
            return original(*args, **kwargs)
        return padding[:, :, None]

    keras_compat.replace_mask_builder(block, mask)


def _attend_by_segments(layer: keras.layers.Layer, settings: Settings, attend: Callable) -> None:
    original = keras_compat.attention_of(layer)
    groups = keras_compat.take_repeats(layer) if type(layer).__name__ in _REPEATED_BY_CALL else 1

    def compute(query, key, value, attention_mask=None, *args, **kwargs):
        # KerasHub's own mask never has one column: it has one per key of the cache or of the sequence.
        if attention_mask is None or attention_mask.shape[-1] != 1:
            key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
            return original(query, key, value, attention_mask, *args, **kwargs)
        sinks = getattr(layer, "sinks", None)
        sinks = None if sinks is None else keras.ops.convert_to_tensor(sinks)
        return _attended(attend, query, key, value, attention_mask[..., 0], settings, sinks)

    keras_compat.replace_attention(layer, compute)


def _attended(attend: Callable, query, key, value, segments_BT, settings: Settings, sinks_N=None) -> jax.Array:
    """Compute attention with `attend`, unless `mixed` knows the output or `computed_by` has another function."""
    attend = _INSTEAD.get() or attend

    def compute() -> jax.Array:
        named = (checkpoint_name(array, INPUTS) for array in (query, key, value))
        output = attend(*named, segments_BT, settings, sinks_N)
        # The TPU's kernel names its own.
        return checkpoint_name(output, RESIDUALS) if attend is xla_attention else output

    return mixed(compute)


# Attention of decoders of ours on any device, until `install` gives them their mesh's.
attend_locally = partial(_attended, xla_attention)

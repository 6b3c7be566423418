"""The gated delta rule, a linear attention with a recurrent state, within packed segments.

    B  rows    T  positions    C  positions of a chunk    N  value heads    K  key width    V  value width
    D  channels of the short convolution    W  its width in positions

Each head keeps a state S (K, V), which maps keys to values. A token first decays it, then corrects the value that the
state recalls for the token's key, and reads it with its query:

    S = exp(decay) * S;    S = S + beta * k (v - S^T k)^T;    out = S^T q            Yang et al. 2024, arXiv:2412.06464

Written out over a chunk, the corrections are the solution of a triangular system. So a chunk takes a few products, and
a scan carries the state from chunk to chunk. A token that begins a segment finds an empty state, and the short
convolution does not look back across a segment's border: packed samples compute what each gives alone. All
arithmetic is float32 with exact products, because the system amplifies errors.
"""

import jax
import jax.numpy as jnp

# Positions of a chunk, a power of two. Work inside a chunk grows with it, the number of steps falls.
_CHUNK = 64
_EXACT = jax.lax.Precision.HIGHEST


def short_conv(x_BTD, weight_DW, segments_BT, before_BPD=None) -> jax.Array:
    """Convolve each channel with its own weights over a token and the W - 1 before it in its segment: (B, T, D).

    The result is float32; `weight[:, -1]` is the token's own.

    Args:
        segments_BT: int; None takes all tokens as one segment.
        before_BPD: the P = W - 1 inputs before the first; None are zeros.
    """
    positions, width = x_BTD.shape[1], weight_DW.shape[1]
    x_BTD, weight_DW = x_BTD.astype(jnp.float32), weight_DW.astype(jnp.float32)
    whole = with_before(x_BTD, width, before_BPD)
    out = x_BTD * weight_DW[:, -1]
    for back in range(1, width):
        earlier = whole[:, width - 1 - back : width - 1 - back + positions]
        if segments_BT is not None:
            earlier = jnp.where(_same_as_before(segments_BT, back)[..., None], earlier, 0)
        out = out + earlier * weight_DW[:, width - 1 - back]
    return out


def with_before(x_BTD, width: int, before_BPD=None) -> jax.Array:
    """The inputs of a convolution of this width, those before the first token included: (B, W - 1 + T, D)."""
    if before_BPD is None:
        before_BPD = jnp.zeros((x_BTD.shape[0], width - 1, x_BTD.shape[2]), x_BTD.dtype)
    return jnp.concatenate([before_BPD.astype(x_BTD.dtype), x_BTD], axis=1)


def _same_as_before(segments_BT, back: int) -> jax.Array:
    """True where the token `back` positions earlier is of the same segment."""
    earlier = jnp.pad(segments_BT, ((0, 0), (back, 0)), constant_values=-1)[:, : segments_BT.shape[1]]
    return earlier == segments_BT


def gated_delta_rule(
    q_BTNK, k_BTNK, v_BTNV, decay_BTN, beta_BTN, segments_BT=None, state_BNKV=None
) -> tuple[jax.Array, jax.Array]:
    """Compute (out (B, T, N, V), last state (B, N, K, V)), both float32.

    Queries and keys are normalised here, and queries divided by sqrt(K).

    Args:
        decay_BTN: logarithm of the state's decay at each token, not above 0.
        beta_BTN: the part of a correction that is made, in [0, 1]. A token with decay and beta 0 leaves the state.
        segments_BT: int, not negative, each segment in one piece; None takes all tokens as one.
        state_BNKV: the state before the first token, of the first token's segment; None is empty.
    """
    rows, positions, heads, width = k_BTNK.shape
    chunk = min(_CHUNK, 1 << (positions - 1).bit_length())
    if segments_BT is None:
        segments_BT = jnp.zeros((rows, positions), jnp.int32)
    if state_BNKV is None:
        state_BNKV = jnp.zeros((rows, heads, width, v_BTNV.shape[-1]), jnp.float32)
    q_BTNK, k_BTNK = _unit(q_BTNK) * width**-0.5, _unit(k_BTNK)
    filler = -positions % chunk

    def chunks(array, mode: str = "constant"):
        """(chunks, B, N, C, ...) of an array (B, T, N, ...), or (chunks, B, C) of one (B, T)."""
        array = jnp.pad(array, [(0, 0), (0, filler)] + [(0, 0)] * (array.ndim - 2), mode=mode)
        array = array.reshape(rows, -1, chunk, *array.shape[2:])
        return jnp.transpose(array, (1, 0, 2) if array.ndim == 3 else (1, 0, 3, 2, *range(4, array.ndim)))

    parts = [chunks(array.astype(jnp.float32)) for array in (q_BTNK, k_BTNK, v_BTNV, decay_BTN, beta_BTN)]
    # The filler is of the last segment, and does nothing to its state.
    segments = chunks(segments_BT, "edge")
    before = jnp.concatenate([segments[:1, :, 0], segments[:-1, :, -1]])
    state, outs = jax.lax.scan(jax.checkpoint(_chunk), state_BNKV.astype(jnp.float32), (*parts, segments, before))
    out_BTNV = jnp.moveaxis(outs, 0, 2).reshape(rows, heads, -1, outs.shape[-1]).swapaxes(1, 2)
    return out_BTNV[:, :positions], state


def _unit(x) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _chunk(state_BNKV, part) -> tuple[jax.Array, jax.Array]:
    """One step of the scan: the state after a chunk and the chunk's output (B, N, C, V)."""
    q_BNCK, k_BNCK, v_BNCV, decay_BNC, beta_BNC, segments_BC, before_B = part
    since_BNC = jnp.cumsum(decay_BNC, axis=-1)
    same_BCC = segments_BC[:, :, None] == segments_BC[:, None, :]
    seen_BCC = same_BCC & jnp.tril(jnp.ones(same_BCC.shape[1:], bool))
    between = since_BNC[..., :, None] - since_BNC[..., None, :]
    between_BNCC = jnp.exp(jnp.where(seen_BCC[:, None], between, -jnp.inf))
    reads_BNC = jnp.where((segments_BC == before_B[:, None])[:, None], jnp.exp(since_BNC), 0)

    system_BNCC = beta_BNC[..., None] * _product("bnik,bnjk->bnij", k_BNCK, k_BNCK) * between_BNCC
    recalled_BNCV = reads_BNC[..., None] * _product("bnck,bnkv->bncv", k_BNCK, state_BNKV)
    wanted_BNCV = beta_BNC[..., None] * (v_BNCV - recalled_BNCV)
    new_BNCV = _product("bnij,bnjv->bniv", _inverse(system_BNCC), wanted_BNCV)

    out_BNCV = reads_BNC[..., None] * _product("bnck,bnkv->bncv", q_BNCK, state_BNKV)
    weights_BNCC = _product("bnik,bnjk->bnij", q_BNCK, k_BNCK) * between_BNCC
    out_BNCV = out_BNCV + _product("bnij,bnjv->bniv", weights_BNCC, new_BNCV)

    last_B, whole_BN = segments_BC[:, -1], since_BNC[..., -1]
    writes_BNC = jnp.where((segments_BC == last_B[:, None])[:, None], jnp.exp(whole_BN[..., None] - since_BNC), 0)
    kept_BN = jnp.where((last_B == before_B)[:, None], jnp.exp(whole_BN), 0)
    written = _product("bnck,bncv->bnkv", k_BNCK * writes_BNC[..., None], new_BNCV)
    return kept_BN[..., None, None] * state_BNKV + written, out_BNCV


def _inverse(system) -> jax.Array:
    """The inverse (..., C, C) of I + L, L being what is strictly below the diagonal of `system`; C is a power of two.

    Blocks on the diagonal are inverted in pairs, each block of twice the size from two: [[A, 0], [L, D]] has the
    inverse [[A', 0], [-D' L A', D']]. Powers of L would be fewer products, but overflow float32's precision where keys
    are alike.
    """
    *outer, size, _ = system.shape
    blocks = jnp.ones((*outer, size, 1, 1), system.dtype)
    while (half := blocks.shape[-1]) < size:
        pairs = size // (2 * half)
        below = system.reshape(*outer, pairs, 2, half, pairs, 2, half)[..., :, 1, :, :, 0, :]
        below = jnp.einsum("...iaib->...iab", below)
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        corner = -_product("...ab,...bc->...ac", _product("...ab,...bc->...ac", second, below), first)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        blocks = jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    return blocks[..., 0, :, :]


def _product(equation: str, a, b) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=_EXACT)

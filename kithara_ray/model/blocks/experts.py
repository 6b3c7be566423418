"""The experts of a mixture, computed for every token, or only for the tokens that chose them.

    B  rows    T  positions    D  hidden width    E  experts    K  experts of a token    I  width inside an expert
    C  tokens of one device    R = C * K  rows: a token has one for each of its experts    L  rank of LoRA's factors

`dense` computes every expert for every token and weighs the results, most of them by 0. It is the reference, and the
faster way on a CPU. `routed` sorts a device's rows by expert and multiplies each group with its own expert's matrices:
`jax.lax.ragged_dot`, on a TPU a kernel of the compiler. Every row is computed, however uneven the choice; there is no
capacity. Padding takes part in no product.

Each device routes its own tokens. The weights are whole on it; an axis `tensor` splits the width inside the experts.
With an axis `expert`, each device has some of the experts, and `exchange` sends the tokens to them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from kithara_ray.model.blocks import exchange
from kithara_ray.model.blocks.kept import PRODUCTS
from kithara_ray.sharding.mesh import BATCH_AXES

# The batch's segment ids while a block is traced; None where all tokens are real.
_SEGMENTS: ContextVar[jax.Array | None] = ContextVar("segments of experts", default=None)


@dataclass(frozen=True)
class Choice:
    """The router's decision.

    Attributes:
        experts_BTK: the numbers of each token's experts, int32; all different.
        factors_BTK: the factors of these experts' results, float32.
    """

    experts_BTK: jax.Array
    factors_BTK: jax.Array


@dataclass(frozen=True)
class Factors:
    """LoRA's factors of all experts' matrices (X, Y): each expert's result gets `scale` * (x @ A) @ B.

    Attributes:
        a_EXL, b_ELY: A and B of each expert.
    """

    a_EXL: jax.Array
    b_ELY: jax.Array
    scale: float

    @classmethod
    def of(cls, lora_A: jax.Array, lora_B: jax.Array, experts: int, scale: float) -> "Factors":
        """Take PEFT's arrays, A (E * L, X) and B (Y, L * E), apart; see `hf.facts.experts`."""
        a_ELX = lora_A.reshape(experts, -1, lora_A.shape[-1])
        b_YLE = lora_B.reshape(lora_B.shape[0], -1, experts)
        return cls(jnp.swapaxes(a_ELX, 1, 2), jnp.transpose(b_YLE, (2, 1, 0)), scale)


class SidePaths(NamedTuple):
    """The factors of a block's experts; None where there are none.

    Attributes:
        wide: factors of the gate and the up projection together, with the columns of B in the order of the one matrix
            of both; if there are two matrices, the gate's columns come first.
        down: factors of the last product's matrices.
    """

    wide: Factors | None = None
    down: Factors | None = None


NO_FACTORS = SidePaths()


@dataclass(frozen=True)
class Kernels:
    """The weights of a block's experts.

    Attributes:
        wide: the matrices of the first products: gate and up projection, (E, D, I) each, or both in one, (E, D, 2I).
        down_EID: the matrices of the last product.
        inner: computes the experts' inner activations, float32 (..., I), from the first products' results.
        wide_biases: for each of `wide`, a bias (E, its last dim); empty if there are none.
        down_bias_ED: a bias of the last product's result, or None.
        in_halves: True if a matrix of both holds the gate's columns before the up projection's. Otherwise a column of
            the one follows a column of the other.
        factors: LoRA's factors.
    """

    wide: tuple[jax.Array, ...]
    down_EID: jax.Array
    inner: Callable[..., jax.Array]
    wide_biases: tuple[jax.Array, ...] = ()
    down_bias_ED: jax.Array | None = None
    in_halves: bool = False
    factors: SidePaths = NO_FACTORS

    @property
    def experts(self) -> int:
        return self.down_EID.shape[0]


Compute = Callable[[jax.Array, Choice, Kernels], jax.Array]


def dense(x_BTD: jax.Array, choice: Choice, kernels: Kernels) -> jax.Array:
    """Compute the weighted sum of the experts' results, (B, T, D) in the dtype of `x_BTD`, by computing all experts."""
    wide = [jnp.einsum("btd,edw->btew", x_BTD, kernel) for kernel in kernels.wide]
    if (own := kernels.factors.wide) is not None:
        low_BTEL = jnp.einsum("btd,edl->btel", x_BTD, own.a_EXL) * own.scale
        added = jnp.split(jnp.einsum("btel,elw->btew", low_BTEL, own.b_ELY), len(wide), axis=-1)
        wide = [product + more for product, more in zip(wide, added, strict=True)]
    if kernels.wide_biases:
        wide = [product + bias for product, bias in zip(wide, kernels.wide_biases, strict=True)]
    # Weigh before the last product: no expert's own result then exists.
    inner_BTEI = kernels.inner(*wide) * _factors_BTE(choice, kernels.experts)[..., None]
    inner_BTEI = inner_BTEI.astype(x_BTD.dtype)
    out = jnp.einsum("btei,eid->btd", inner_BTEI, kernels.down_EID)
    if (own := kernels.factors.down) is not None:
        low_BTEL = jnp.einsum("btei,eil->btel", inner_BTEI, own.a_EXL) * own.scale
        out = out + jnp.einsum("btel,eld->btd", low_BTEL, own.b_ELY)
    return _with_bias(out, choice, kernels)


def routed(x_BTD: jax.Array, choice: Choice, kernels: Kernels, mesh: Mesh, trains: bool = True) -> jax.Array:
    """Compute the same from the chosen experts only; padding gets zeros, besides a bias.

    Rows are split over the batch axes. Results are summed in float32, over each token's experts and over `tensor`.

    Args:
        trains: False if the kernels are frozen; a mesh with the axis `expert` then computes no gradient of them.
    """
    wide, biases, down_EID = kernels.wide, kernels.wide_biases, kernels.down_EID
    ways = mesh.shape["tensor"]
    splits = ways > 1 and down_EID.shape[1] % ways == 0
    cut = splits and kernels.in_halves
    if cut:
        # A device needs the same columns of the gate and of the up projection.
        wide, biases = (_halves(arrays) for arrays in (wide, biases))
    real_BT = real_tokens(x_BTD.shape[:2])
    wide_factors, down_factors = kernels.factors
    # The columns of B that belong to each of the first products.
    wide_b = () if wide_factors is None else jnp.split(wide_factors.b_ELY, len(wide), axis=-1)

    def products(x_RD, factors_R, order, experts_R, arrays, side_paths):
        """Compute the results of rows in the order of their experts."""
        (wide, biases, down_EID), (wide_a, wide_b, down_a, down_b) = arrays, side_paths
        wide_RW = [_grouped(x_RD, kernel, order) for kernel in wide]
        if wide_factors is not None:
            low_RL = _grouped(x_RD, wide_a, order) * wide_factors.scale
            wide_RW = [y + _grouped(low_RL, b_ELW, order) for y, b_ELW in zip(wide_RW, wide_b, strict=True)]
        if biases:
            wide_RW = [product + bias[experts_R] for product, bias in zip(wide_RW, biases, strict=True)]
        wide_RW = [checkpoint_name(product, PRODUCTS) for product in wide_RW]
        inner_RI = kernels.inner(jnp.concatenate(wide_RW, axis=-1)) if cut else kernels.inner(*wide_RW)
        inner_RI = (inner_RI * factors_R[:, None]).astype(x_RD.dtype)
        out_RD = _grouped(inner_RI, down_EID, order)
        if down_factors is not None:
            out_RD = out_RD + _grouped(_grouped(inner_RI, down_a, order) * down_factors.scale, down_b, order)
        return out_RD

    def received(x_RD, factors_R, order, arrays):
        (own, side_paths), frozen = arrays
        return products(x_RD, factors_R, order, order.experts_R, frozen if own is None else own, side_paths)

    def local(x_BTD, experts_BTK, factors_BTK, real_BT, arrays, side_paths):
        x_CD = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts_CK, factors_CK = (array.reshape(-1, experts_BTK.shape[-1]) for array in (experts_BTK, factors_BTK))
        real_C = real_BT.reshape(-1)
        order = _sorted(experts_CK, real_C, kernels.experts)
        if exchanges:
            rows = exchange.Rows(order.rows_R, order.places_CK, order.counts_E, experts_CK, real_C)
            own, frozen = (arrays, None) if trains else (None, arrays)
            out_CD = exchange.exchanged(received, axes, x_CD, factors_CK, rows, (own, side_paths), frozen)
        else:
            x_RD, factors_R = _sent(x_CD, factors_CK, order)
            experts_R = experts_CK.reshape(-1)[order.rows_R]
            out_CD = _returned(products(x_RD, factors_R, order, experts_R, arrays, side_paths), order)
        out_CD = jax.lax.psum(out_CD, "tensor") if splits else out_CD
        return out_CD.astype(x_BTD.dtype).reshape(x_BTD.shape)

    exchanges = mesh.shape["expert"] > 1
    axes = (*BATCH_AXES, "tensor") if splits else BATCH_AXES
    rows, inside = PartitionSpec(BATCH_AXES), "tensor" if splits else None
    among = "expert" if exchanges else None
    of_wide, of_second, of_whole = (PartitionSpec(among, *dims) for dims in ((None, inside), (inside,), ()))
    of_arrays, of_factors = (of_wide, of_second, of_second), (of_whole, of_wide, of_second, of_whole)
    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, rows, of_arrays, of_factors),
        out_specs=rows,
    )
    wide_a = None if wide_factors is None else wide_factors.a_EXL
    down_a, down_b = (None, None) if down_factors is None else (down_factors.a_EXL, down_factors.b_ELY)
    arrays, side_paths = (tuple(wide), tuple(biases), down_EID), (wide_a, tuple(wide_b), down_a, down_b)
    out = split(x_BTD, choice.experts_BTK, choice.factors_BTK, real_BT, arrays, side_paths)
    return _with_bias(out, choice, kernels)


@contextlib.contextmanager
def padded(segments_BT: jax.Array | None) -> Iterator[None]:
    """Let `routed` leave out the tokens with segment id 0 while this context is active."""
    token = _SEGMENTS.set(segments_BT)
    try:
        yield
    finally:
        _SEGMENTS.reset(token)


def real_tokens(shape_BT: tuple[int, ...]) -> jax.Array:
    """Return (B, T), False for padding; without `padded`, all tokens are real."""
    segments = _SEGMENTS.get()
    return jnp.ones(shape_BT, bool) if segments is None else segments != 0


def _halves(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [half for array in arrays for half in jnp.split(array, 2, axis=-1)]


def _factors_BTE(choice: Choice, experts: int) -> jax.Array:
    """The factor of each expert's result, float32: 0 for those that are not chosen."""
    return jnp.sum(jax.nn.one_hot(choice.experts_BTK, experts) * choice.factors_BTK[..., None], axis=-2)


def _with_bias(out_BTD: jax.Array, choice: Choice, kernels: Kernels) -> jax.Array:
    """Add each token's weighted biases of the last product."""
    if kernels.down_bias_ED is None:
        return out_BTD
    bias_ED = kernels.down_bias_ED.astype(jnp.float32)
    factors_BTE = _factors_BTE(choice, kernels.experts)
    weighed_BTD = jnp.matmul(factors_BTE, bias_ED, precision=jax.lax.Precision.HIGHEST)
    return (out_BTD.astype(jnp.float32) + weighed_BTD).astype(out_BTD.dtype)


# --- one device's tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """The order of a device's rows by expert; the rows of padding come last.

    Attributes:
        rows_R: for each place in the order, the number of its row: K * token + the number of the expert's place.
        places_CK: for each token and each of its experts, the place in the order.
        counts_E: number of rows of each expert; rows of padding belong to none.
        real_C: False for padding.
    """

    rows_R: jax.Array
    places_CK: jax.Array
    counts_E: jax.Array
    real_C: jax.Array


jax.tree_util.register_dataclass(_Order)


def _sorted(experts_CK: jax.Array, real_C: jax.Array, experts: int) -> _Order:
    """Order the rows by expert, and within an expert by token.

    Sums along the tokens give the places. A TPU's compiler takes two to three times as long over a sort.
    """
    tokens, each = experts_CK.shape
    chosen_CKE = experts_CK[..., None] == jnp.arange(experts)
    has_CE = (jnp.any(chosen_CKE, axis=1) & real_C[:, None]).astype(jnp.int32)
    counts_E = jnp.sum(has_CE, axis=0)
    before_E = jnp.cumsum(counts_E) - counts_E
    places_CE = before_E + jnp.cumsum(has_CE, axis=0) - has_CE
    places_CK = jnp.sum(chosen_CKE * places_CE[:, None, :], axis=-1)
    padding_C = (~real_C).astype(jnp.int32)
    last_C1 = (jnp.sum(counts_E) + each * (jnp.cumsum(padding_C) - padding_C))[:, None]
    places_CK = jnp.where(real_C[:, None], places_CK, last_C1 + jnp.arange(each))
    rows = jnp.arange(tokens * each, dtype=jnp.int32)
    rows_R = jnp.zeros_like(rows).at[places_CK.reshape(-1)].set(rows, unique_indices=True)
    return _Order(rows_R, places_CK, counts_E, real_C)


def _grouped(x_RX: jax.Array, kernel_EXY: jax.Array, order: _Order) -> jax.Array:
    """Multiply each expert's rows with its matrix; what rows of padding get is undefined."""
    return jax.lax.ragged_dot(x_RX, kernel_EXY, order.counts_E, preferred_element_type=x_RX.dtype)


@jax.custom_vjp
def _sent(x_CD: jax.Array, factors_CK: jax.Array, order: _Order) -> tuple[jax.Array, jax.Array]:
    """Copy each token, and the factors of its experts, to its places in the order: (R, D) and (R,).

    The gradient collects from these places, as `_returned` does. JAX's own would be a scatter of whole tokens.
    """
    return x_CD[order.rows_R // factors_CK.shape[1]], factors_CK.reshape(-1)[order.rows_R]


def _sent_backward(order: _Order, grads: tuple[jax.Array, jax.Array]):
    x_RD, factors_R = grads
    collected = jnp.where(order.real_C[:, None], factors_R[order.places_CK], 0)
    return _collected(x_RD, order).astype(x_RD.dtype), collected, None


_sent.defvjp(lambda x_CD, factors_CK, order: (_sent(x_CD, factors_CK, order), order), _sent_backward)


@jax.custom_vjp
def _returned(out_RD: jax.Array, order: _Order) -> jax.Array:
    """Sum the results of each token's experts, (C, D) float32; padding gets zeros."""
    return _collected(out_RD, order)


def _returned_backward(residuals: tuple[_Order, np.ndarray], grad_CD: jax.Array):
    order, like = residuals
    each = order.places_CK.shape[1]
    return grad_CD.astype(like.dtype)[order.rows_R // each], None


def _collected(x_RD: jax.Array, order: _Order) -> jax.Array:
    """Sum the rows of each token in float32; whatever the rows of padding hold is left out."""
    places = x_RD[order.places_CK].astype(jnp.float32)
    return jnp.where(order.real_C[:, None], jnp.sum(places, axis=1), 0)


_returned.defvjp(
    lambda out_RD, order: (_returned(out_RD, order), (order, np.zeros((), out_RD.dtype))), _returned_backward
)

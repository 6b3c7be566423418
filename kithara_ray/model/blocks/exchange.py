"""Tokens sent to the devices that hold their experts, and their results sent back.

    C  tokens of one device    K  experts of a token    R = C * K  rows    D  hidden width
    X  devices on the axis `expert`    F = E / X  experts of one device    S  rows for one device in one round

A device's rows stand in the order of their experts, so those for one device follow each other. In a round, each device
sends up to S rows to every other, computes its experts for the rows that it received, and sends the results back. There
are as many rounds as the fullest device needs, so no row is dropped, and memory does not grow with uneven choices. With
an even choice there is one round. `jax.lax.ragged_all_to_all` would take one round for any choice, into buffers for
the most uneven one: X times as large.

The number of rounds is known on the devices only. JAX does not differentiate such a loop, so its gradient is a loop of
its own, which computes each round again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "expert"
# Rows that a device may send to another in one round, as a multiple of an even choice.
_ROOM = 1.25
# The kernel of `ragged_dot` on a TPU takes this many rows at a time.
_ROWS_MULTIPLE = 128


@dataclass(frozen=True)
class Rows:
    """A device's rows in the order of their experts; the rows of padding come last and belong to none.

    Attributes:
        rows_R: for each place in the order, the number of its row: K * token + the number of the expert's place.
        places_CK: for each token and each of its experts, the place in the order.
        counts_E: rows of each expert.
        experts_CK: the experts of each token.
        real_C: False for padding.
    """

    rows_R: jax.Array
    places_CK: jax.Array
    counts_E: jax.Array
    experts_CK: jax.Array
    real_C: jax.Array


@dataclass(frozen=True)
class Received:
    """Rows that a device has received, in the order of its experts.

    Attributes:
        counts_E: rows of each expert of the device; rows after their sum belong to none.
        experts_R: the device's own number of each row's expert.
    """

    counts_E: jax.Array
    experts_R: jax.Array


jax.tree_util.register_dataclass(Rows)
jax.tree_util.register_dataclass(Received)

# Computes the results of sorted rows, (R, D), from the rows, their factors (R,), their order, and the experts' arrays;
# what it returns for rows of no expert is ignored.
Products = Callable[..., jax.Array]


def exchanged(
    products: Products,
    axes: tuple[str, ...],
    x_CD: jax.Array,
    factors_CK: jax.Array,
    rows: Rows,
    trained: Any,
    frozen: Any,
) -> jax.Array:
    """Compute the weighted sum of each token's experts, (C, D) float32; runs on each device under `shard_map`.

    Args:
        products: computes the rows of a device's own experts with (trained, frozen).
        axes: the mesh's axes over which any array differs; all their devices take part in all rounds.
        factors_CK: the factors of the experts' results.
        trained, frozen: the experts' arrays of this device, (F, ...); only `trained` get a gradient.
    """
    ways = jax.lax.axis_size(AXIS)
    tokens, chosen = factors_CK.shape
    size = rows_of_round(tokens, chosen, ways)
    sent_XF = rows.counts_E.reshape(ways, -1)
    counts = sent_XF, jax.lax.all_to_all(sent_XF, AXIS, 0, 0)
    most = jnp.max(jnp.sum(sent_XF, axis=1))
    rounds = jax.lax.pmax(_varying(-(-most // size), axes), axes)

    def loop(add: Callable, shapes: Any, rounds: jax.Array) -> Any:
        zeros = jax.tree.map(lambda leaf: _varying(jnp.zeros(leaf.shape, jnp.float32), axes), shapes)
        return jax.lax.while_loop(
            lambda state: state[0] < rounds, lambda state: (state[0] + 1, add(*state)), (jnp.int32(0), zeros)
        )[1]

    def one(number, given, fixed):
        (x_CD, factors_CK, trained), (rows, counts, frozen, _) = given, fixed
        return _round(partial(products, arrays=(trained, frozen)), size, number, x_CD, factors_CK, rows, counts)

    @jax.custom_vjp
    def run(given, fixed):
        return loop(lambda number, total: total + one(number, given, fixed), given[0], fixed[-1])

    def backward(kept, grad_CD):
        given, fixed = kept

        def add(number, totals):
            (grads,) = jax.vjp(lambda given: one(number, given, fixed), given)[1](grad_CD)
            return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), totals, grads)

        return jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), loop(add, given, fixed[-1]), given), None

    run.defvjp(lambda given, fixed: (run(given, fixed), (given, fixed)), backward)
    # The gradient of an array that does not differ over an axis is the sum over it.
    varying = partial(jax.tree.map, partial(_varying, axes=axes))
    return run(varying((x_CD, factors_CK, trained)), (*varying((rows, counts, frozen)), rounds))


def rows_of_round(tokens: int, chosen: int, ways: int) -> int:
    """S: the most rows that a device sends to each of `ways` devices in one round."""
    even = math.ceil(_ROOM * tokens * chosen / ways)
    return min(tokens * chosen, -(-even // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)


def _round(
    products: Callable[[jax.Array, jax.Array, Received], jax.Array],
    size: int,
    number: jax.Array,
    x_CD: jax.Array,
    factors_CK: jax.Array,
    rows: Rows,
    counts: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Compute what one round adds to each token, (C, D) float32.

    Args:
        number: number of the round.
        counts: rows that this device sends to, and gets from, each device for each of its experts, (X, F).
    """
    (sent_XF, got_XF), first = counts, number * size
    of_tokens, of_rows = _sending(sent_XF, first, size, rows)
    order, received = _receiving(got_XF, first, size)

    def swapped(array):
        return jax.lax.all_to_all(array.reshape(-1, size, *array.shape[1:]), AXIS, 0, 0).reshape(array.shape)

    x_ND = _spread(swapped(_spread(x_CD, of_tokens)), order)
    factors_N1 = _spread(swapped(_spread(factors_CK.reshape(-1, 1), of_rows)), order)
    out_ND = _collect(products(x_ND, factors_N1[:, 0], received), order).astype(x_CD.dtype)
    return _collect(swapped(out_ND), of_tokens)


def _sending(sent_XF: jax.Array, first: jax.Array, size: int, rows: Rows) -> "tuple[_Moves, _Moves]":
    """The places (X, S) that tokens, and rows, are sent to in the round that begins at each device's row `first`."""
    (ways, own), each = sent_XF.shape, rows.places_CK.shape[1]
    total_X = jnp.sum(sent_XF, axis=1)
    start_X = jnp.cumsum(total_X) - total_X
    within_XS = jnp.broadcast_to(first + jnp.arange(size), (ways, size))
    is_used_N = (within_XS < total_X[:, None]).reshape(-1)
    row_N = rows.rows_R[jnp.minimum(start_X[:, None] + within_XS, len(rows.rows_R) - 1).reshape(-1)]
    device_CK = rows.experts_CK // own
    slot_CK = rows.places_CK - start_X[device_CK] - first
    is_there_CK = rows.real_C[:, None] & (slot_CK >= 0) & (slot_CK < size)
    place_CK = device_CK * size + jnp.clip(slot_CK, 0, size - 1)
    of_tokens = _Moves(row_N // each, is_used_N, place_CK, is_there_CK)
    return of_tokens, _Moves(row_N, is_used_N, place_CK.reshape(-1, 1), is_there_CK.reshape(-1, 1))


def _receiving(got_XF: jax.Array, first: jax.Array, size: int) -> "tuple[_Moves, Received]":
    """The places, in the order of this device's experts, of the rows (X, S) that a round brings."""
    ways, own = got_XF.shape
    end_XF = jnp.cumsum(got_XF, axis=1)
    # The slots that hold an expert's rows from a device: from `low` to before `high`.
    low_XF, high_XF = (jnp.clip(bound - first, 0, size) for bound in (end_XF - got_XF, end_XF))
    here_XF = high_XF - low_XF
    counts_F = jnp.sum(here_XF, axis=0)
    before_XF = jnp.cumsum(counts_F) - counts_F + jnp.cumsum(here_XF, axis=0) - here_XF
    slot_S1 = jnp.arange(size)[:, None]
    has_XSF = (slot_S1 >= low_XF[:, None]) & (slot_S1 < high_XF[:, None])
    is_got_N = jnp.any(has_XSF, axis=-1).reshape(-1)
    place_N = jnp.sum(has_XSF * (before_XF - low_XF)[:, None] + has_XSF * slot_S1, axis=-1).reshape(-1)
    expert_N = jnp.sum(has_XSF * jnp.arange(own), axis=-1).reshape(-1)
    place_N = jnp.where(is_got_N, place_N, jnp.sum(counts_F) + jnp.cumsum(~is_got_N) - 1)
    numbers_N = jnp.arange(ways * size)
    row_N = jnp.zeros_like(place_N).at[place_N].set(numbers_N.astype(place_N.dtype), unique_indices=True)
    moves = _Moves(row_N, numbers_N < jnp.sum(counts_F), place_N[:, None], is_got_N[:, None])
    return moves, Received(counts_F, expert_N[row_N])


def _varying(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The same array, which the compiler takes to differ over all of these axes."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(array).manual_axis_type.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array


@dataclass(frozen=True)
class _Moves:
    """A copy of some rows to other places, and the way back. N places, of A rows; a row has up to M places.

    Attributes:
        row_N, is_used_N: the row that a place gets; False for a place that gets none.
        place_AM, is_there_AM: the places of a row; False where there is none.
    """

    row_N: jax.Array
    is_used_N: jax.Array
    place_AM: jax.Array
    is_there_AM: jax.Array


jax.tree_util.register_dataclass(_Moves)


@jax.custom_vjp
def _spread(x_AD: jax.Array, moves: _Moves) -> jax.Array:
    """Copy rows to their places, (N, D); unused places get zeros. The gradient is `_collect`: no scatter."""
    return jnp.where(moves.is_used_N[:, None], x_AD[moves.row_N], 0)


@jax.custom_vjp
def _collect(y_ND: jax.Array, moves: _Moves) -> jax.Array:
    """Sum the places of each row in float32, (A, D); whatever unused places hold is left out."""
    found_AMD = y_ND[moves.place_AM].astype(jnp.float32)
    return jnp.sum(jnp.where(moves.is_there_AM[..., None], found_AMD, 0), axis=1)


def _spread_forward(x_AD, moves):
    return _spread(x_AD, moves), (moves, jnp.zeros((), x_AD.dtype))


def _collect_forward(y_ND, moves):
    return _collect(y_ND, moves), (moves, jnp.zeros((), y_ND.dtype))


_spread.defvjp(_spread_forward, lambda kept, grad: (_collect(grad, kept[0]).astype(kept[1].dtype), None))
_collect.defvjp(_collect_forward, lambda kept, grad: (_spread(grad, kept[0]).astype(kept[1].dtype), None))

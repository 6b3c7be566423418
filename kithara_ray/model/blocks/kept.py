"""The arrays that a block keeps for its backward pass, under each policy of `options.REMAT`."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from kithara_ray.model.options import OFFLOAD

# Names of the arrays that a policy may keep: a block's input; rotated queries and keys, and values; attention's output,
# and on a TPU the logarithm of its normaliser, from which the backward kernel restores the softmax; the result of
# attention's last product; and the results of experts' first products. Their last product's result is never needed
# again, because rows are weighed before it.
INPUT = "block input"
INPUTS = "attention inputs"
RESIDUALS = "attention residuals"
RESULT = "attention result"
PRODUCTS = "experts' products"

_PROJECTIONS = (INPUTS, RESIDUALS, RESULT)
POLICIES = {
    "block": None,
    "attention": jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    "projections": jax.checkpoint_policies.save_only_these_names(*_PROJECTIONS),
    OFFLOAD: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT, *_PROJECTIONS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(INPUTS, RESIDUALS, PRODUCTS),
    ),
    "nested": None,
}


def with_named_result(call: Callable, *args, **kwargs):
    """Call an attention layer, and name its result, which may come with a cache."""
    result = call(*args, **kwargs)
    if isinstance(result, tuple):
        return checkpoint_name(result[0], RESULT), *result[1:]
    return checkpoint_name(result, RESULT)

"""Least compute and traffic of a step, from the model only: the measure for a compiled program.

    N  parameters that a token is multiplied with    r  rank    T  positions of a row    K  predictions of a row

All FLOPs are per token; a multiply-add counts as two. With frozen weights the backward pass computes the gradient of
each product's input but not of its weight: 2N, the same as forward. It computes both if all weights are trained: 4N.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kithara_ray.model.options import (
    KEEPS_ATTENTION,
    KEEPS_INPUTS,
    KEEPS_PROJECTIONS,
    OFFLOAD,
    chunk_length,
    fuses_backward,
    groups_of,
)


@dataclass(frozen=True)
class Counts:
    """Sizes counted from a built model.

    Attributes:
        blocks: elements of all matrices in decoder blocks that a token is multiplied with; of experts, those that it
            is sent to.
        head: elements of the head's matrix.
        lora: elements of all factors.
        attention: (query heads, head width, window or None) of each block with attention. What blocks with a recurrent
            state do besides products with matrices is not counted; for qwen3_5 it is 1 % of a token's FLOPs.
        hidden: width between blocks.
        layers: number of decoder blocks; `steps` is the number of steps of the scan over them.
        weights_bytes: bytes of all weights, as the base stores them.
        blocks_bytes: bytes of the frozen arrays in decoder blocks.
        widest_bytes: bytes of the frozen arrays of the largest decoder block.
        intermediate: elements per token of the widest activation inside a block.
        parameters: elements of all frozen arrays.
        share: the least share of its experts that a routed mixture sends a token to; 1.0 if nothing is routed.
        idle: elements of the factors of experts that a token is not sent to, of `lora`.
        experts_bytes: bytes of the experts' kernels.
        experts: number of experts of a mixture, of several their greatest common divisor; 0 without experts.
        sent: elements of a token that are sent to its experts, over all mixtures.
        mixing: elements of the matrices of attention, which are part of `blocks`.
        trains_weights: True if all weights are trained.
        held_bytes: bytes of all weights as the run holds them, if these are not `weights_bytes`.
    """

    blocks: int
    head: int
    lora: int
    attention: tuple[tuple[int, int, int | None], ...]
    hidden: int
    layers: int
    steps: int
    weights_bytes: int
    blocks_bytes: int
    widest_bytes: int
    intermediate: int
    parameters: int
    share: float = 1.0
    idle: int = 0
    experts_bytes: int = 0
    experts: int = 0
    sent: int = 0
    mixing: int = 0
    trains_weights: bool = False
    held_bytes: int | None = None


def flops_per_token(counts: Counts, seq_len: int, predictions: int, remat: str) -> dict[str, float]:
    """FLOPs per token of the ideal program under this remat policy, by term.

    `attention` covers the scores and the weighted sum over the keys that a causal row sees, as often as the policy's
    program computes them.
    """
    attended = sum(heads * width * seen_pairs(seq_len, window) / seq_len for heads, width, window in counts.attention)
    share = predictions / seq_len
    again, gradients = _forward_again(counts, remat), 2 if counts.trains_weights else 1
    terms = {
        "forward": 2.0 * counts.blocks,
        "backward": 2.0 * counts.blocks * gradients,
        "recompute": 2.0 * counts.blocks * again,
        "attention": 2.0 * attended * _attention_products(remat, seq_len),
        "lora": 2.0 * (counts.lora - counts.idle) * _lora_passes(remat),
        "head": 2.0 * counts.head * share * (1 + gradients),
    }
    return terms | {"total": sum(terms.values())}


# How often a policy runs a block's forward pass again; of attention's own products those in `_KEEPS_PRODUCTS` none.
_FORWARD_AGAIN = {"block": 1, "attention": 1, "projections": 1, "offload": 1, "dots": 0, "nested": 2}
# Products of attention's size: the scores and the weighted sum forward; backward the scores again, the gradient of the
# softmax, and those of q, k and v. Two kernels instead of one compute the scores and the softmax's gradient twice.
_FORWARD, _BACKWARD_FUSED, _BACKWARD_SPLIT = 2, 5, 7


def _forward_again(counts: Counts, remat: str) -> float:
    """Return how often a block's products run again, the mean over all of them."""
    kept = counts.mixing / counts.blocks if remat in KEEPS_PROJECTIONS else 0.0
    return max(0.0, _FORWARD_AGAIN[remat] - kept)


def _lora_passes(remat: str) -> int:
    """Return how often factors are multiplied: forward, backward for two gradients, and again."""
    return 3 + _FORWARD_AGAIN[remat]


def _attention_products(remat: str, seq_len: int) -> int:
    backward = _BACKWARD_FUSED if fuses_backward(remat, seq_len) else _BACKWARD_SPLIT
    forward = 1 if remat in KEEPS_ATTENTION else 1 + _FORWARD_AGAIN[remat]
    return forward * _FORWARD + backward


def model_flops_per_token(terms: Mapping[str, float], remat: str, seq_len: int) -> float:
    """FLOPs that count for MFU: those of the model, without recomputation."""
    lora = terms["lora"] * 3 / _lora_passes(remat)
    attention = terms["attention"] * (_FORWARD + _BACKWARD_FUSED) / _attention_products(remat, seq_len)
    return terms["forward"] + terms["backward"] + terms["head"] + lora + attention


def kernel_flops(name: str, counts: Counts, seq_len: int, rows: int, fused: bool = False) -> float:
    """FLOPs of one run of a splash kernel over `rows` rows, the mean over blocks with attention; 0 for an unknown one.

    Args:
        fused: the kernel that computes dk and dv computes dq as well.
    """
    products = next((n for part, n in (("_fwd", 2), ("_dkv", 5 if fused else 4), ("_dq", 3)) if part in name), 0)
    each = sum(heads * width * seen_pairs(seq_len, window) for heads, width, window in counts.attention)
    return 2.0 * products * rows * each / len(counts.attention)


def seen_pairs(seq_len: int, window: int | None) -> float:
    """Number of (token, token it sees) pairs in a causal row; a token sees itself."""
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) / 2
    return window * (window + 1) / 2 + (seq_len - window) * window


def least_collective_bytes(
    counts: Counts, mesh: Mapping[str, int], adapter_bytes: int, tokens: float, activation_bytes: int, remat: str
) -> float:
    """Least bytes that a step moves to each device: every weight that is split and gathered, once forward and once
    backward; the adapter's gradients once over all devices; and with an axis `expert` the tokens, to their experts and
    back, in each pass over a block. If all weights are trained, each device receives the sums of its own part's
    gradients.

    Args:
        adapter_bytes: bytes of all trained arrays.
        mesh: the sizes of the mesh's axes.
        tokens: tokens of one device in a step.
        activation_bytes: bytes of one element of a token.
    """
    devices, expert = math.prod(mesh.values()), mesh.get("expert", 1)
    split = devices // mesh["data"]
    weights, of_experts, gradients = (2 * (parts - 1) / parts for parts in (split, split // expert, devices))
    held = counts.weights_bytes if counts.held_bytes is None else counts.held_bytes
    gathered = weights * (held - counts.experts_bytes) + of_experts * counts.experts_bytes / expert
    passes = 2 + _FORWARD_AGAIN[remat]
    sent = 2 * passes * tokens * counts.sent * activation_bytes * (expert - 1) / expert
    if counts.trains_weights:
        return 1.5 * gathered + sent + 2 * (mesh["data"] - 1) / mesh["data"] * adapter_bytes / split
    return gathered + sent + gradients * adapter_bytes


def bytes_by_expert_axis(counts: Counts, mesh: Mapping[str, int], *step) -> dict[str, float]:
    """The same for each size of the axis `expert` that divides the experts, with `fsdp` for the other devices.

    A model without experts has none.
    """
    shared = mesh["fsdp"] * mesh.get("expert", 1)
    ways = math.gcd(counts.experts, shared) if counts.experts else 1
    sizes = [size for size in range(1, ways + 1) if ways % size == 0] if ways > 1 else []
    of = lambda size: least_collective_bytes(counts, {**mesh, "fsdp": shared // size, "expert": size}, *step)  # noqa: E731
    return {str(size): of(size) for size in sizes}


def estimated_temporaries(
    counts: Counts, seq_len: int, rows: int, tensor: int, activation_bytes: int, remat: str
) -> float:
    """Rough upper bound of the temporaries, for a step that could not be compiled.

    It adds up: the kept activations; a block's activations, the widest for one chunk only; the gathered weights of two
    blocks, since one computes while the next is fetched; one chunk of logits with its gradient.
    """
    chunk = rows * chunk_length(rows, seq_len, remat, counts.share)
    inside = (6 * chunk * counts.intermediate + 14 * rows * seq_len * counts.hidden) * activation_bytes / tensor
    kept = kept_bytes(counts, seq_len, rows, activation_bytes, remat)
    return kept + inside + 2 * counts.widest_bytes / tensor + 3 * 2**26


def kept_bytes(counts: Counts, seq_len: int, rows: int, activation_bytes: int, remat: str) -> int:
    """Bytes, on one device, of what blocks keep for the backward pass in the device's memory."""
    return 0 if remat == OFFLOAD else _kept_bytes(counts, seq_len, rows, activation_bytes, remat)


def host_bytes(counts: Counts, seq_len: int, rows: int, activation_bytes: int, remat: str) -> int:
    """Bytes of what the blocks on one device keep in its host's memory."""
    return _kept_bytes(counts, seq_len, rows, activation_bytes, remat) if remat == OFFLOAD else 0


def _kept_bytes(counts: Counts, seq_len: int, rows: int, activation_bytes: int, remat: str) -> int:
    if remat == "nested":
        groups = groups_of(counts.steps)
        return (groups + counts.layers // groups) * rows * seq_len * counts.hidden * activation_bytes
    width = counts.layers * counts.hidden
    attended = sum(heads * head_width for heads, head_width, _ in counts.attention)
    heads = sum(heads for heads, _, _ in counts.attention)
    # Queries, keys and values: what attention's matrices give from `hidden` numbers, without its last matrix.
    inputs = max(0, counts.mixing // counts.hidden - attended)
    elements = width
    elements += attended if remat in KEEPS_ATTENTION else 0
    elements += inputs if remat in KEEPS_INPUTS else 0
    elements += width if remat in KEEPS_PROJECTIONS else 0
    # Each matrix takes about `hidden` numbers: of the few that take more, the results are fewer than counted.
    elements += counts.blocks // counts.hidden if remat == "dots" else 0
    # The logarithm of each head's normaliser is a float32.
    return rows * seq_len * (elements * activation_bytes + (4 * heads if remat in KEEPS_ATTENTION else 0))

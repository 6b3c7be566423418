"""What a step must compute and move, in terms of the model alone: the measure that a compiled program is held to.

    N  parameters that a token is multiplied with    r  rank    T  positions of a row    K  predictions of a row

All FLOPs are for a token, two to a multiply-add. With frozen weights the backward pass computes the gradient of each
product's input and not of its weight: 2N, as forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kithara_ray.model.options import chunk_length, groups_of


@dataclass(frozen=True)
class Counts:
    """What is counted of a built model.

    Attributes:
        blocks: elements of all matrices in decoder blocks that a token is multiplied with.
        head: elements of the head's matrix.
        lora: elements of all factors.
        attention: for each block (query heads, head width, window or None).
        hidden: width between blocks.
        layers: decoder blocks; `steps` of the scan over them.
        weights_bytes: of all frozen arrays, as stored.
        blocks_bytes: of those in decoder blocks.
        widest_bytes: of the frozen arrays of the largest decoder block.
        intermediate: the widest activation inside a block, in elements of a token.
        parameters: elements of all frozen arrays.
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


def flops_per_token(counts: Counts, seq_len: int, predictions: int, remat: str) -> dict[str, float]:
    """By term: of the ideal program under this remat policy.

    `attention` is the scores and the weighted sum over what a causal row sees, forward, once more under remat, and
    backward with the scores computed again in each of its two kernels.
    """
    attended = sum(heads * width * seen_pairs(seq_len, window) / seq_len for heads, width, window in counts.attention)
    share = predictions / seq_len
    again = {"block": 1, "dots": 0, "nested": 2}[remat]
    # Scores and weighted sum are two products; backward has seven: scores and their gradient in both kernels, and
    # the gradients of q, k and v.
    terms = {
        "forward": 2.0 * counts.blocks,
        "backward": 2.0 * counts.blocks,
        "recompute": 2.0 * counts.blocks * again,
        "attention": 2.0 * attended * (2 + 2 * max(1, again) + 7),
        "lora": 2.0 * counts.lora * (3 + again),
        "head": 4.0 * counts.head * share,
    }
    return terms | {"total": sum(terms.values())}


def model_flops_per_token(terms: Mapping[str, float]) -> float:
    """What counts for MFU: nothing that is computed again."""
    again = terms["recompute"] / terms["forward"]
    lora, attention = terms["lora"] * 3 / (3 + again), terms["attention"] * 7 / (9 + 2 * max(1, again))
    return terms["forward"] + terms["backward"] + terms["head"] + lora + attention


def kernel_flops(name: str, counts: Counts, seq_len: int, rows: int) -> float:
    """Of one run of a splash kernel over `rows` rows, the mean over the blocks; 0 of an unknown one."""
    products = next((n for part, n in (("_fwd", 2), ("_dkv", 4), ("_dq", 3)) if part in name), 0)
    each = sum(heads * width * seen_pairs(seq_len, window) for heads, width, window in counts.attention)
    return 2.0 * products * rows * each / counts.layers


def seen_pairs(seq_len: int, window: int | None) -> float:
    """Pairs of a token and one that it sees in a causal row, itself included."""
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) / 2
    return window * (window + 1) / 2 + (seq_len - window) * window


def least_collective_bytes(counts: Counts, ways: int, adapter_bytes: int) -> float:
    """What fully sharded training moves to each device at least: every weight once forward and once for the backward
    pass, and the adapter's gradients once."""
    share = (ways - 1) / ways
    return share * (2 * counts.weights_bytes + 2 * adapter_bytes)


def estimated_temporaries(
    counts: Counts, seq_len: int, rows: int, tensor: int, activation_bytes: int, remat: str
) -> float:
    """A rough upper figure for where nothing could be compiled: what is kept, a block's activations, of the widest one
    chunk, the weights of two blocks gathered (one computes while the next is fetched), one chunk of logits with its
    gradient."""
    chunk = rows * chunk_length(rows, seq_len, remat)
    inside = (6 * chunk * counts.intermediate + 14 * rows * seq_len * counts.hidden) * activation_bytes / tensor
    kept = kept_bytes(counts, seq_len, rows, activation_bytes, remat)
    return kept + inside + 2 * counts.widest_bytes / tensor + 3 * 2**26


def kept_bytes(counts: Counts, seq_len: int, rows: int, activation_bytes: int, remat: str) -> int:
    """Block inputs that are kept for the backward pass, on one device."""
    blocks = counts.layers
    if remat == "nested":
        groups = groups_of(counts.steps)
        blocks = groups + counts.layers // groups
    return blocks * rows * seq_len * counts.hidden * activation_bytes

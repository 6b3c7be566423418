"""Read MXFP4 tensors of a checkpoint: blocks of 32 four-bit values that share a scale, a power of two.

    <name>_blocks  (E, O, G, 16) uint8, two values per byte, the lower four bits first
    <name>_scales  (E, O, G) uint8, the exponent, biased by 127

Together they encode a tensor <name> of (E, I, O) with I = 32 * G, as for gpt-oss' experts. Every value is also a
bfloat16 value, so dequantising changes none. Source: Open Compute Project, Microscaling Formats (MX) v1.0.
"""

import numpy as np

from kithara_ray.errors import CheckpointError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
_BIAS = 127
# E2M1: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


class Packed:
    """A tensor (E, I, O) in bfloat16; a slice of it reads and dequantises only the groups that it touches."""

    dtype = NUMPY_DTYPES["BF16"]

    def __init__(self, name: str, blocks: np.ndarray, scales: np.ndarray):
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape != (*scales.shape, GROUP // 2):
            raise CheckpointError(
                f"{name}: blocks of {blocks.dtype} {blocks.shape} and scales of {scales.dtype} {scales.shape} are not "
                "MXFP4; fetch the checkpoint again"
            )
        experts, rows, groups = scales.shape
        self.shape = (experts, groups * GROUP, rows)
        self._blocks, self._scales = blocks, scales

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, columns, rows = index
        begin, end, _ = columns.indices(self.shape[1])
        groups = slice(begin // GROUP, -(-end // GROUP))
        blocks_EOGB, scales_EOG = self._blocks[experts, rows, groups], self._scales[experts, rows, groups]
        nibbles = np.stack([blocks_EOGB & 0xF, blocks_EOGB >> 4], axis=-1).reshape(*scales_EOG.shape, GROUP)
        values = np.ldexp(_VALUES[nibbles], scales_EOG.astype(np.int32)[..., None] - _BIAS).astype(self.dtype)
        values_EOI = values.reshape(*values.shape[:2], -1)
        skipped = groups.start * GROUP
        return values_EOI[..., begin - skipped : end - skipped].swapaxes(1, 2)


def names_of(base: BaseCheckpoint, name: str) -> tuple[str, ...]:
    """Return the tensors of the checkpoint that hold `name`: itself, or its blocks and scales."""
    packed = (name + BLOCKS, name + SCALES)
    return packed if name not in base.tensors and packed[0] in base.tensors else (name,)


def view(base: BaseCheckpoint, name: str) -> np.ndarray | Packed:
    """Return the tensor. Slicing it reads and dequantises only the slice."""
    tensors = [base.view(each) for each in names_of(base, name)]
    return tensors[0] if len(tensors) == 1 else Packed(name, *tensors)


def shape_of(base: BaseCheckpoint, name: str) -> tuple[int, ...]:
    """Return the tensor's shape from headers only."""
    names = names_of(base, name)
    if len(names) == 1:
        return base.info(name).shape
    experts, rows, groups = base.info(names[1]).shape
    return (experts, groups * GROUP, rows)

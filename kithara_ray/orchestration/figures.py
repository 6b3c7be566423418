"""What a step's speed is against the chips, and what it holds in their memory."""

import jax

from kithara_ray.plan.chips import chip_of_kind

# Forward and backward pass; a frozen weight needs no gradient of its own, only that of what it is given.
_FLOPS_PER_PARAMETER = {True: 4, False: 6}


class Figures:
    """Args:
    parameters: of the whole model, N; 4N FLOPs a token where an adapter is trained, 6N for all weights.
    is_lora: whether an adapter is trained.
    devices: of all hosts.
    """

    def __init__(self, parameters: int, is_lora: bool, devices: int):
        chip = chip_of_kind(jax.local_devices()[0].device_kind)
        self._flops_per_token = _FLOPS_PER_PARAMETER[is_lora] * parameters
        self._peak = chip.flops_per_s * devices if chip is not None else None

    def of(self, tokens_per_s: float) -> dict[str, float]:
        """mfu, of real tokens, where the chip is known; hbm_bytes, the most that a device of this host has held, and
        hbm_limit_bytes, where the backend tells."""
        figures = {}
        if self._peak is not None:
            figures["mfu"] = tokens_per_s * self._flops_per_token / self._peak
        stats = [device.memory_stats() for device in jax.local_devices()]
        if all(stats):
            fullest = max(stats, key=lambda told: told.get("peak_bytes_in_use", 0))
            figures["hbm_bytes"] = fullest.get("peak_bytes_in_use", 0)
            figures["hbm_limit_bytes"] = fullest.get("bytes_limit", 0)
        return figures

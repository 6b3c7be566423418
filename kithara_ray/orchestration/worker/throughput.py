"""The numbers of steps: metrics, speed, share of the chips' peak, and use of the chips' memory."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax

from kithara_ray.plan.chips import chip_of_kind

# Forward and backward pass. A frozen weight needs no gradient of its own, only the gradient of its input.
_FLOPS_PER_PARAMETER = {True: 4, False: 6}


class Figures:
    """A run's use of the chips, computed from its speed.

    Args:
        parameters: number N of the parameters that compute a token; 4N FLOPs per token to train an adapter, 6N for
            all weights.
        is_lora: True if an adapter is trained.
        devices: number of devices of all hosts.
    """

    def __init__(self, parameters: int, is_lora: bool, devices: int):
        chip = chip_of_kind(jax.local_devices()[0].device_kind)
        self._flops_per_token = _FLOPS_PER_PARAMETER[is_lora] * parameters
        self._peak = chip.flops_per_s * devices if chip is not None else None

    def of(self, tokens_per_s: float) -> dict[str, float]:
        """Return mfu, from real tokens, if the chip is known; and if the backend reports them, hbm_bytes, the peak of a
        device of this host, and hbm_limit_bytes."""
        figures = {}
        if self._peak is not None:
            figures["mfu"] = tokens_per_s * self._flops_per_token / self._peak
        stats = [device.memory_stats() for device in jax.local_devices()]
        if all(stats):
            fullest = max(stats, key=lambda told: told.get("peak_bytes_in_use", 0))
            figures["hbm_bytes"] = fullest.get("peak_bytes_in_use", 0)
            figures["hbm_limit_bytes"] = fullest.get("bytes_limit", 0)
        return figures


def numbers_of(metrics: Mapping[str, jax.Array], mixture_blocks: Sequence[int]) -> dict[str, float]:
    """Return a step's metrics as numbers; this waits for the step.

    Args:
        mixture_blocks: numbers of the decoder blocks with experts. "expert_load" becomes "expert_load/<number>" of
            each, and "expert_load", the largest of them.
    """
    arrays = jax.device_get(dict(metrics))
    loads = arrays.pop("expert_load", None)
    numbers = {name: float(value) for name, value in arrays.items()}
    if loads is not None:
        numbers["expert_load"] = float(max(loads))
        names = (f"expert_load/{number:02d}" for number in mixture_blocks)
        numbers |= {name: round(float(load), 3) for name, load in zip(names, loads, strict=True)}
    return numbers


class Window:
    """The steps since the last logged one, by this rank's clock.

    Attributes:
        total_input_wait_s: seconds that steps have waited for data, over all windows.

    Args:
        step: number of steps so far.
    """

    def __init__(self, step: int):
        self.total_input_wait_s = 0.0
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._first, self._tokens, self._wait_s, self._mark = step, 0, 0.0, time.monotonic()

    def add(self, tokens: int) -> None:
        """Add a step of `tokens` real tokens over all hosts."""
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for the next batch."""
        began = time.monotonic()
        yield
        waited = time.monotonic() - began
        self._wait_s += waited
        self.total_input_wait_s += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave work out of the steps' time; the devices must have finished the steps before it."""
        began = time.monotonic()
        yield
        self._mark += time.monotonic() - began

    def close(self, step: int) -> dict[str, float]:
        """Return tokens per second, and seconds and input wait per step, up to `step`; then begin the next window."""
        seconds, steps = time.monotonic() - self._mark, step - self._first
        row = {
            "tokens_per_s": self._tokens / seconds,
            "step_time_s": seconds / steps,
            "input_wait_s": self._wait_s / steps,
        }
        self._begin(step)
        return row

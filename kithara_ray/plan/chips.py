"""TPU chips and slices: the vendor's published figures and the compiler's limits.

| generation | peak bf16, HBM, HBM bandwidth, interconnect                         |
|------------|---------------------------------------------------------------------|
| v4         | https://docs.cloud.google.com/tpu/docs/v4    (read 2026-11)         |
| v5e        | https://docs.cloud.google.com/tpu/docs/v5e   (read 2026-11)         |
| v5p        | https://docs.cloud.google.com/tpu/docs/v5p-training (read 2026-11)  |
| v6e        | https://docs.cloud.google.com/tpu/docs/v6e   (read 2026-11)         |
| v7x        | https://docs.cloud.google.com/tpu/docs/tpu7x (read 2026-11)         |

The interconnect of v4 is six links of 50 GB/s in each direction, from https://arxiv.org/abs/2304.01433.

`hbm_bytes` is a little less than the published size: libtpu states it as "available HBM" when it refuses a program.
"""

import math
import re
from dataclasses import dataclass

from kithara_ray.errors import ConfigError

_GIB = 2**30
# Rate at which a chip reads its host's memory, or writes it, over PCIe. https://jax-ml.github.io/scaling-book/tpus
# gives 15 GB/s for v6e and 16 for v4 (read 2026-11); other generations are assumed to be no slower.
HOST_BYTES_PER_S = 15e9


@dataclass(frozen=True)
class Chip:
    """The chip of one TPU generation. All rates and sizes are those of one JAX device, which is a chip but for v7x.

    Attributes:
        name: the generation's name, as in `v5e-16` and in JAX's topology names.
        accelerator: prefix of TPU_ACCELERATOR_TYPE.
        hbm_bytes: HBM that a program may use.
        flops_per_s: the published peak for bfloat16 products.
        hbm_bytes_per_s: the published HBM bandwidth.
        ici_bytes_per_s: rate at which a chip can receive from its slice: half the published bidirectional bandwidth.
        dims: number of dims of the slice's torus.
        per_name: units that a slice's name counts per chip (v5p's name counts cores).
        kinds: the `device_kind` strings that JAX reports for this chip.
        devices: JAX devices of a chip.
        ray: the chip's name in Ray's `accelerator_type`, behind "TPU-".
        libtpu: the generation's name in libtpu's topologies.
        config: libtpu's name of the chip's configuration; None is its default. A v4's default has two devices a chip,
            and hosts on Google Cloud run the one that makes both cores one device.
    """

    name: str
    accelerator: str
    hbm_bytes: int
    flops_per_s: float
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    dims: int
    per_name: int = 1
    kinds: tuple[str, ...] = ()
    devices: int = 1
    ray: str = ""
    libtpu: str = ""
    config: str | None = None

    def __post_init__(self):
        for name, default in (("ray", self.accelerator.upper()), ("libtpu", self.name)):
            object.__setattr__(self, name, getattr(self, name) or default)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5litepod", int(15.75 * _GIB), 197e12, 819e9, 200e9, dims=2, kinds=("TPU v5 lite", "TPU v5e")),
        Chip("v6e", "v6e", int(31.25 * _GIB), 918e12, 1638e9, 400e9, dims=2, kinds=("TPU v6 lite", "TPU v6e")),
        Chip("v5p", "v5p", int(95.74 * _GIB), 459e12, 2765e9, 600e9, dims=3, per_name=2, kinds=("TPU v5", "TPU v5p")),
        Chip(
            "v4",
            "v4",
            int(30.75 * _GIB),
            275e12,
            1200e9,
            300e9,
            dims=3,
            per_name=2,
            kinds=("TPU v4",),
            config="megacore",
        ),
        Chip(
            "v7x",
            "tpu7x",
            int(94.75 * _GIB),
            2307e12 / 2,
            7380e9 / 2,
            600e9 / 2,
            dims=3,
            per_name=2,
            kinds=("TPU7x",),
            devices=2,
            ray="V7X",
            libtpu="tpu7x",
        ),
    )
}
_MAX_CHIPS = {"v5e": 256, "v6e": 256, "v5p": 6144, "v4": 2048, "v7x": 2048}


@dataclass(frozen=True)
class Slice:
    """A slice of one generation, or a number of CPU devices.

    Attributes:
        name: e.g. "v5e-16", or "cpu-4".
        chips: its number of chips.
        chip: None for CPU devices and for an unknown generation.
        topology: JAX's name for the slice, e.g. "v5e:4x4"; None without a known chip.
    """

    name: str
    chips: int
    chip: Chip | None
    topology: str | None

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu-")

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def chips_per_host(self) -> int:
        """Chips per host as Ray counts them: a flat torus of up to eight chips is one host; others have four each."""
        return self.chips if self.chip and self.chip.dims == 2 and self.chips <= 8 else min(4, self.chips)

    @property
    def hosts(self) -> int:
        """Number of hosts. CPU devices count as one host, because one process holds them."""
        return 1 if self.is_cpu else -(-self.chips // self.chips_per_host)

    @property
    def accelerator_type(self) -> str:
        """The TPU_ACCELERATOR_TYPE of this slice's hosts."""
        assert self.chip is not None, f"{self.name} is no TPU slice of a known generation"
        return f"{self.chip.accelerator}-{self.chips * self.chip.per_name}"


def slice_of(name: str) -> Slice:
    """Parse a slice's name: `v5e-16`, `v6e-8`, `v5p-8` (four chips of two cores), `v5litepod-16`, `cpu-4`.

    A generation missing from the table gives a slice without a chip. For such a slice, plans are estimates only.

    Raises:
        ConfigError: the name is malformed, or the generation does not come in this number of chips.
    """
    found = re.fullmatch(r"([a-z0-9]+)-(\d+)", name.strip().lower())
    if not found or int(found[2]) < 1:
        raise ConfigError(f"slice must be a name such as v5e-16, v6e-8 or v5p-8, got {name!r}")
    generation = {"v5litepod": "v5e", "tpuv5e": "v5e", "tpu7x": "v7x"}.get(found[1], found[1])
    count = int(found[2])
    chip = CHIPS.get(generation)
    if chip is None:
        return Slice(f"{generation}-{count}", count, None, None)
    sizes = slice_sizes(generation)
    if count not in sizes:
        raise ConfigError(f"slice {name!r}: {generation} comes as {', '.join(f'{generation}-{n}' for n in sizes)}")
    chips = count // chip.per_name
    shape = "x".join(map(str, _torus(chips, chip.dims)))
    return Slice(f"{generation}-{count}", chips, chip, f"{chip.libtpu}:{shape}")


def chip_of_kind(kind: str) -> Chip | None:
    """The chip with this JAX `device_kind`; None for CPUs and for kinds missing from the table."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def slice_sizes(generation: str) -> list[int]:
    """The numbers in the names of a generation's usual slices: powers of two, ascending."""
    chip = CHIPS[generation]
    # A host of a three-dimensional torus has four chips, and no slice is smaller than a host.
    smallest = 1 if chip.dims == 2 else 4
    chips = [2**n for n in range(13) if smallest <= 2**n <= _MAX_CHIPS[generation] and (chip.dims == 3 or n != 1)]
    return [n * chip.per_name for n in chips]


def slice_of_topology(topology: str, accelerator_type: str) -> Slice | None:
    """The slice of Ray's `ScalingConfig(topology="4x4", accelerator_type="TPU-V5LITEPOD")`; None if unknown."""
    generation = accelerator_type.removeprefix("TPU-").lower()
    generation = {"v5litepod": "v5e", "v5e": "v5e"}.get(generation, generation)
    chip = CHIPS.get(generation)
    if chip is None or not re.fullmatch(r"\d+(x\d+)*", topology):
        return None
    chips = math.prod(map(int, topology.split("x")))
    return Slice(f"{generation}-{chips * chip.per_name}", chips, chip, f"{chip.libtpu}:{topology}")


def _torus(chips: int, dims: int) -> list[int]:
    """The usual shape of a slice, as libtpu names it: dims as equal as powers of two allow, the small ones first.

    In three dims, the last dim is the small one up to a cube of 2 (2x2x1).
    """
    power = chips.bit_length() - 1
    exponents = sorted((power + i) // dims for i in range(dims))
    sizes = [2**e for e in exponents]
    return sizes[::-1] if dims == 3 and chips < 8 else sizes

"""Run `kithara-ray plan --best`: the slices on which the data of a run can be trained, with time, price and command."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kithara_ray import config as configuration
from kithara_ray.cli.plan import arguments_of
from kithara_ray.errors import ConfigError
from kithara_ray.model.options import AUTO
from kithara_ray.plan import best
from kithara_ray.plan.best import Offer, Rows
from kithara_ray.plan.chips import CHIPS, slice_of
from kithara_ray.sft.batches.buckets import bucket_lengths
from kithara_ray.sft.batches.packing import packs

# Rows per device that are considered if the configuration leaves them open.
_ROWS = (1, 2, 4, 8)
# Slices that are compiled at most.
FINALISTS = 4
# Samples by which the share of padding is measured.
_SAMPLES = 100_000
# As on a TPU: the multiple of a row's length, and the lengths that rows without packing are padded to.
_MULTIPLE, _BUCKETS = 128, 4


@dataclass(frozen=True)
class Options:
    """Options of the command as typed.

    Attributes:
        slices: names with commas; None considers the usual slices of every generation up to 256 chips.
        tokens: tokens of the data without padding; None counts those of the configuration's dataset.
        length: tokens of a sample, with `tokens`; None takes the dataset's max_seq_len.
        hours: limit of the time.
        dollars: limit of the price.
        price: price of a chip and hour: a number for all generations, or `v5e=1.2,v6e=2.7`.
        compile: False only estimates.
    """

    slices: str | None = None
    tokens: int | None = None
    length: int | None = None
    hours: float | None = None
    dollars: float | None = None
    price: str | None = None
    compile: bool = True


@dataclass(frozen=True)
class Best:
    """The offers that no other beats in both time and price."""

    offers: list[Offer]
    tokens: int
    priced: bool
    command: str

    @property
    def fits(self) -> bool:
        return bool(self.offers)

    def told(self, offer: Offer) -> dict[str, Any]:
        """One offer as plain data, with its command."""
        plan, settings = offer.plan, offer.plan.settings
        micro = settings["gradient_accumulation_steps"]
        return {
            "slice": plan.slice,
            "mesh": plan.mesh,
            "remat": settings["remat"],
            "per_device_batch_size": settings["per_device_batch_size"],
            "global_batch": plan.tokens_per_step // settings["seq_len"],
            "gradient_accumulation_steps": micro,
            "seq_len": settings["seq_len"],
            "packing": offer.rows.packed,
            "useful": offer.rows.useful,
            "steps": offer.steps,
            "hours": offer.hours,
            "cost" if self.priced else "chip_hours": offer.cost,
            "hbm_bytes": plan.hbm_bytes_per_chip["total"],
            "bound_by": plan.bound_by,
            "compiled": plan.compiled,
            "command": self.command_of(offer),
        }

    def command_of(self, offer: Offer) -> str:
        """The command that runs an offer."""
        plan, where = offer.plan, slice_of(offer.plan.slice)
        assert where.chip is not None
        assert where.topology is not None
        changed = {
            "train_dataloader.per_device_batch_size": plan.settings["per_device_batch_size"],
            "train_dataloader.packing": str(offer.rows.packed).lower(),
            "train_dataloader.dataset.max_seq_len": plan.settings["seq_len"],
            "trainer.remat": plan.settings["remat"],
            **{f"trainer.mesh.{axis}": size for axis, size in plan.mesh.items()},
            "scaling_config.use_tpu": "true",
            "scaling_config.topology": where.topology.partition(":")[2],
            "scaling_config.accelerator_type": f"TPU-{where.chip.ray}",
            "scaling_config.num_workers": where.hosts,
        }
        return self.command + "".join(f" --set {name}={value}" for name, value in changed.items())

    def json(self) -> str:
        return json.dumps({"tokens": self.tokens, "offers": [self.told(offer) for offer in self.offers]}, indent=1)

    def table(self):
        from rich.table import Table

        cost = "price" if self.priced else "chip-hours"
        columns = ("slice", "mesh", "remat", "rows a chip", "T", "useful", "global batch", "steps", "hours >=")
        table = Table(*columns, f"{cost} >=", "GiB a chip", "bound by", "", title=f"{self.tokens:,} tokens")
        for offer in self.offers:
            told = self.told(offer)
            table.add_row(
                told["slice"],
                " ".join(f"{axis}={size}" for axis, size in told["mesh"].items() if size > 1) or "one chip",
                told["remat"],
                str(told["per_device_batch_size"]),
                f"{told['seq_len']}{' packed' if told['packing'] else ''}",
                f"{told['useful']:.0%}",
                str(told["global_batch"]),
                str(told["steps"]),
                f"{told['hours']:.2f}",
                f"{offer.cost:.2f}",
                f"{told['hbm_bytes'] / 2**30:.1f}",
                told["bound_by"],
                "compiled" if told["compiled"] else "estimated",
            )
        return table


def run(path: str | Path, overrides: Sequence[str], options: Options) -> Best:
    """Find the offers.

    Raises:
        ConfigError: the file or an option is wrong, or a limit is in a price that is not known.
    """
    given = configuration.load(path, overrides)
    base, rows, settings = arguments_of(given)
    prices = prices_of(options.price)
    if options.length is not None and options.tokens is None:
        raise ConfigError("plan --best: --length goes with --tokens; the rows of a dataset have lengths of their own")
    if options.dollars is not None and prices is None:
        raise ConfigError("plan --best: --dollars needs --price, the price of a chip and hour")
    tokens, ways = _data(given, options)
    tokens *= given.trainer.epochs or 1
    slices = [slice_of(name) for name in options.slices.split(",")] if options.slices else best.all_slices()
    numbers = _ROWS if rows == AUTO else (int(rows),)
    found = best.offers(base, slices, ways, tokens, numbers, prices, settings)
    chosen = best.front(found, options.hours, options.dollars)
    if options.compile:
        chosen = _compiled(base, chosen[:FINALISTS], tokens, prices, settings)
        chosen = best.front(chosen, options.hours, options.dollars)
    command = shlex.join(["kithara-ray", "train", str(path), *(f"--set={pair}" for pair in overrides)])
    return Best(chosen, tokens, prices is not None, command)


def prices_of(text: str | None) -> dict[str, float] | None:
    """Parse `--price`: the price of a chip and hour of each generation; None without one."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return dict.fromkeys(CHIPS, float(text))
        prices = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"--price {text!r}: expected a number, or prices such as v5e=1.2,v6e=2.7") from None
    if unknown := prices.keys() - CHIPS.keys():
        raise ConfigError(f"--price {text!r}: there are {', '.join(CHIPS)}, not {', '.join(sorted(unknown))}")
    return prices


def _data(given: configuration.Config, options: Options) -> tuple[int, list[Rows]]:
    """The number of tokens, and the ways to lay them out: packed and, for samples of known lengths, padded."""
    longest = given.train_dataloader.dataset.max_seq_len
    if options.tokens is not None:
        length = min(options.length or longest, longest)
        lengths = np.full(min(_SAMPLES, max(1, options.tokens // length)), length)
        return options.tokens, ways_of(lengths, longest)
    from kithara_ray.orchestration.cluster.connection import start_ray
    from kithara_ray.orchestration.data.pipeline import tokenize_whole

    start_ray()
    store = tokenize_whole(configuration.dataloader(given.train_dataloader, given).dataset)
    return int(store.lengths.sum()), ways_of(np.asarray(store.lengths), longest)


def ways_of(lengths: np.ndarray, longest: int) -> list[Rows]:
    """The ways to lay samples of these lengths out in rows: packed up to `longest`, or padded to a few lengths."""
    sample = lengths[:_SAMPLES]
    sizes = ((number, int(size), int(size)) for number, size in enumerate(sample))
    packed = sum(1 for _ in packs(sizes, longest, longest))
    width = -(-longest // _MULTIPLE) * _MULTIPLE
    ways = [Rows(longest, True, float(sample.sum()) / (packed * width))]
    buckets = np.asarray(bucket_lengths(sample, _BUCKETS, _MULTIPLE))
    padded = buckets[np.searchsorted(buckets, sample)]
    return [*ways, Rows(int(buckets[-1]), False, float(sample.sum()) / float(padded.sum()))]


def _compiled(
    base: Any, offers: Sequence[Offer], tokens: int, prices: Mapping[str, float] | None, settings: Mapping[str, Any]
) -> list[Offer]:
    """Compile the finalists in parallel Ray tasks if a cluster runs, else one after the other."""
    from kithara_ray.orchestration.preflight.choice import choices

    points = [
        (offer.plan.slice, offer.plan.settings["seq_len"], offer.plan.settings["per_device_batch_size"])
        for offer in offers
    ]
    plans = choices(base, points, settings)
    pairs = zip(plans, offers, strict=True)
    return [best.offer_of(plan, offer.rows, tokens, prices) for plan, offer in pairs if plan.fits]

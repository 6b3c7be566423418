"""Run `kithara-ray plan`: convert a run's YAML to the arguments of a plan, for one slice or a sweep."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kithara_ray import config as configuration
from kithara_ray.errors import ConfigError
from kithara_ray.hf.lora_checks import ALL_LINEAR
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.families.tensors import expected_tensors
from kithara_ray.model.lora.targets import all_linear, linear
from kithara_ray.model.options import AUTO
from kithara_ray.plan import Plan, Slice, choose, plan, slice_of
from kithara_ray.plan.chips import slice_of_topology
from kithara_ray.plan.chooser import settled_remat
from kithara_ray.plan.planner import config_of, why_not_compiled
from kithara_ray.plan.search import grid, largest_batch, smallest_that_fits
from kithara_ray.sharding.shape import MeshShape

_LORA = (
    *("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("resize_token_embeddings", "target_parameters"),
)


@dataclass(frozen=True)
class Sweep:
    """The plans of a grid: at each point, for the largest batch per chip that fits, or for one row that does not."""

    points: list[dict[str, Any]]
    plans: list[Plan]

    @property
    def fits(self) -> bool:
        return any(made.fits for made in self.plans)

    @property
    def smallest(self) -> dict[tuple[int, int | None], str]:
        return smallest_that_fits(self.points, self.plans)

    def json(self) -> str:
        rows = [point | {"plan": json.loads(made.json())} for point, made in zip(self.points, self.plans, strict=True)]
        smallest = [{"seq_len": t, "rank": r, "slice": name} for (t, r), name in self.smallest.items()]
        return json.dumps({"points": rows, "smallest_that_fits": smallest}, indent=1)

    def table(self):
        from rich.table import Table

        table = Table(
            "T", "rank", "slice", "largest batch a chip", "GiB a chip", "step >=", "tokens/s <=", "bound by", ""
        )
        for point, made in zip(self.points, self.plans, strict=True):
            hbm = made.hbm_bytes_per_chip
            known = [str(point["seq_len"]), str(point["rank"] or "all weights"), point["slice"]]
            needs = f"{hbm['total'] / 2**30:.1f} of {hbm['available'] / 2**30:.1f}" if hbm["available"] else "unknown"
            if not made.fits:
                table.add_row(*known, "does not fit" if hbm["available"] else "unknown", needs, "", "", "", "")
                continue
            smallest = self.smallest.get((point["seq_len"], point["rank"])) == point["slice"]
            table.add_row(
                *known,
                str(made.settings["per_device_batch_size"]),
                needs,
                "" if made.step_time_s_bound is None else f"{made.step_time_s_bound * 1e3:.0f} ms",
                "" if made.tokens_per_s_bound is None else f"{made.tokens_per_s_bound:,.0f}",
                made.bound_by,
                "the smallest that fits" if smallest else "",
            )
        return table


@dataclass(frozen=True)
class Options:
    """Options of the command as typed; None uses the configuration's value.

    Attributes:
        slice: e.g. "v5e-16".
        slices, seq, rank: values separated by commas; several values make a sweep.
        price: price per chip and hour.
        epoch_tokens: number of tokens in the data set.
        compile: False only estimates.
    """

    slice: str | None = None
    slices: str | None = None
    seq: str | None = None
    rank: str | None = None
    price: str | None = None
    epoch_tokens: int | None = None
    compile: bool = True


def run(path: str | Path, overrides: Sequence[str], options: Options) -> Plan | Sweep:
    """Make one plan, or a sweep if `slices`, several lengths or several ranks are given.

    Raises:
        ConfigError: the file or an option is wrong.
    """
    given = configuration.load(path, overrides)
    base, rows, settings = arguments_of(given)
    settings |= {"price_per_chip_hour": _price(options.price), "tokens_per_epoch": options.epoch_tokens}
    settings |= {"compile": options.compile}
    seq_lens = _numbers("--seq", options.seq) or [given.train_dataloader.dataset.max_seq_len]
    ranks: Sequence[int | None] = _ranks(options.rank, settings["lora"])
    names = _names(options.slice, options.slices, given)
    if options.slices is None and len(seq_lens) == len(ranks) == 1:
        if ranks[0] is not None:
            settings["lora"] = dataclasses.replace(settings["lora"], r=ranks[0])
        return _one(base, slice_of(names[0]), seq_lens[0], rows, settings)
    points = grid(names, seq_lens, ranks)
    from kithara_ray.orchestration.cluster.connection import start_ray
    from kithara_ray.orchestration.preflight.memory_fit import sweep

    start_ray()
    settings |= {"remat": settled_remat(settings["remat"])}
    return Sweep(points, sweep(base, points, settings))


def _one(base: Any, where: Slice, seq_len: int, rows: int | str, settings: dict[str, Any]) -> Plan:
    """Plan one slice as a run on it does: settings that are left open are chosen, if programs can be compiled."""
    remat, compile = settings["remat"], settings["compile"]
    is_open = remat == AUTO or settings["mesh"] is None
    if is_open and where.chip is not None and why_not_compiled(where, compile) is None:
        return choose(base, where, seq_len, rows, **{name: settings[name] for name in settings if name != "compile"})
    settings = settings | {"remat": settled_remat(remat)}
    if rows != AUTO:
        return plan(base, where, seq_len, int(rows), **settings)
    return largest_batch(base, where, seq_len, **settings)


def arguments_of(given: configuration.Config) -> tuple[str, Any, dict[str, Any]]:
    """Return (base, per_device_batch_size, settings of `plan`) from a run's YAML."""
    from kithara_ray.train.optimizer_config import portable

    model = given.model.given()
    if model.get("adapter") is not None:
        raise ConfigError("plan: model.adapter has its own LoRA settings; give lora_rank and target_modules instead")
    trainer = given.trainer.given()
    mesh = trainer.get("mesh")
    settings = {
        "lora": _lora(model),
        "train_weights": model.get("lora_rank") is None,
        "optimizer": portable(given.optimizer.build(given.trainer.steps or 1)),
        "mesh": MeshShape(**mesh.given()) if mesh is not None else None,
    }
    same = ("remat", "gradient_accumulation_steps", "router_aux_loss_coef")
    settings |= {name: trainer[name] for name in same if name in trainer}
    settings.setdefault("remat", AUTO)
    settings |= {name: model[name] for name in ("precision", "quantize") if name in model}
    return model["preset_handle"], given.train_dataloader.per_device_batch_size, settings


def _ranks(given: str | None, lora: LoraConfig | None) -> Sequence[int | None]:
    if lora is None and given is not None:
        raise ConfigError(f"--rank {given}: this run trains all weights; give model.lora_rank for an adapter")
    return _numbers("--rank", given) or [lora and lora.r]


def _lora(model: Mapping[str, Any]) -> LoraConfig | None:
    """The LoRA settings of a run's `model`; None if it trains all weights."""
    if model.get("lora_rank") is None:
        return None
    base_config, _ = config_of(model["preset_handle"])
    return LoraConfig(
        r=model["lora_rank"],
        target_modules=_targets(model.get("target_modules", LoraConfig.target_modules), base_config),
        **{name: model[name] for name in _LORA if model.get(name) is not None},
    )


def _targets(given: str | Sequence[str], config: Mapping[str, Any]) -> str | tuple[str, ...]:
    """As `model.lora.targets.targets_of`, for a base without its tensors."""
    if not isinstance(given, str):
        return tuple(given)
    if given.lower() == ALL_LINEAR:
        tensors = expected_tensors(config) or {}
        matrices = [name for name, dims in tensors.items() if name.endswith(".weight") and len(dims) == 2]
        return all_linear(linear((name.removesuffix(".weight") for name in matrices), config), config)
    return (given,) if re.fullmatch(r"[\w.]+", given) else given


def _names(slice: str | None, slices: str | None, given: configuration.Config) -> list[str]:
    if slice is not None and slices is not None:
        raise ConfigError("plan takes one of --slice and --slices")
    if slices is not None:
        return [slice_of(name).name for name in slices.split(",")]
    if slice is not None:
        return [slice_of(slice).name]
    scaling: Mapping[str, Any] = given.scaling_config.given() if given.scaling_config else {}
    where = None
    if scaling.get("topology") and scaling.get("accelerator_type"):
        where = slice_of_topology(scaling["topology"], scaling["accelerator_type"])
    if where is None:
        raise ConfigError("plan: give --slice, e.g. --slice v5e-16; the configuration names no known TPU slice")
    return [where.name]


def _price(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise ConfigError(f"--price {text!r}: expected a number; prices by generation go with --best") from None


def _numbers(option: str, text: str | None) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, e.g. {option} 2048,4096") from None
    if any(number < 1 for number in numbers):
        raise ConfigError(f"{option} {text!r}: numbers must be >= 1")
    return numbers

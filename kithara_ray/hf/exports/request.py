"""Requests to `save_in_hf_format`. A wrong request for an export after a run fails before the training."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kithara_ray.errors import ConfigError
from kithara_ray.hf.exports.export import Layout
from kithara_ray.hf.exports.options import ExportOptions, check_experts
from kithara_ray.hf.exports.part import parse_size
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.merging.merge import check_dtype
from kithara_ray.storage.urls import absolute, is_url


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of one `KerasHubModel.save_in_hf_format` call; see there. A local `output_dir` becomes absolute."""

    output_dir: str
    dtype: str = "auto"
    only_save_adapters: bool = False
    save_adapters_separately: bool = False
    parallel_threads: int | None = None
    max_shard_size: int | str | None = None
    check_finite: bool = False
    check_logits: bool = False
    resume: bool = False
    experts: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "output_dir", absolute(str(self.output_dir)))

    @property
    def layout(self) -> Layout:
        """The layout for a model with an adapter."""
        if self.only_save_adapters:
            return Layout.ADAPTER
        return Layout.SEPARATE if self.save_adapters_separately else Layout.MERGED

    def options(self, base_name: str, run: Mapping[str, object] | None, tokenizer: str | None) -> ExportOptions:
        """Return the export's options; see there."""
        return ExportOptions(
            base_name=base_name,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            check_finite=self.check_finite,
            resume=self.resume,
            run=run,
            tokenizer=tokenizer,
            experts=self.experts,
        )

    def check(self, lora: LoraConfig | None) -> None:
        """Check all that can be checked before training.

        Args:
            lora: the model's; None if all its weights are trained.

        Raises:
            ConfigError: an argument is wrong, or contradicts another or the model.
        """
        check_dtype(self.dtype)
        if self.max_shard_size is not None:
            parse_size(self.max_shard_size)
        if lora is None and (self.only_save_adapters or self.save_adapters_separately):
            raise ConfigError(
                "only_save_adapters and save_adapters_separately are for lora_rank=: all weights of this model are "
                "trained, so there is no adapter; leave both out"
            )
        check_experts(self.experts, lora is not None and self.layout is not Layout.MERGED)
        if not self.check_logits:
            return
        why = None
        if lora is None:
            why = "all weights of this model are trained"
        elif self.layout is not Layout.MERGED:
            why = "this export writes the adapter separately"
        elif is_url(self.output_dir):
            why = f"{self.output_dir} is a URL"
        if why:
            raise ConfigError(f"check_logits compares a merged model in a local directory, and {why}; leave it out")


def requests_of(exports: Sequence[Mapping[str, Any]], lora: LoraConfig | None) -> list[ExportRequest]:
    """Return the exports that will follow a run.

    Args:
        exports: arguments of `save_in_hf_format`, one dict per export.
        lora: as in `ExportRequest.check`.

    Raises:
        ConfigError: one export is wrong, or two have the same destination.
    """
    requests = []
    for arguments in exports:
        try:
            requests.append(ExportRequest(**arguments))
        except TypeError as error:
            raise ConfigError(f"exports: {str(error).removeprefix('ExportRequest.__init__() ')}") from None
        requests[-1].check(lora)
    for one, other in itertools.combinations([request.output_dir for request in requests], 2):
        if one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/"):
            raise ConfigError(f"exports to {one} and {other}: give each a directory of its own")
    return requests

"""The options of an export, of an adapter or of trained weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kithara_ray.errors import ConfigError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports import part
from kithara_ray.hf.exports.part import Part, Written, parse_size, write_here


def check_experts(experts: str | None, writes_adapter: bool) -> None:
    """Check the option of that name. Raises ConfigError."""
    if experts not in (None, "per_expert"):
        raise ConfigError(f'experts must be "per_expert" or None, got {experts!r}')
    if experts is not None and not writes_adapter:
        raise ConfigError("experts is about an adapter's files, and this export writes none; leave it out")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How an export is written, proven and described.

    Attributes:
        base_name: the base in adapter_config.json: a hub name, a path, or an hf:// handle with a revision.
        dtype: "auto" keeps every dtype. "float32", "bfloat16" and "float16" apply to all floating tensors that are
            written: the adapter's in ADAPTER, base and adapter in SEPARATE, the merged weights in MERGED (factors stay
            exact).
        max_shard_size: bytes, or text like "5GB", of one weight file; the base's own files by default.
        check_finite: refuse a NaN or an infinity in a written weight, even one from the base.
        resume: continue from the files that a killed or failed export of the same plan left at the destination. If
            this one fails, keep the files.
        run: the known facts about the training; written as run.json, without local paths and facts about the host.
        tokenizer: the directory or URL of the tokenizer that the adapter was trained with; None takes the base's.
        experts: "per_expert" writes an adapter's factors of experts as `per_expert` splits them; None as PEFT does.
        write: the function that runs the parts, one per weight file.
        prove: a further proof of a merged model. It receives the local directory before publication, and returns its
            result for the report.
    """

    base_name: str
    dtype: str = "auto"
    max_shard_size: int | str | None = None
    check_finite: bool = False
    resume: bool = False
    run: Mapping[str, object] | None = None
    tokenizer: str | None = None
    experts: str | None = None
    write: Callable[[list[Part]], Iterable[Written]] = write_here
    prove: Callable[[Path], str] | None = None

    def files_of(self, base: BaseCheckpoint) -> dict[str, str]:
        """Map each tensor to its weight file; see `part.files_of`. Raises ConfigError."""
        max_shard_bytes = None if self.max_shard_size is None else parse_size(self.max_shard_size)
        return part.files_of(base, self.dtype, max_shard_bytes)

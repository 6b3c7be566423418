"""A base checkpoint: config.json and the tensors of one or more safetensors files, validated and read lazily."""

import dataclasses
import hashlib
import json
import logging
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from kithara_ray.errors import CheckpointError
from kithara_ray.hf.fetch import fetch_headers
from kithara_ray.hf.safetensors_file import TensorInfo, read_header
from kithara_ray.hf.tower import renamed

__all__ = ["CONFIG", "INDEX", "SINGLE", "BaseCheckpoint", "TensorInfo", "read_json"]

log = logging.getLogger(__name__)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

# Fields of config.json that do not affect the logits. The hash covers the tensors' own dtypes, not the config's claim.
NOT_MATHEMATICS = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    | {"output_attentions", "output_hidden_states", "return_dict", "bos_token_id", "eos_token_id", "pad_token_id"}
)
EDGE_BYTES = 64 * 1024
SAMPLE_BYTES = 4 * 1024
SAMPLES = 64


def read_json(path: Path, error: type[Exception] = CheckpointError) -> dict:
    """Read one JSON object. Raises `error` with the path if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as cause:  # not Unicode, not JSON, or a number with thousands of digits
        raise error(f"{path}: not JSON ({cause}); fetch the file again") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: expected an object, found {type(value).__name__}; fetch the file again")
    return value


class BaseCheckpoint:
    """Read-only view of a Hugging Face model directory.

    directory: Path. config: config.json. tensors: name -> TensorInfo (empty when opened with weights=False).
    files: the safetensors files, sorted. names: sorted tensor names. has_weights: whether tensors were opened.
    source: the URL of the weights' bytes if `directory` holds only their headers; else None.
    original: the checkpoint as it is on disk, if this one has rows for added tokens (`hf.resizing.tables`); else None.
    A pickle holds paths and offsets; the unpickled checkpoint opens its maps again on use.
    """

    def __init__(
        self,
        directory: Path,
        config: dict,
        tensors: Mapping[str, TensorInfo],
        files: tuple[Path, ...],
        source: str | None = None,
        original: "BaseCheckpoint | None" = None,
    ):
        self.directory = directory
        self.source = source
        self.original = original
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.files = files
        self._maps: dict[Path, mmap.mmap] = {}
        self._fingerprint: str | None = None

    @classmethod
    def at(cls, handle: str) -> "BaseCheckpoint":
        """Open the checkpoint at a handle. Weights on an object store stay there (`source`); only headers are read."""
        directory, source = fetch_headers(str(handle))
        return cls.open(directory, source=source)

    @classmethod
    def described(cls, handle: str) -> "BaseCheckpoint":
        """Open as `at` does; a directory whose only model file is config.json gives a checkpoint without tensors."""
        directory, source = fetch_headers(str(handle))
        return cls.open(directory, weights=_has_weights(directory), source=source)

    @classmethod
    def open(cls, directory: str | Path, weights: bool = True, source: str | None = None) -> "BaseCheckpoint":
        """Open and validate headers, offsets and index without reading tensor bytes. Raises CheckpointError."""
        directory = Path(directory).expanduser().absolute()
        if not directory.is_dir():
            raise CheckpointError(f"no checkpoint directory at {directory}; give a directory with {CONFIG}")
        if not (directory / CONFIG).is_file():
            raise CheckpointError(f"{directory}: {CONFIG} is missing; {_advice(directory)}")
        config = read_json(directory / CONFIG)
        if not weights:
            return cls(directory, config, {}, ())
        tensors = renamed(config, _open_tensors(directory))
        log.debug("opened %s: tensors=%d", directory, len(tensors))
        return cls(directory, config, tensors, tuple(sorted({info.file for info in tensors.values()})), source)

    def part(self, file: Path) -> "BaseCheckpoint":
        """Return a checkpoint of only one of its weight files."""
        return self.only(name for name, info in self.tensors.items() if info.file == file)

    def only(self, names: Iterable[str]) -> "BaseCheckpoint":
        """Return a checkpoint of some of its tensors and the files that hold them."""
        infos = {name: self.tensors[name] for name in names}
        files = tuple(sorted({info.file for info in infos.values()}))
        return BaseCheckpoint(self.directory, self.config, infos, files, self.source)

    def in_file_order(self) -> list[TensorInfo]:
        return sorted(self.tensors.values(), key=lambda info: (info.file, info.offset, info.nbytes))

    def moved(self, directory: Path) -> "BaseCheckpoint":
        """Return this part with its weight files in another directory. Raises CheckpointError if the files differ."""
        expected = {
            name: dataclasses.replace(info, file=directory / info.file.name) for name, info in self.tensors.items()
        }
        files = tuple(directory / file.name for file in self.files)
        for file in files:
            found = renamed(self.config, read_header(file)[0])
            for info in expected.values():
                if info.file == file and found.get(info.name) != info:
                    raise CheckpointError(
                        f"{self.source}/{file.name}: its header has changed ({info.name}); start the export again"
                    )
        return BaseCheckpoint(self.directory, self.config, expected, files)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors))

    @property
    def has_weights(self) -> bool:
        return bool(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Return where one tensor lies. Raises CheckpointError if the checkpoint has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {name!r} among {len(self.tensors)} tensors") from None

    def view(self, name: str) -> np.ndarray:
        """Return a read-only zero-copy array over the memory-mapped file; a slice touches only the pages it needs."""
        info = self.info(name)
        self._need_bytes()
        mapped = self._maps.get(info.file)
        if mapped is None:
            with info.file.open("rb") as stream:
                mapped = self._maps[info.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(info.shape, info.numpy_dtype, buffer=mapped, offset=info.offset)

    def forget_pages(self) -> None:
        """Drop the pages read through `view` from this process' memory; the views stay valid."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self) -> str:
        """Return `sha256:<hex>` of the mathematics: equal for a re-sharded copy, different for other weights.

        The hash covers canonical JSON of config.json without the fields in NOT_MATHEMATICS (at every depth), then the
        digest of each tensor by name. Raises CheckpointError if the weights are at a URL.
        """
        if self._fingerprint is None:
            self._fingerprint = self.fingerprint_of(self.digests())
        return self._fingerprint

    def fingerprint_of(self, digests: Mapping[str, bytes]) -> str:
        """Return the fingerprint from the tensors' digests, which several processes may have computed."""
        digest = hashlib.sha256(json.dumps(_mathematics(self.config), sort_keys=True).encode())
        for name in self.names:
            digest.update(digests[name])
        return f"sha256:{digest.hexdigest()}"

    def digests(self) -> dict[str, bytes]:
        """`tensor_digest` of every tensor."""
        self._need_bytes()
        return {name: tensor_digest(info) for name, info in self.tensors.items()}

    def _need_bytes(self) -> None:
        if self.source:
            raise CheckpointError(f"{self.source}: only its headers were fetched; hf.fetch.fetch reads the tensors")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}, "tensors": dict(self.tensors)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tensors = MappingProxyType(self.tensors)

    def __repr__(self) -> str:
        return f"BaseCheckpoint({str(self.directory)!r}, tensors={len(self.tensors)}, files={len(self.files)})"


def tensor_digest(info: TensorInfo) -> bytes:
    """SHA-256 of name, dtype tag, shape, the first and last 64 KiB, and 64 evenly spaced pieces of 4 KiB between them.

    This hashes a tensor of up to 384 KiB whole. It misses a change of a larger tensor that lies between the sampled
    pieces: the price of reading at most 384 KiB per tensor.
    """
    digest = hashlib.sha256(json.dumps([info.name, info.dtype, info.shape]).encode())
    with info.file.open("rb") as stream:
        for begin, end in sample_ranges(info.nbytes):
            stream.seek(info.offset + begin)
            digest.update(stream.read(end - begin))
    return digest.digest()


def sample_ranges(nbytes: int) -> list[tuple[int, int]]:
    """Return the byte ranges within a tensor that its fingerprint reads."""
    if nbytes <= 2 * EDGE_BYTES + SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    first, last = EDGE_BYTES, nbytes - EDGE_BYTES
    begins = [first + (last - SAMPLE_BYTES - first) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    return [(0, first), *((begin, begin + SAMPLE_BYTES) for begin in begins), (last, nbytes)]


def _mathematics(value: object) -> object:
    if isinstance(value, dict):
        return {k: _mathematics(v) for k, v in value.items() if k not in NOT_MATHEMATICS}
    return [_mathematics(v) for v in value] if isinstance(value, list) else value


def _open_tensors(directory: Path) -> dict[str, TensorInfo]:
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory}: both {SINGLE} and {INDEX} are there; remove the stale one")
    if single.exists():
        tensors, _ = read_header(single)
    elif index.exists():
        tensors = _read_sharded(index)
    else:
        raise CheckpointError(_without_weights(directory))
    if not tensors:
        raise CheckpointError(f"{directory}: the checkpoint holds no tensor; fetch it again")
    return tensors


def _advice(directory: Path) -> str:
    """Suggest what to give instead of a directory that is not a model."""
    try:
        adapter = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        own = adapter["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        steps = [path for path in directory.glob("checkpoint-*") if (path / CONFIG).is_file()]
        if steps:
            return f"it is a trainer's output; give one of its {len(steps)} checkpoints, as {max(steps, key=_step)}"
        return "give a Hugging Face model directory"
    return f"it is a PEFT adapter; give its base, {own!r}, and the adapter as the adapter"


def _step(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def _has_weights(directory: Path) -> bool:
    """True if any file says that this directory should hold a model's weights."""
    return (directory / INDEX).exists() or any(directory.glob(f"*{SUFFIX}")) or bool(_pickled(directory))


def _pickled(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})


def _without_weights(directory: Path) -> str:
    pickled = _pickled(directory)
    if pickled:
        return (
            f"{directory}: only pickled weights ({pickled[0]}); pickle is not read. Convert once where you trust the "
            "file: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir), which writes safetensors"
        )
    return f"{directory}: neither {SINGLE} nor {INDEX} is there; give a directory with safetensors weights"


def _read_sharded(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names; fetch the file again")
    tensors: dict[str, TensorInfo] = {}
    for filename in sorted(set(weight_map.values())):
        if "/" in filename or "\\" in filename or "\0" in filename or not filename.endswith(SUFFIX):
            raise CheckpointError(
                f"{index}: weight_map names {filename!r}, which is not a {SUFFIX} file in this directory; "
                "do not use this checkpoint"
            )
        path = index.parent / filename
        if not path.is_file():
            raise CheckpointError(f"{index}: {filename} is missing; fetch the checkpoint again")
        for name, info in read_header(path)[0].items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].file.name}; remove one")
            tensors[name] = info
    for name, filename in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor {name!r} is not in {filename}; fetch the checkpoint again")
        if tensors[name].file.name != filename:
            raise CheckpointError(f"{index}: tensor {name!r} is in {tensors[name].file.name}, not in {filename}")
    for name in sorted(tensors.keys() - weight_map.keys()):
        raise CheckpointError(f"{index}: tensor {name!r} of {tensors[name].file.name} is not named in weight_map")
    return tensors

"""A PEFT LoRA adapter: factors A (r, in) and B (out, r) per module, and with DoRA a magnitude (out,).

This module reads, checks and writes PEFT's own files.
"""

import dataclasses
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from kithara_ray.errors import AdapterError, CheckpointError, ConfigError, UnsupportedError
from kithara_ray.hf import beside
from kithara_ray.hf.checkpoint import CONFIG, BaseCheckpoint, read_json
from kithara_ray.hf.facts.experts import (
    from_file,
    in_file,
    is_of_no_layer,
    is_parameter,
    module_of,
    parameters_in,
    parameters_of,
    targets_of,
)
from kithara_ray.hf.identity import FINGERPRINT, UNKNOWN, BaseIdentity, read_identity
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.names import (
    A_SUFFIX,
    B_SUFFIX,
    BIAS_SUFFIX,
    MAGNITUDE_SUFFIX,
    PEFT_PREFIX,
    SUFFIXES,
    WEIGHT_SUFFIX,
    adapter_names,
    listed,
    why_absent,
)
from kithara_ray.hf.resizing.saved import added_rows, separate
from kithara_ray.hf.safetensors_file import TAGS, TensorInfo, read_array, read_header, write_arrays
from kithara_ray.hf.tower import name_of
from kithara_ray.hf.unused import is_beyond, why_unused

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Adapter", "LoraConfig", "target_modules_of"]

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
DTYPES = ("F32", "BF16", "F16")


def target_modules_of(config: LoraConfig, base: BaseCheckpoint) -> tuple[str, ...]:
    """Return the modules `<m>` of the base, sorted, whose tensor `<m>.weight` the config targets, and its parameters.

    Skip tensors that transformers does not compute with, and experts that it holds in one parameter: PEFT finds no
    module there.
    """
    config_json, weights = base.config, (name for name in base.names if name.endswith(WEIGHT_SUFFIX))
    used = (n for n in weights if why_unused(config_json, n) is None and not is_beyond(config_json, n))
    modules = {module_of(n) for n in used if not is_of_no_layer(config_json, n)}
    if config.target_parameters:
        modules |= {name.removesuffix(WEIGHT_SUFFIX) for name in parameters_of(base)}
    return tuple(sorted(module for module in modules if config.matches(module)))


@dataclass
class Adapter:
    """A LoRA adapter in memory.

    Attributes:
        config: the LoRA settings.
        tensors: float32, bfloat16 or float16 arrays by name; `beside` returns those of no module.
        trained_on: the base that it was trained on, as far as its files say.
        tables: tables of the base that its file holds, untrained, by the base's tensor; see `fitted`.

    Each module, for example `model.layers.0.self_attn.q_proj`, adapts the base's tensor `<module>.weight` (out, in). It
    has:

        <module>.lora_A.weight           (r, in)
        <module>.lora_B.weight           (out, r)
        <module>.lora_magnitude_vector   (out,)  with config.use_dora
        <module>.lora_B.bias             (out,)  with config.lora_bias
    """

    config: LoraConfig
    tensors: dict[str, np.ndarray]
    trained_on: BaseIdentity = UNKNOWN
    tables: Mapping[str, TensorInfo] = dataclasses.field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that have an A, a B, a magnitude or a bias of B, sorted."""
        return tuple(sorted({_module_of(name) for name in self.tensors if name.endswith(SUFFIXES)}))

    @property
    def beside(self) -> dict[str, np.ndarray]:
        """Trained tensors of the base itself; see `hf.beside`."""
        return {name: array for name, array in self.tensors.items() if not name.endswith(SUFFIXES)}

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of each module's tensors."""
        also = {MAGNITUDE_SUFFIX: self.config.use_dora, BIAS_SUFFIX: self.config.lora_bias}
        return (A_SUFFIX, B_SUFFIX, *(suffix for suffix, is_on in also.items() if is_on))

    @property
    def parameters(self) -> int:
        return sum(array.size for array in self.tensors.values())

    @property
    def is_zero(self) -> bool:
        """True if the adapter changes nothing, as before training: it holds only factors, and every B is zero."""
        changes = (np.any(array) for name, array in self.tensors.items() if name.endswith((B_SUFFIX, BIAS_SUFFIX)))
        return not self.config.use_dora and not self.config.has_beside and not any(changes)

    def a(self, module: str) -> np.ndarray:
        """lora_A of a module, (r, in)."""
        return self.tensors[module + A_SUFFIX]

    def b(self, module: str) -> np.ndarray:
        """lora_B of a module, (out, r)."""
        return self.tensors[module + B_SUFFIX]

    def magnitude(self, module: str) -> np.ndarray:
        """lora_magnitude_vector of a module, (out,). Only a DoRA adapter has one."""
        return self.tensors[module + MAGNITUDE_SUFFIX]

    def b_bias(self, module: str) -> np.ndarray:
        """The bias of a module's lora_B, (out,). Only an adapter with `lora_bias` has one."""
        return self.tensors[module + BIAS_SUFFIX]

    def named_for(self, base: BaseCheckpoint) -> "Adapter":
        """Return the adapter with the names of transformers' modules; an older PEFT adapter of a multimodal base has
        others.

        Raises:
            AdapterError: two tensors get one name.
        """
        names = {name: name_of(base.config, name) for name in self.tensors}
        if len(set(names.values())) != len(names):
            raise AdapterError("the adapter holds modules under two names, an older and a newer; save it again")
        tensors = {names[name]: array for name, array in self.tensors.items()}
        tables = {name_of(base.config, name): info for name, info in self.tables.items()}
        return dataclasses.replace(self, tensors=tensors, tables=tables)

    def fitted(self, base: BaseCheckpoint) -> "Adapter":
        """Return the adapter with a config that gives the base the rows for which the file has values.

        PEFT saves the embedding and the head, whole, if their vocabulary was resized.

        Raises:
            AdapterError: the file's tables have fewer rows than the base, or other values in the base's rows.
        """
        if self.config.is_resized:
            return self
        tensors = beside.without_tied_tokens(base, self.tensors)
        whole = {n: array for n, array in self.beside.items() if beside.rows_of(self.config, n) is None}
        rows, added = added_rows(base, self.tables, whole)
        config = dataclasses.replace(self.config, resize_token_embeddings=rows, added_rows=added)
        return dataclasses.replace(self, config=config, tensors=tensors, tables={})

    def only(self, modules: Iterable[str]) -> "Adapter":
        """Return an adapter with only the tensors of these modules, under the same config."""
        names = (module + suffix for module in modules for suffix in self.suffixes)
        return dataclasses.replace(self, tensors={name: self.tensors[name] for name in names})

    def of_tensors(self, tensors: Collection[str]) -> "Adapter | None":
        """Return the part of the adapter that changes these tensors of the base; None if no part does."""
        adapted = {target for name in tensors for target in targets_of(name)}
        part = self.only(m for m in self.modules if m in adapted)
        # A module's bias and weight may lie in different files.
        part.tensors = {name: array for name, array in part.tensors.items() if not name.endswith(BIAS_SUFFIX)}
        biased = [m for m in self.modules if self.config.lora_bias and m + beside.BIAS in tensors]
        part.tensors |= {m + BIAS_SUFFIX: self.b_bias(m) for m in biased}
        part.tensors |= {name: array for name, array in self.beside.items() if beside.tensor_of(name) in tensors}
        return part if part.tensors else None

    def cast(self, dtype: np.dtype) -> "Adapter":
        return dataclasses.replace(self, tensors={name: array.astype(dtype) for name, array in self.tensors.items()})

    def validate(self, base: BaseCheckpoint) -> None:
        """Check that the adapter is complete, finite and fits the base tensor by tensor. Raises AdapterError."""
        if not base.has_weights:
            raise CheckpointError(f"{base.directory}: opened without weights; an adapter is checked against tensors")
        self.validate_alone()
        parameters = parameters_of(base) if self.config.target_parameters else {}
        for module in self.modules:
            weight = module + WEIGHT_SUFFIX
            if (name := self.config.parameter_of(module)) in parameters:
                found = parameters[name]
                a_shape, b_shape = found.factors(self.config.rank_of(module))
                whole = (found.experts, found.out_dim, found.in_dim)
                self._expect_shape(module + A_SUFFIX, a_shape, name, whole)
                self._expect_shape(module + B_SUFFIX, b_shape, name, whole)
                continue
            if weight not in base.tensors:
                why = why_absent(module, base.names, base.config)
                raise AdapterError(f"{module}: the base at {base.directory} has no tensor {weight!r}; {why}")
            shape = base.tensors[weight].shape
            if len(shape) != 2:
                raise AdapterError(f"{module}: base tensor {weight!r} has shape {shape}, expected (out, in)")
            rank = self.config.rank_of(module)
            self._expect_shape(module + A_SUFFIX, (rank, shape[1]), weight, shape)
            self._expect_shape(module + B_SUFFIX, (shape[0], rank), weight, shape)
            for suffix in self.suffixes[2:]:
                self._expect_shape(module + suffix, (shape[0],), weight, shape)
        missing = sorted(set(target_modules_of(self.config, base)) - set(self.modules))
        if missing:
            raise AdapterError(
                f"{len(missing)} modules of the base are targets but have no factors, first {missing[0]!r}; "
                "the adapter is incomplete, or target_modules must be narrowed"
            )
        self._validate_beside(base)

    def _validate_beside(self, base: BaseCheckpoint) -> None:
        try:
            changed = beside.normal(self.config, base)
        except (ConfigError, UnsupportedError) as error:
            raise type(error)(f"adapter_config.json: {error}") from error
        config = dataclasses.replace(self.config, **changed)
        expected = {one.name: one for one in beside.of_base(config, base)}
        if unlike := sorted(expected.keys() ^ self.beside.keys()):
            what = "is missing" if unlike[0] in expected else "belongs to nothing in the base"
            raise AdapterError(
                f"{unlike[0]} {what} ({len(unlike)} such tensors beside the factors); give the adapter's own base"
            )
        for name, one in expected.items():
            shape = base.tensors[one.tensor].shape
            wanted = shape if one.rows is None else (len(one.rows), *shape[1:])
            self._expect_shape(name, wanted, one.tensor, shape)

    def validate_alone(self) -> None:
        """Run the checks that need no base: pairs, ranks, dtypes, finiteness, targets. Raises AdapterError."""
        if not self.tensors:
            raise AdapterError("the adapter holds no tensor; train it or give another directory")
        beside.check_names(self.config, self.beside)
        for name, array in self.tensors.items():
            if name.endswith(SUFFIXES) and not name.endswith(self.suffixes):
                use = "lora_bias" if name.endswith(BIAS_SUFFIX) else "use_dora"
                use = f", as {use} is off"
                raise AdapterError(f"{name}: expected a name ending in {listed(self.suffixes)}{use}")
            if TAGS.get(array.dtype) not in DTYPES:
                raise AdapterError(f"{name}: expected dtype float32, bfloat16 or float16, found {array.dtype}")
            dims = 1 if name.endswith((MAGNITUDE_SUFFIX, beside.BIAS)) else 2
            if array.ndim != dims:
                raise AdapterError(f"{name}: expected {dims} dimensions, found shape {array.shape}")
            bad = array.size - np.count_nonzero(np.isfinite(array.astype(np.float32)))
            if bad:
                raise AdapterError(f"{name}: {bad} of {array.size} values are not finite; lower the learning rate")
        for module in self.modules:
            there = [suffix for suffix in self.suffixes if module + suffix in self.tensors]
            for suffix in self.suffixes:
                if suffix not in there:
                    raise AdapterError(f"{module}{suffix} is missing, but {module}{there[0]} is present")
            if not self.config.matches(module):
                told = f"target_modules={self.config.target_modules!r}"
                if self.config.target_parameters:
                    told += f" and target_parameters={self.config.target_parameters!r}"
                raise AdapterError(f"{module}: not a target of {told}")
            rank, rank_a, rank_b = self.config.rank_of(module), self.a(module).shape[0], self.b(module).shape[1]
            if is_parameter(module) and rank_a % rank == 0:
                rank = max(rank, rank_a)  # of all experts
            if (rank_a, rank_b) != (rank, rank):
                raise AdapterError(f"{module}: expected rank {rank}, found {rank_a} in lora_A and {rank_b} in lora_B")

    def _expect_shape(self, name: str, expected: tuple[int, ...], weight: str, weight_shape: tuple[int, ...]) -> None:
        found = self.tensors[name].shape
        if found != expected:
            raise AdapterError(f"{name}: expected shape {expected} for {weight} {weight_shape}, found {found}")

    def write(
        self,
        directory: str | Path,
        base_model_name_or_path: str,
        revision: str | None = None,
        fingerprint: str | None = None,
        tables: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Write adapter_model.safetensors and adapter_config.json as peft.PeftModel.save_pretrained does.

        fingerprint: the base's fingerprint, stored in the weights' metadata, which PEFT and vLLM do not read.
        tables: the tables of a resized base, by their names in the file; see `hf.resizing.saved`.
        """
        self.validate_alone()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        written = beside.with_copies(self.config, self._in_file())
        arrays = {PEFT_PREFIX + name: array for name, array in {**written, **tables}.items()}
        metadata = {"format": "pt"} | ({FINGERPRINT: fingerprint} if fingerprint else {})
        write_arrays(directory / ADAPTER_WEIGHTS, arrays, metadata)
        # PEFT accepts entries that match no module, but vLLM reads the list.
        peft_config = self.config.to_peft(base_model_name_or_path, self.modules, revision)
        (directory / ADAPTER_CONFIG).write_text(json.dumps(peft_config, indent=2, sort_keys=True) + "\n")
        log.info("wrote adapter: modules=%d parameters=%d directory=%s", len(self.modules), self.parameters, directory)

    def _in_file(self) -> dict[str, np.ndarray]:
        """Return the tensors by the names that PEFT gives them in a file."""
        modules = {module: in_file(module, self.modules) for module in self.modules if is_parameter(module)}
        renamed = {m + suffix: to + suffix for m, to in modules.items() for suffix in self.suffixes}
        return {renamed.get(name, name): array for name, array in self.tensors.items()}

    @classmethod
    def read(cls, directory: str | Path) -> "Adapter":
        """Read a directory that `write` or PEFT wrote. Raises AdapterError, or UnsupportedError for a foreign field."""
        directory = Path(directory).expanduser().absolute()
        config_path, weights_path = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
        if not config_path.is_file() or not weights_path.is_file():
            raise AdapterError(f"{directory}: {_what_is_there(directory)}")
        peft_config = read_json(config_path, AdapterError)
        config = LoraConfig.from_peft(peft_config)
        try:
            infos, metadata = read_header(weights_path)
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        shorts = _with_parameters(config, adapter_names(infos, str(weights_path)))
        named = {short: infos[name] for name, short in shorts.items()}
        trained, tables = separate(config, named)
        tensors = {name: read_array(info) for name, info in trained.items()}
        trained_on = read_identity(directory, peft_config, metadata)
        adapter = cls(config, beside.without_copies(config, tensors), trained_on, tables)
        adapter.validate_alone()
        return adapter


def _what_is_there(directory: Path) -> str:
    """Explain what a directory that is not a PEFT adapter holds instead, and what to give."""
    if (directory / PICKLED).is_file():
        return (
            f"{ADAPTER_WEIGHTS} is missing, and {PICKLED} is a pickle, which is not read. Convert it once where you "
            "trust it: PeftModel.from_pretrained(base, directory).save_pretrained(new_directory)"
        )
    steps = sorted(
        (path for path in directory.glob("checkpoint-*") if (path / ADAPTER_CONFIG).is_file()),
        key=lambda path: (len(path.name), path.name),
    )
    if steps:
        return f"{ADAPTER_CONFIG} is missing. It is a trainer's output with {len(steps)} adapters; give {steps[-1]}"
    if any(directory.glob("global_step*")) or any(directory.glob("pytorch_model_fsdp*")):
        return (
            f"{ADAPTER_WEIGHTS} is missing; the weights are in a trainer's sharded state. Write the adapter with the "
            "trainer's save_model, or PEFT's save_pretrained"
        )
    if (directory / CONFIG).is_file():
        return f"{ADAPTER_CONFIG} is missing. It is a whole model, not an adapter; give a PEFT adapter directory"
    missing = ADAPTER_CONFIG if not (directory / ADAPTER_CONFIG).is_file() else ADAPTER_WEIGHTS
    return f"{missing} is missing; give a PEFT adapter directory"


def _with_parameters(config: LoraConfig, shorts: Mapping[str, str]) -> dict[str, str]:
    """Map names in a file to names here, where a parameter of experts has its own name and not that of its module."""
    made = {}
    for name, short in shorts.items():
        module = _module_of(short)
        targets = [parameter for parameter in parameters_in(module) if config.parameter_of(parameter) is not None]
        made[name] = from_file(module, targets) + short.removeprefix(module)
    return made


def _module_of(name: str) -> str:
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)

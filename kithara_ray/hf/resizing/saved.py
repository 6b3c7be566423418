"""The tables of a resized base in an adapter's file: PEFT saves the embedding and the head of such a base whole.

    not trained              <module>.weight
    some tokens trained      <module>.token_adapter.base_layer.weight, and the rows in .trainable_tokens_delta
    modules_to_save          <module>.weight; PEFT also writes .modules_to_save.weight, a copy, and
                             .original_module.weight, the values before training

A tied head has copies of all of them. They are read, and not written.
"""

import logging
from collections.abc import Mapping

import numpy as np

from kithara_ray.errors import AdapterError
from kithara_ray.hf import beside
from kithara_ray.hf.beside import BIAS, TOKENS, WEIGHT
from kithara_ray.hf.checkpoint import EDGE_BYTES, BaseCheckpoint
from kithara_ray.hf.fetch import read_ranges
from kithara_ray.hf.lora_checks import EMBEDDING, HEAD
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.resizing.added import AddedRows
from kithara_ray.hf.resizing.tables import rows_of, table_arrays, tables_of
from kithara_ray.hf.safetensors_file import TensorInfo, map_array, read_array

__all__ = ["added_rows", "saved_tables", "separate", "tensor_of"]

log = logging.getLogger(__name__)

UNTRAINED = ".token_adapter.base_layer.weight"
_COPY = ".modules_to_save.weight"
_BEFORE = ".original_module.weight"
_ROWS = 4096


def tensor_of(name: str) -> str:
    """Return the base's tensor whose table an adapter's file holds under this name."""
    return name.removesuffix(UNTRAINED) + WEIGHT if name.endswith(UNTRAINED) else name


def saved_tables(config: LoraConfig, base: BaseCheckpoint) -> dict[str, np.ndarray]:
    """Return the tables that an adapter's file holds besides trained tensors, by their names there.

    base: the base, resized or not. If it is at a URL, this fetches its tables. Without a resize there are none.
    """
    if not config.is_resized:
        return {}
    made: dict[str, np.ndarray] = {}
    for name, array in table_arrays(base, config).items():
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if leaf == HEAD and kind == "weight" and beside.is_tied(base):
            continue
        if name.endswith(BIAS):
            trained = beside.bias_name(config, name) is not None
        else:
            trained = leaf in config.modules_to_save
            name = module + UNTRAINED if leaf in config.trainable_token_indices else name
        if not trained:
            made[name] = array
    return made


def separate(
    config: LoraConfig, infos: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Split a file's tensors into trained ones, by their names, and untrained tables, by the base's tensors.

    Raises:
        AdapterError: tensors that PEFT writes as copies of each other differ.
    """
    trained: dict[str, TensorInfo] = {}
    tables: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        module = name.removesuffix(_COPY)
        if name.endswith(_BEFORE):
            continue
        if module != name:
            _check_copy(infos, name, module + WEIGHT)
            trained[module + WEIGHT] = info
        elif name.endswith(UNTRAINED) or _is_untrained(config, name):
            tables[tensor_of(name)] = info
        elif name == HEAD + TOKENS and HEAD not in config.trainable_token_indices:
            _check_copy(infos, name, next((n for n in infos if n.endswith(EMBEDDING + TOKENS)), name))
        else:
            trained[name] = info
    return trained, tables


def _is_untrained(config: LoraConfig, name: str) -> bool:
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if leaf not in (EMBEDDING, HEAD):
        return False
    if kind == "bias":
        return leaf == HEAD and config.bias == "none"
    if leaf == HEAD and beside.copies_head(config):
        return False
    return kind == "weight" and leaf not in config.modules_to_save


def _check_copy(infos: Mapping[str, TensorInfo], name: str, other: str) -> None:
    if other in infos and not np.array_equal(read_array(infos[name]), read_array(infos[other])):
        raise AdapterError(f"{name} differs from {other}, of which it is a copy; save the adapter again")


def added_rows(
    base: BaseCheckpoint, tables: Mapping[str, TensorInfo], whole: Mapping[str, np.ndarray]
) -> tuple[int | None, AddedRows | None]:
    """Return the rows that a file's tables have after rows for added tokens, and the values of the added ones.

    Args:
        tables: the file's untrained tables, by the base's tensor.
        whole: its tensors that were trained as a whole, by name.

    Raises:
        AdapterError: the tables do not belong to this base.
    """
    known = tables_of(base)
    counts = {name: info.shape[0] for name, info in tables.items()}
    counts |= {name: array.shape[0] for name, array in whole.items() if name in known}
    if not counts:
        return None, None
    tables = _without_tied(base, tables)
    for name in sorted(tables.keys() - known.keys()):
        raise AdapterError(f"{name}: the base at {base.source or base.directory} has no such tensor; give its own base")
    rows, had = max(counts.values()), rows_of(base)
    for name, count in sorted(counts.items()):
        if count != rows or count < had:
            raise AdapterError(
                f"{name}: the adapter's file has {count} rows of it, other tables have {rows}, the base {had}. Only "
                "adapters whose vocabulary was made larger are read; merge others with PEFT"
            )
    for name, info in tables.items():
        if info.shape[1:] != known[name].shape[1:] or not _same_start(base, known[name], info):
            raise AdapterError(
                f"{name}: the adapter's file has other values in the base's {had} rows, and adapter_config.json does "
                "not say that they were trained. Give the adapter's own base, or merge with PEFT"
            )
    if rows == had:
        return None, None
    unknown = known.keys() - tables.keys() - whole.keys()
    if missing := sorted(name for name in unknown if not (name.startswith(HEAD) and beside.is_tied(base))):
        log.warning(
            "%s: the adapter's file has no values for the %d added rows; each is the mean of the base's",
            ", ".join(missing), rows - had,
        )  # fmt: skip
    values = {name: map_array(info)[had:].astype(known[name].numpy_dtype) for name, info in tables.items()}
    return rows, AddedRows(values) if values else None


def _without_tied(base: BaseCheckpoint, tables: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Leave out a tied head, which is a copy of the embedding."""
    kept, head = dict(tables), HEAD + WEIGHT
    if head in kept and beside.is_tied(base):
        info = kept.pop(head)
        embedding = next((other for name, other in kept.items() if name.endswith(EMBEDDING + WEIGHT)), info)
        if not np.array_equal(map_array(info), map_array(embedding)):
            raise AdapterError(f"{head}: the base ties it to the embedding, but their values in the file differ")
    return kept


def _same_start(base: BaseCheckpoint, own: TensorInfo, given: TensorInfo) -> bool:
    """True if a file's table begins with the base's rows, up to the rounding of either dtype.

    For a base at a URL, this compares both ends and the middle.
    """
    if base.source is not None:
        return own.dtype != given.dtype or _same_pieces(base.source, own, given)
    ours, theirs = base.view(own.name), map_array(given)
    for begin in range(0, len(ours), _ROWS):
        one = ours[begin : begin + _ROWS]
        other = theirs[begin : begin + len(one)]
        if not (np.array_equal(one, other.astype(one.dtype)) or np.array_equal(one.astype(other.dtype), other)):
            return False
    return True


def _same_pieces(source: str, own: TensorInfo, given: TensorInfo) -> bool:
    size = min(EDGE_BYTES, own.nbytes)
    begins = (0, (own.nbytes - size) // 2, own.nbytes - size)
    there = read_ranges(source, own.file.name, [(own.offset + b, own.offset + b + size) for b in begins])
    mapped = np.memmap(given.file, np.uint8, "r")[given.offset :]
    return all(mapped[b : b + size].tobytes() == piece for b, piece in zip(begins, there, strict=True))

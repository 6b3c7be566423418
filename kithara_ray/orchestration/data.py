"""The dataset handles of the public API: what a user writes about data, before anything is read."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ray.data

from kithara_ray.errors import ConfigError, DataError, UnsupportedError
from kithara_ray.orchestration.paths import absolute
from kithara_ray.sft.formats import PromptAnswer, Text
from kithara_ray.sft.tokenize import RowTokenizer

_READERS = {
    ".jsonl": ray.data.read_json,
    ".json": ray.data.read_json,
    ".csv": ray.data.read_csv,
    ".parquet": ray.data.read_parquet,
    ".txt": ray.data.read_text,
}


def as_ray_dataset(source: Any) -> ray.data.Dataset:
    """A Ray Dataset from a Ray Dataset, a path or URL, a list of dicts, a pandas frame or a Hugging Face dataset."""
    if isinstance(source, ray.data.Dataset):
        return source
    if isinstance(source, (str, Path)):
        suffix = Path(str(source)).suffix
        if suffix not in _READERS:
            raise DataError(f"{source}: unknown extension {suffix!r}; known are {', '.join(_READERS)}")
        if "://" not in str(source) and not Path(source).exists():
            raise DataError(f"{source}: no such file; give an existing path, a URL or a Ray Dataset")
        return _READERS[suffix](str(source))
    if isinstance(source, list):
        if not source:
            raise DataError("the dataset is empty: the list of rows has no element")
        return ray.data.from_items(source)
    if hasattr(source, "to_pandas") and hasattr(source, "features"):
        return ray.data.from_huggingface(source)
    if hasattr(source, "to_records"):
        return ray.data.from_pandas(source)
    raise DataError(
        f"a dataset cannot be made of {type(source).__name__}; give a Ray Dataset, a path, a list of dicts, "
        "a pandas DataFrame or a Hugging Face dataset"
    )


class _Dataset:
    """What SFTDataset and TextCompletionDataset share: all but the format of a row."""

    _format_class: type[PromptAnswer] | type[Text]

    def __init__(
        self,
        source: Any,
        tokenizer: Any = None,
        tokenizer_handle: str | None = None,
        column_mapping: Mapping[str, str] | None = None,
        max_seq_len: int = 1024,
        custom_formatting_fn: Callable | None = None,
        on_bad_row: str = "error",
        formatting_style: str = "auto",
        **unknown: Any,
    ):
        for name in unknown:
            why = " (only KerasHub models exist here)" if name == "model_type" else ""
            raise ConfigError(f"{type(self).__name__} takes no argument {name!r}{why}")
        if (tokenizer is None) == (tokenizer_handle is None):
            raise ConfigError(f"{type(self).__name__} needs one of tokenizer and tokenizer_handle")
        self.source = source
        self.tokenizer = tokenizer if tokenizer is not None else absolute(tokenizer_handle)
        self.max_seq_len = max_seq_len
        self.on_bad_row = on_bad_row
        self.column_mapping = dict(column_mapping or {})
        self.custom_formatting_fn = custom_formatting_fn
        self.formatting_style = formatting_style
        self.packed = False
        self.row_tokenizer()

    def row_tokenizer(self) -> RowTokenizer:
        """What turns this dataset's rows into tokens; picklable."""
        text_format = self._format_class(self.column_mapping, self.custom_formatting_fn, self.formatting_style)
        return RowTokenizer(self.tokenizer, text_format, self.max_seq_len, self.on_bad_row)

    def rows(self) -> ray.data.Dataset:
        """The source as a Ray Dataset."""
        return as_ray_dataset(self.source)

    def to_packed_dataset(self):
        """The same dataset, of which a Dataloader packs several rows into one sequence."""
        packed = copy.copy(self)
        packed.packed = True
        return packed


class SFTDataset(_Dataset):
    """Prompts and answers; the loss is on the answer's tokens and the EOS alone.

    Args:
        source: a Ray Dataset, a path or URL (jsonl, json, csv, parquet), a list of dicts, a pandas DataFrame or a
            Hugging Face dataset.
        tokenizer: a transformers tokenizer, or
        tokenizer_handle: where to load one from: `hf://...`, a local directory, `gs://...`.
        column_mapping: {"prompt": <the source's column>, "answer": <the source's column>}.
        max_seq_len: rows are cut on the right at so many tokens; one whose answer is cut off entirely is dropped and
            counted.
        custom_formatting_fn: applied to the raw rows first; takes a row or a batch, as in Kithara.
        on_bad_row: "error" names the row and stops; "skip" counts it.
        formatting_style: "row" or "batch", what custom_formatting_fn takes; "auto" finds out on the first row.
    """

    _format_class = PromptAnswer


class TextCompletionDataset(_Dataset):
    """Plain text, for continued pretraining; the loss is on every token.

    Args: as SFTDataset, with `column_mapping={"text": <the source's column>}`.
    """

    _format_class = Text


class Dataloader:
    """How a dataset is cut into batches.

    Args:
        dataset: SFTDataset or TextCompletionDataset.
        per_device_batch_size: rows per device; the global batch is this x all devices. "auto" takes the largest
            power of two that fits the TPU slice of the run, see `kithara_ray.plan`.
        shuffle: each epoch in an order of its own, a function of (seed, epoch).
        seed: of the shuffle.
        packing: put as many rows of the dataset as fit into each sequence of `max_seq_len` tokens. They do not see each
            other; what is computed of each is what it gives alone. `dataset.to_packed_dataset()` says the same.
    """

    def __init__(
        self,
        dataset: _Dataset,
        per_device_batch_size: int | Literal["auto"],
        dataset_is_sharded_per_host: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        packing: bool = False,
    ):
        number = isinstance(per_device_batch_size, int) and per_device_batch_size >= 1
        if not number and per_device_batch_size != "auto":
            raise ConfigError(
                f"per_device_batch_size must be an integer >= 1, got {per_device_batch_size!r}; "
                'on a TPU slice it may be "auto"'
            )
        if dataset_is_sharded_per_host:
            raise UnsupportedError(
                "dataset_is_sharded_per_host=True: the hosts share one dataset here, and each reads only its own rows; "
                "leave the argument out"
            )
        self.dataset = dataset
        self.per_device_batch_size = per_device_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.packing = packing or dataset.packed

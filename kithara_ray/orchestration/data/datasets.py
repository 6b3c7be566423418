"""The dataset handles of the public API: a user's description of the data, made before any row is read."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.data.pipeline import tokenize_whole, tokenized_rows
from kithara_ray.orchestration.data.token_rows import Rows
from kithara_ray.sft import preview as previews
from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.preview import Preview
from kithara_ray.sft.rows.listing import Choice
from kithara_ray.sft.tokens.formats import PromptAnswer, Text
from kithara_ray.sft.tokens.tokenize import RowTokenizer
from kithara_ray.sft.tokens.tokenizer_files import read_template
from kithara_ray.storage.urls import absolute

# Rows that a preview reads of a source without an end.
_PREVIEWED = 1000


class RowDataset:
    """The part that SFTDataset and TextCompletionDataset share: everything except the format of a row."""

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
        chat_template: str | None = None,
        split: str | None = None,
        subset: str | None = None,
        format: str = "auto",
        **unknown: Any,
    ):
        for name in unknown:
            why = " (only KerasHub models exist here)" if name == "model_type" else ""
            raise ConfigError(f"{type(self).__name__} takes no argument {name!r}{why}")
        if (tokenizer is None) == (tokenizer_handle is None):
            raise ConfigError(f"{type(self).__name__} needs one of tokenizer and tokenizer_handle")
        self.choice = Choice(split, subset)
        self.source = sources.part_of(source, self.choice)
        self.tokenizer = absolute(tokenizer_handle) if tokenizer_handle is not None else tokenizer
        self.max_seq_len = max_seq_len
        self.on_bad_row = on_bad_row
        self.column_mapping = dict(column_mapping or {})
        self.custom_formatting_fn = custom_formatting_fn
        self.formatting_style = formatting_style
        self.chat_template = read_template(chat_template)
        self.format = format
        self.packed = False
        self.name = ""  # shown in messages
        self.row_tokenizer()

    def row_tokenizer(self) -> RowTokenizer:
        """Return the callable that turns this dataset's rows into tokens; picklable."""
        how = self.column_mapping, self.custom_formatting_fn, self.formatting_style, self.format
        text_format = self._format_class(*how)
        return RowTokenizer(self.tokenizer, text_format, self.max_seq_len, self.on_bad_row, self.chat_template)

    @property
    def is_endless(self) -> bool:
        """True if the source's number of rows is unknown, as in a streaming Hugging Face dataset."""
        source = self.source
        return hasattr(source, "features") and hasattr(source, "__iter__") and not hasattr(source, "__len__")

    def head(self, rows: int) -> "RowDataset":
        """Return the same dataset limited to the source's first rows, which are read now."""
        taken = copy.copy(self)
        taken.source = next((work.rows() for work in sources.stream(self.source, rows)), [])
        return taken

    def tokenized_rows(self) -> Iterator[TokenizedRow]:
        """Yield the rows to train on, in the source's order, tokenised in this process and without a cluster.

        Each row has `token_ids`, `loss_mask` and `place`, its position in the source. A streaming source is read once.
        Only a Ray Dataset needs Ray.

        Raises:
            DataError: a row is bad, or there is nothing to train on; the same as in training.
        """
        return tokenized_rows(self)

    def preview(self, rows: int = 3) -> Preview:
        """Tokenise the dataset, on the cluster or a local Ray, and show its first rows and its token statistics.

        `print(dataset.preview())` marks trainable tokens by «»; `.render()` is for rich.
        """
        return preview(self, rows)

    def to_packed_dataset(self):
        """Return the same dataset, for a Dataloader that packs several rows into one sequence."""
        packed = copy.copy(self)
        packed.packed = True
        return packed


class SFTDataset(RowDataset):
    """Prompts and answers, or conversations. The loss covers only the answers and their end tokens.

    Rows have columns `prompt` and `answer`, or those of another format. Conversations go through the tokenizer's chat
    template. docs/data.md has an example of each format, and lists the trainable tokens of a conversation.

    Args:
        source: a path, URL, directory or pattern, or a list of these (.jsonl, .json, .csv, .tsv, .parquet, .arrow,
            .txt); the output of `save_to_disk`; a list of dicts; a Ray Dataset; a Hugging Face dataset; a pandas
            DataFrame; or an Arrow table. Rows have the values that iterating over the source gives.
        tokenizer: a transformers tokenizer. Give this or tokenizer_handle.
        tokenizer_handle: location to load a tokenizer from: `hf://...`, a local directory, `gs://...`.
        column_mapping: the format's column -> the source's column: {"prompt": <the source's column>, "answer": ...}
            or {"messages": ...}.
        max_seq_len: maximum tokens of a row. Longer rows are cut on the right. A row whose answer is cut off entirely
            is dropped and counted.
        custom_formatting_fn: function applied to the raw rows first; it takes a row or a batch, as in Kithara.
        on_bad_row: "error" stops and names source and row; "skip" counts the row and goes on.
        formatting_style: the input of custom_formatting_fn: "row" or "batch"; "auto" goes by the source's first row.
        chat_template: a Jinja template that replaces the tokenizer's own, or the path of a .jinja file.
        split: the split to read, if a directory, `hf://datasets/...`, a pattern or a DatasetDict has several:
            "train", "test", ..., or a slice of one: "train[:10%]", "train[100:200]", "train[-50:]".
        subset: the subset to read, if a directory or `hf://datasets/...` has several.
        format: the format of a row. "auto" detects it from the columns; the log and the preview report the result.
            "prompt_answer": texts `prompt` and `answer`, joined as they are.
            "chat": `prompt` and `answer` as a conversation of two messages, with `system` if there is one.
            "messages": `messages`, a list of {role, content, ...} or JSON text of one, with `tools`.
            "prompt_completion": TRL's `prompt` and `completion`, both text or both lists of messages.
            "sharegpt": `conversations`, a list of {from, value}, with `system` and `tools`.
            "alpaca": `instruction`, `input`, `output` as a conversation, with `system` and `history`.
            "alpaca_text": `instruction`, `input`, `output` in Alpaca's own prompt, without a chat template.
    """

    _format_class = PromptAnswer


class TextCompletionDataset(RowDataset):
    """Plain text, for continued pretraining; the loss is on every token.

    Args: the same as SFTDataset's, with `column_mapping={"text": <the source's column>}`.
    """

    _format_class = Text


class MixedDataset:
    """Several datasets used as one; see `mix`."""

    is_endless = False

    def __init__(self, datasets: Sequence[RowDataset], weights: Sequence[float], epoch: str):
        self.datasets = tuple(datasets)
        self.weights = tuple(float(weight) for weight in weights)
        self.epoch = epoch
        self.max_seq_len = max(dataset.max_seq_len for dataset in datasets)
        self.packed = any(dataset.packed for dataset in datasets)

    def preview(self, rows: int = 3) -> Preview:
        """Preview the mixture like a single dataset; every row counts once."""
        return preview(self, rows)

    def tokenized_rows(self) -> Iterator[TokenizedRow]:
        """Yield the rows of each dataset once, one dataset after the other; see `RowDataset.tokenized_rows`."""
        return tokenized_rows(self)

    def to_packed_dataset(self) -> "MixedDataset":
        packed = copy.copy(self)
        packed.packed = True
        return packed

    def draws(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the number of rows that an epoch takes from each dataset, given the datasets' sizes."""
        choose = max if self.epoch == "all" else min
        share = choose(size / weight for size, weight in zip(sizes, self.weights, strict=True))
        return tuple(max(1, round(weight * share)) for weight in self.weights)


def mix(datasets: Sequence[tuple[RowDataset, float]], epoch: str = "all") -> MixedDataset:
    """Mix datasets by weight, for a Dataloader.

    In any stretch of an epoch, a dataset has about its share of the rows: weight / sum of weights. Each dataset is read
    in its own shuffled orders. None of its rows repeats before all of them have come, even across epochs. The sequence
    of rows is a function of the Dataloader's seed. An evaluation on a mixture takes every row of each dataset once.

    Args:
        datasets: (dataset, weight > 0) pairs with one tokenizer. Their order affects the sequence that a seed gives.
        epoch: end of an epoch. "all" ends it when every dataset has been seen once; shorter ones repeat meanwhile.
            "first" ends it when the first dataset has been seen once, however much of the others has been.
    """
    if not datasets or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in datasets):
        raise ConfigError("mix takes a list of (dataset, weight)")
    for number, (dataset, weight) in enumerate(datasets):
        if not isinstance(dataset, RowDataset):
            raise ConfigError(f"mix: dataset {number} is {type(dataset).__name__}, not an SFTDataset or similar")
        if dataset.is_endless:
            raise UnsupportedError(f"mix: dataset {number} streams; mix streams with datasets.interleave_datasets")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ConfigError(f"mix: the weight of dataset {number} must be > 0, got {weight!r}")
        if dataset.tokenizer is not (first := datasets[0][0].tokenizer) and dataset.tokenizer != first:
            raise ConfigError(f"mix: dataset {number} has a different tokenizer from dataset 0")
    if epoch not in ("all", "first"):
        raise ConfigError(f"mix: epoch must be 'all' or 'first', got {epoch!r}")
    return MixedDataset([dataset for dataset, _ in datasets], [weight for _, weight in datasets], epoch)


def preview(dataset: RowDataset | MixedDataset, rows: int = 3) -> Preview:
    """Show a dataset's first rows as the model sees them, and its token statistics."""
    start_ray()
    if isinstance(dataset, RowDataset) and dataset.is_endless:
        dataset = dataset.head(_PREVIEWED)
    store = tokenize_whole(dataset)
    first = dataset.datasets[0] if isinstance(dataset, MixedDataset) else dataset
    read = Rows(store)
    shown = [read.row(number) for number in range(min(rows, store.num_rows))]
    tokenizer, counts = first.row_tokenizer().loaded(), dict(store.counts)
    return previews.preview(
        shown, tokenizer, store.lengths, store.trained, dataset.max_seq_len, counts, store.unread, store.told
    )


class Dataloader:
    """A dataset and its division into batches.

    Args:
        dataset: SFTDataset, TextCompletionDataset, or a `mix` of them.
        per_device_batch_size: rows per device; the global batch is this x all devices. "auto" takes the largest
            power of two that fits the TPU slice of the run, see `kithara_ray.plan`. In an evaluation, "auto" takes
            the training's rows per device.
        shuffle: give each epoch its own order, a function of (seed, epoch).
        seed: seed of the shuffle.
        packing: put as many rows of the dataset as fit into each sequence of `max_seq_len` tokens. The rows do not see
            each other, so each gives the same result as on its own. `dataset.to_packed_dataset()` has the same effect.
        length_buckets: maximum number of lengths that batches are padded to, without packing. Rows of similar length
            share a batch. Another length is added only if it saves a tenth of the work and is worth its compile time.
            1 pads every batch to the longest row.
        shuffle_rows: for a dataset that does not fit into the object stores' memory. Short stretches of rows are first
            shuffled over the whole dataset, then rows within windows of `shuffle_rows`. None shuffles all rows.
        eval_fraction: fraction of the rows to hold out of training and evaluate on, instead of an eval_dataloader. Of
            a mixture, this fraction of each dataset. The choice of rows is a function of the data and `seed`.
    """

    def __init__(
        self,
        dataset: RowDataset | MixedDataset,
        per_device_batch_size: int | Literal["auto"],
        dataset_is_sharded_per_host: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        packing: bool = False,
        length_buckets: int = 4,
        shuffle_rows: int | None = None,
        eval_fraction: float | None = None,
    ):
        number = isinstance(per_device_batch_size, int) and per_device_batch_size >= 1
        if not number and per_device_batch_size != "auto":
            raise ConfigError(
                f"per_device_batch_size must be an integer >= 1, got {per_device_batch_size!r}; "
                'on a TPU slice it may be "auto"'
            )
        counts = {"length_buckets": length_buckets}
        if shuffle_rows is not None:
            counts["shuffle_rows"] = shuffle_rows
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Dataloader: {name} must be an integer >= 1, got {value!r}")
        if dataset_is_sharded_per_host:
            raise UnsupportedError(
                "dataset_is_sharded_per_host=True: here the hosts share one dataset, and each reads only its own "
                "rows; leave the argument out"
            )
        _check_fraction(eval_fraction, dataset)
        self.dataset = dataset
        self.per_device_batch_size = per_device_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.packing = packing or dataset.packed
        self.length_buckets = length_buckets
        self.shuffle_rows = shuffle_rows
        self.eval_fraction = eval_fraction

    @property
    def packed_len(self) -> int | None:
        """Tokens of a row into which several samples are packed; None packs nothing."""
        return self.dataset.max_seq_len if self.packing else None


def _check_fraction(fraction: float | None, dataset: RowDataset | MixedDataset) -> None:
    if fraction is None:
        return
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ConfigError(f"Dataloader: eval_fraction must be > 0 and < 1, got {fraction!r}")
    if dataset.is_endless:
        raise UnsupportedError(
            "Dataloader: eval_fraction needs a dataset whose rows are known, and this one streams; give the Trainer an "
            "eval_dataloader"
        )

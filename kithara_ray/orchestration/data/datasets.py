"""The dataset handles of the public API: what a user writes about data, before anything is read."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.data.pipeline import tokenize, tokenized_rows
from kithara_ray.orchestration.data.token_rows import Rows
from kithara_ray.sft import preview as previews
from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.preview import Preview
from kithara_ray.sft.rows.listing import Choice
from kithara_ray.sft.tokens.formats import PromptAnswer, Text
from kithara_ray.sft.tokens.tokenize import RowTokenizer
from kithara_ray.sft.tokens.tokenizer_files import read_template
from kithara_ray.storage.urls import absolute

# Rows of a source without an end that a preview reads.
_PREVIEWED = 1000


class RowDataset:
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
        self.tokenizer = tokenizer if tokenizer is not None else absolute(tokenizer_handle)
        self.max_seq_len = max_seq_len
        self.on_bad_row = on_bad_row
        self.column_mapping = dict(column_mapping or {})
        self.custom_formatting_fn = custom_formatting_fn
        self.formatting_style = formatting_style
        self.chat_template = read_template(chat_template)
        self.format = format
        self.packed = False
        self.name = ""  # in messages
        self.row_tokenizer()

    def row_tokenizer(self) -> RowTokenizer:
        """What turns this dataset's rows into tokens; picklable."""
        how = self.column_mapping, self.custom_formatting_fn, self.formatting_style, self.format
        text_format = self._format_class(*how)
        return RowTokenizer(self.tokenizer, text_format, self.max_seq_len, self.on_bad_row, self.chat_template)

    @property
    def is_endless(self) -> bool:
        """Whether nobody knows how many rows the source has: a streaming Hugging Face dataset."""
        source = self.source
        return hasattr(source, "features") and hasattr(source, "__iter__") and not hasattr(source, "__len__")

    def head(self, rows: int):
        """The same dataset of the source's first rows alone, which are read now."""
        taken = copy.copy(self)
        taken.source = next((work.rows() for work in sources.stream(self.source, rows)), [])
        return taken

    def tokenized_rows(self) -> Iterator[TokenizedRow]:
        """What is trained on, row by row in the source's order, tokenised in this process and without a cluster.

        Each row has `token_ids`, `loss_mask` and `place`, where the row stands in the source. A source that streams is
        gone through once; a Ray Dataset alone needs Ray.

        Raises:
            DataError: as training does: a bad row, or nothing to train on.
        """
        return tokenized_rows(self)

    def preview(self, rows: int = 3) -> Preview:
        """Tokenise the dataset, on the cluster or a local Ray, and show its first rows and what they amount to.

        `print(dataset.preview())` marks what is learned by «»; `.render()` is for rich.
        """
        return preview(self, rows)

    def to_packed_dataset(self):
        """The same dataset, of which a Dataloader packs several rows into one sequence."""
        packed = copy.copy(self)
        packed.packed = True
        return packed


class SFTDataset(RowDataset):
    """Prompts and answers, or conversations; the loss is on what is answered and on its end alone.

    Rows have columns `prompt` and `answer`, or those of another format; conversations go through the tokenizer's chat
    template. docs/data.md has an example of each format, and says what is learned of a conversation.

    Args:
        source: a path, URL, directory or pattern, or a list of these (.jsonl, .json, .csv, .tsv, .parquet, .arrow,
            .txt), or what `save_to_disk` wrote; a list of dicts; a Ray Dataset; a Hugging Face dataset; a pandas
            DataFrame; an Arrow table. Rows are as iterating the source shows them.
        tokenizer: a transformers tokenizer, or
        tokenizer_handle: where to load one from: `hf://...`, a local directory, `gs://...`.
        column_mapping: {"prompt": <the source's column>, "answer": ...} or {"messages": ...}: the format's column ->
            the source's.
        max_seq_len: rows are cut on the right at so many tokens; one whose answer is cut off entirely is dropped and
            counted.
        custom_formatting_fn: applied to the raw rows first; takes a row or a batch, as in Kithara.
        on_bad_row: "error" names source and row and stops; "skip" counts it.
        formatting_style: "row" or "batch", what custom_formatting_fn takes; "auto" finds out on the first row.
        chat_template: Jinja in place of the tokenizer's own template, or the path of a .jinja file.
        split: which split to read, of a directory, `hf://datasets/...`, a pattern or a DatasetDict that has several:
            "train", "test", ...
        subset: which subset to read, of a directory or `hf://datasets/...` that has several.
        format: what a row is. "auto" goes by its columns, and the log and the preview say what it found.
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

    Args: as SFTDataset, with `column_mapping={"text": <the source's column>}`.
    """

    _format_class = Text


class MixedDataset:
    """Several datasets as one; see `mix`."""

    is_endless = False

    def __init__(self, datasets: Sequence[RowDataset], weights: Sequence[float], epoch: str):
        self.datasets = tuple(datasets)
        self.weights = tuple(float(weight) for weight in weights)
        self.epoch = epoch
        self.max_seq_len = max(dataset.max_seq_len for dataset in datasets)
        self.packed = any(dataset.packed for dataset in datasets)

    def preview(self, rows: int = 3) -> Preview:
        """As a dataset's; every row counts once."""
        return preview(self, rows)

    def tokenized_rows(self) -> Iterator[TokenizedRow]:
        """As a dataset's: the rows of each dataset once, one dataset after the other."""
        return tokenized_rows(self)

    def to_packed_dataset(self) -> "MixedDataset":
        packed = copy.copy(self)
        packed.packed = True
        return packed

    def draws(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Rows that an epoch takes of datasets of so many rows."""
        choose = max if self.epoch == "all" else min
        share = choose(size / weight for size, weight in zip(sizes, self.weights, strict=True))
        return tuple(max(1, round(weight * share)) for weight in self.weights)


def mix(datasets: Sequence[tuple[RowDataset, float]], epoch: str = "all") -> MixedDataset:
    """Datasets mixed by weight, for a Dataloader.

    In any stretch of an epoch a dataset has about its share of the rows, weight / sum of weights. Each is gone through
    in orders of its own, none of its rows again before all have come, across epochs. Which rows come when is a function
    of the Dataloader's seed. Evaluated on, a mixture is every row of each dataset once.

    Args:
        datasets: (dataset, weight > 0), in an order that matters to the seed; with one tokenizer.
        epoch: "all" ends an epoch when every dataset has been seen once, others again meanwhile; "first" when the first
            has, which sees a part of the others.
    """
    if not datasets or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in datasets):
        raise ConfigError("mix takes a list of (dataset, weight)")
    for number, (dataset, weight) in enumerate(datasets):
        if not isinstance(dataset, RowDataset):
            raise ConfigError(f"mix: dataset {number} is {type(dataset).__name__}, not SFTDataset or alike")
        if dataset.is_endless:
            raise UnsupportedError(f"mix: dataset {number} streams; mix it by datasets.interleave_datasets")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ConfigError(f"mix: the weight of dataset {number} must be > 0, got {weight!r}")
        if dataset.tokenizer is not (first := datasets[0][0].tokenizer) and dataset.tokenizer != first:
            raise ConfigError(f"mix: dataset {number} has another tokenizer than dataset 0")
    if epoch not in ("all", "first"):
        raise ConfigError(f"mix: epoch must be 'all' or 'first', got {epoch!r}")
    return MixedDataset(*zip(*datasets, strict=True), epoch)


def preview(dataset: RowDataset | MixedDataset, rows: int = 3) -> Preview:
    """A dataset's first rows as the model sees them, and what its tokens amount to."""
    start_ray()
    if dataset.is_endless:
        dataset = dataset.head(_PREVIEWED)
    store = tokenize(dataset)
    first = dataset.datasets[0] if isinstance(dataset, MixedDataset) else dataset
    read = Rows(store)
    shown = [read.row(number) for number in range(min(rows, store.num_rows))]
    tokenizer = first.row_tokenizer().loaded()
    return previews.preview(
        shown, tokenizer, store.lengths, store.trained, dataset.max_seq_len, store.counts, store.unread, store.told
    )


class Dataloader:
    """How a dataset is cut into batches.

    Args:
        dataset: SFTDataset, TextCompletionDataset, or a `mix` of them.
        per_device_batch_size: rows per device; the global batch is this x all devices. "auto" takes the largest
            power of two that fits the TPU slice of the run, see `kithara_ray.plan`; in an evaluation, the training's
            rows.
        shuffle: each epoch in an order of its own, a function of (seed, epoch).
        seed: of the shuffle.
        packing: put as many rows of the dataset as fit into each sequence of `max_seq_len` tokens. They do not see each
            other; what is computed of each is what it gives alone. `dataset.to_packed_dataset()` says the same.
        length_buckets: without packing, rows of like length share a batch, and batches are padded to at most so many
            lengths; a further one is taken where it saves a tenth of the work and is worth its compiling. 1 pads every
            batch to the longest row.
        shuffle_rows: shuffle within so many rows, stretches of which are first spread over the dataset; for a dataset
            that does not fit into the object stores' memory. None shuffles all rows.
        eval_fraction: hold this share of the rows out of training, and evaluate on them instead of an eval_dataloader;
            of a mixture, this share of each dataset. Which rows is a function of the data and `seed`.
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
                "dataset_is_sharded_per_host=True: the hosts share one dataset here, and each reads only its own rows; "
                "leave the argument out"
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

"""Three kinds of tokenizers, trained here on a little text, saved, and loaded as a user's would be."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = [
    "Question: what is 12 + 7? Answer: 19",
    "The capital of France is Paris, and the answer is 42.\nThe answer, the answer!",
    "an answer answers the question; the questions were answered",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 - + = * / : , . ! ? ; ' ( )",
    "foobar foobar foobar foobars are foobar",
    "user assistant system <x> [y] {z}",
] * 4
CHARACTERS = sorted(set("".join(TEXT)))


def _byte_level_bpe(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _put_bos_first(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _chat() -> PreTrainedTokenizerFast:
    """As SmolLM2: names a BOS, adds none; pads with EOS."""
    tokenizer = _byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def _llama3() -> PreTrainedTokenizerFast:
    """As Llama 3: the post-processor puts BOS first; names no pad."""
    tokenizer = _byte_level_bpe(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    _put_bos_first(tokenizer, "<|begin_of_text|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def _sentencepiece() -> PreTrainedTokenizerFast:
    """A Unigram model over Metaspace, which puts a space before every text; BOS first, a pad of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=180,
            special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"],
            unk_token="<unk>",
            initial_alphabet=CHARACTERS,
            show_progress=False,
        ),
    )
    _put_bos_first(tokenizer, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


KINDS = {"chat": _chat, "llama3": _llama3, "sentencepiece": _sentencepiece}
ADDS_BOS = {"chat": False, "llama3": True, "sentencepiece": True}


@pytest.fixture(scope="session")
def tokenizer_directories(tmp_path_factory):
    directories = {}
    for kind, make in KINDS.items():
        directories[kind] = tmp_path_factory.mktemp(kind)
        make().save_pretrained(directories[kind])
    return directories


@pytest.fixture(scope="session")
def tokenizers(tokenizer_directories):
    return {kind: AutoTokenizer.from_pretrained(path) for kind, path in tokenizer_directories.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind, tokenizers):
    return tokenizers[kind]


@pytest.fixture
def sentences():
    """What the tokenizers were trained on: they know its words, and can write all its characters."""
    return sorted(set(TEXT))


@pytest.fixture
def adds_bos(kind):
    return ADDS_BOS[kind]

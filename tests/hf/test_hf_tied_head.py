"""A tied head whose tensor stands in the file: a copy changes nothing, values of its own are refused."""

import ml_dtypes
import numpy as np
import plain_llama
import pytest

from kithara_ray.errors import CheckpointError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tied_head import EMBEDDING, HEAD, check_tied_head, is_tied


def tied(directory, change):
    return plain_llama.write(directory, change=change, tie_word_embeddings=True)


def copied(tensors):
    tensors[HEAD] = tensors[EMBEDDING].copy()


def copied_but_for(place):
    def change(tensors):
        copied(tensors)
        tensors[HEAD].reshape(-1)[place] += 1

    return change


def longer(tensors):
    tensors[HEAD] = np.vstack([tensors[EMBEDDING], np.zeros((8, 16), np.float32)])


def copied_in(dtype):
    def change(tensors):
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
        tensors[HEAD] = tensors[EMBEDDING].astype(dtype)

    return change


@pytest.mark.parametrize(
    "change", [lambda t: t.pop(HEAD), copied, copied_in(np.float32), copied_in(ml_dtypes.bfloat16)]
)
def test_a_head_that_says_nothing_of_its_own_is_taken(change, tmp_path):
    check_tied_head(BaseCheckpoint.open(tied(tmp_path / "base", change)))


@pytest.mark.parametrize("change", [lambda t: None, copied_but_for(0), copied_but_for(-1), copied_but_for(250), longer])
def test_a_head_of_its_own_is_refused(change, tmp_path, monkeypatch):
    monkeypatch.setattr("kithara_ray.hf.tied_head._ROWS_BYTES", 256)  # several parts, as of a large tensor
    with pytest.raises(CheckpointError, match=r'lm_head\.weight .* differs .* write "tie_word_embeddings": false'):
        check_tied_head(BaseCheckpoint.open(tied(tmp_path / "base", change)))


def test_an_untied_head_is_its_own(tmp_path):
    check_tied_head(BaseCheckpoint.open(plain_llama.write(tmp_path / "base")))


def test_of_weights_at_a_url_the_ends_are_compared(tmp_path, memory, monkeypatch):
    monkeypatch.setenv("KITHARA_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kithara_ray.hf.tied_head.EDGE_BYTES", 64)
    for name, change in (("same", copied), ("last", copied_but_for(-1))):
        memory.put(str(tied(tmp_path / name, change)), f"/{name}", recursive=True)
    check_tied_head(BaseCheckpoint.at("memory://same"))
    with pytest.raises(CheckpointError, match=r"memory://last: config\.json ties the head"):
        check_tied_head(BaseCheckpoint.at("memory://last"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "smollm3", "mistral", "gpt_oss", "gemma4_text"])
def test_what_transformers_takes_where_config_json_says_nothing(family):
    import transformers

    default = type(transformers.AutoConfig.for_model(family))().tie_word_embeddings
    assert is_tied({"model_type": family}) == default
    assert is_tied({"model_type": family, "tie_word_embeddings": not default}) != default


def test_training_refuses_what_is_first_seen_when_weights_are_loaded(tmp_path):
    from kithara_ray.model.weights.slots import check_complete

    base = BaseCheckpoint.open(tied(tmp_path / "base", copied_but_for(3)))
    with pytest.raises(CheckpointError, match="ties the head to the embedding"):
        check_complete(base, [_Port(name) for name in base.names if name != HEAD])


class _Port:
    def __init__(self, name):
        self.pieces = (self,)
        self.hf_name = name

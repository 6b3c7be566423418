"""No field of config.json, and no tensor, changes transformers' logits and not ours: both are equal, or we refuse.

The sweep is seen to find three faults that computed other logits in silence, by opening their doors again.
"""

import collections
import shutil

import numpy as np
import pytest
import sides
import sweep
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sizes import SIZES
from sweep import DIFFERENT, EQUAL, REFUSED, SKIPPED
from tiny import mostly_long, write_model

from kithara_ray.errors import CheckpointError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tied_head import EMBEDDING, HEAD
from kithara_ray.model.families.tensors import check_tensors

pytestmark = pytest.mark.usefixtures("hastily")


@pytest.fixture(autouse=True)
def _quiet():
    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    # In models this small, threads only wait for each other.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


def assert_nothing_silent(verdicts):
    assert [each for each in verdicts if each.outcome == DIFFERENT] == []
    count = collections.Counter(each.outcome for each in verdicts)
    # A judge that always raised, or a check that refused everything, would pass the line above.
    assert count[EQUAL] > 20
    assert count[REFUSED] >= 1
    assert count[SKIPPED] < len(verdicts) / 2
    assert any(each.moved for each in verdicts if each.outcome == EQUAL)


@pytest.mark.parametrize("family", mostly_long(["gemma2", "llama"], SIZES))
def test_each_field_changed_in_every_way(family, tmp_path):
    directory = write_model(tmp_path / "model", family, **sweep.shallow(family))
    assert_nothing_silent(sweep.sweep_fields(directory, tmp_path / "changed"))


# A field, and the name of the check that refuses it.
FAULTS = {
    "is_causal": ("llama", "kithara_ray.model.families.check_causal", lambda config: None),
    "layer_types": ("mistral", "kithara_ray.model.families.model_type_of", lambda config: config["model_type"]),
}


@pytest.mark.parametrize("field", FAULTS)
def test_the_sweep_sees_a_silent_fault(field, tiny_models, tmp_path, monkeypatch):
    family, check, opened = FAULTS[field]
    monkeypatch.setattr(check, opened)
    verdicts = sweep.sweep_fields(tiny_models[family], tmp_path / "changed", only=field)
    assert DIFFERENT in {each.outcome for each in verdicts}


def own_head(directory, place):
    """A tied model whose file also has a head of its own values."""
    shutil.copytree(directory, place)
    tensors = load_file(place / "model.safetensors")
    tensors[HEAD] = np.roll(tensors[EMBEDDING], 1, axis=0)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def test_a_head_of_its_own_beside_a_tied_config_is_refused(tiny_models, tmp_path, monkeypatch):
    place = own_head(tiny_models["llama"], tmp_path / "own")
    with pytest.raises(CheckpointError, match=f"ties the head to the embedding .*{HEAD}"):
        check_tensors(BaseCheckpoint.open(place))
    # Without the refusal, other logits would be computed in silence.
    monkeypatch.setattr("kithara_ray.model.families.tensors.check_tied_head", lambda base: None)
    assert np.abs(sides.Ours(place).unchanged - sides.theirs(place)).max() > 1

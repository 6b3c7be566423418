"""Rows longer than what the base was made for are warned of by name, before a run."""

import json
import types

import pytest

from kithara_ray.orchestration.preflight import checks
from kithara_ray.orchestration.preflight.findings import find


def request(handle, train, evaluation=None):
    lengths = {"train_dataloader": train, "eval_dataloader": evaluation}
    loaders = {
        name: types.SimpleNamespace(dataset=types.SimpleNamespace(max_seq_len=length))
        for name, length in lengths.items()
        if length
    }
    return types.SimpleNamespace(model=types.SimpleNamespace(preset_handle=str(handle)), loaders=loaders.items)


@pytest.mark.parametrize(
    ("lengths", "state", "text"),
    [
        ((512,), "ok", "max_seq_len 512 of 512 positions"),
        ((513,), "warning", "train_dataloader's max_seq_len is 513, and .* supports 512 positions"),
        ((8, 600), "warning", "^eval_dataloader's max_seq_len is 600, and"),
    ],
)
def test_max_seq_len_beyond_the_bases_positions(tiny_models, tmp_path, lengths, state, text):
    import re
    import shutil

    base = shutil.copytree(tiny_models["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    found = find("length", lambda: checks.check_length(request(base, *lengths)))
    assert found.state == state
    assert re.search(text, found.text)

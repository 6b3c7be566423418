"""What a user gets wrong, through the command line: each case ends in bounded time, with exit code 1 and one message
that names the thing, and leaves the destinations as they were. No case starts a worker, most do not even start Ray.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import tiny
from bad_inputs import CASES, ON_THE_CLUSTER, Space

from kithara_ray.cli.app import main
from kithara_ray.hf.adapter import Adapter, target_modules_of
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig

BOUND_S = 60.0


@pytest.fixture
def space(tiny_models, tmp_path):
    space = Space(tmp_path)
    shutil.copytree(tiny_models["llama"], space.model)
    base = BaseCheckpoint.open(space.model)
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    tensors = {}
    for module in target_modules_of(lora, base):
        out, inner = base.tensors[f"{module}.weight"].shape
        tensors |= {f"{module}.lora_A.weight": np.ones((2, inner), np.float32)}
        tensors |= {f"{module}.lora_B.weight": np.ones((out, 2), np.float32)}
    Adapter(lora, tensors).write(space.adapter, str(space.model))
    space.rows(*tiny.rows(6))
    space.config = {
        "model": {"preset_handle": str(space.model), "lora_rank": 2, "precision": "float32"},
        "train_dataloader": {
            "dataset": {"type": "SFTDataset", "source": str(tmp_path / "train.jsonl"), "max_seq_len": 32},
            "per_device_batch_size": 1,
        },
        "optimizer": {"learning_rate": 0.001},
        "trainer": {"steps": 1, "progress": False, "cluster_timeout_s": 1},
        "run_config": {"storage_path": str(tmp_path / "runs"), "name": "run"},
        "exports": [{"output_dir": str(tmp_path / "out" / "merged")}],
    }
    return space


def tree(directory: Path) -> dict[str, bytes]:
    """Every file and directory with its content; what the run itself may leave is not looked at."""
    paths = [path for path in directory.rglob("*") if path.relative_to(directory).parts[0] != "runs"]
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_THE_CLUSTER])
def test_bad_input_is_refused_before_ray_starts(name, space, capsys, monkeypatch):
    def init(*arguments, **settings):
        raise AssertionError("this case starts Ray: add it to ON_THE_CLUSTER")

    monkeypatch.setattr(ray, "init", init)
    assert_refused(name, space, capsys)


@pytest.mark.parametrize("name", ON_THE_CLUSTER)
def test_bad_input(name, cluster, space, capsys):
    assert_refused(name, space, capsys)


def assert_refused(name, space, capsys):
    spoil, message = CASES[name]
    spoil(space)
    path = space.root / "run.yaml"
    path.write_text(space.text if space.text is not None else json.dumps(space.config))
    before, started = tree(space.root), time.monotonic()
    code = main(["train", str(path)])
    seconds = time.monotonic() - started
    shown = " ".join(capsys.readouterr().err.split())
    assert code == 1, shown
    assert re.search(message, shown), shown
    assert "Traceback" not in shown
    assert seconds < BOUND_S
    assert tree(space.root) == before
    assert not os.path.exists("/tmp/never")


def test_there_are_enough_of_them():
    assert len(CASES) >= 65

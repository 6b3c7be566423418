"""The trained adapter on the head: named by its content, written once, and sent again only where it is not there."""

import dataclasses

import numpy as np
import pytest
from stores import clear_memory

from kithara_ray.errors import AdapterError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.head import adapters
from kithara_ray.orchestration.head.adapters import AdapterRef, NotHeldError, ask, digest_of, tensors_of, write_adapter
from kithara_ray.orchestration.head.coordinator import Coordinator
from kithara_ray.orchestration.worker.channel import AdapterSpec
from kithara_ray.sharding.gather import Shard

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = LoraConfig(r=2, lora_alpha=3)


@pytest.fixture
def tensors():
    draw = np.random.default_rng(0).standard_normal
    shapes = {f"{MODULE}.lora_A.weight": (2, 6), f"{MODULE}.lora_B.weight": (4, 2)}
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


def reference(tensors, directory=None) -> AdapterRef:
    return AdapterRef("hf://org/base", CONFIG, digest_of(tensors), directory)


def changed(tensors) -> dict:
    copy = {name: array.copy() for name, array in tensors.items()}
    copy[f"{MODULE}.lora_B.weight"][3, 1] = np.nextafter(copy[f"{MODULE}.lora_B.weight"][3, 1], 9)
    return copy


def test_a_digest_is_of_every_bit(tensors):
    first, second = tensors
    assert digest_of(tensors) == digest_of({second: tensors[second].copy(), first: tensors[first].copy()})
    others = [
        changed(tensors),
        {first: tensors[first]},
        {first: tensors[first], second + "x": tensors[second]},
        {first: tensors[first].reshape(6, 2), second: tensors[second]},
        {first: tensors[first], second: tensors[second].view(np.int32)},
        {first: tensors[first], second: tensors[second].T.copy().reshape(4, 2)},
    ]
    assert len({digest_of(other) for other in [tensors, *others]}) == 1 + len(others)


def test_an_adapter_is_found_by_its_content_alone(tensors, tmp_path):
    """In memory, or in the run's directory as long as that holds the same bits; else the driver is asked for it."""
    wanted, other = reference(tensors, str(tmp_path)), changed(tensors)
    assert tensors_of(wanted, tensors) is tensors
    for held in (None, other):
        with pytest.raises(NotHeldError):
            tensors_of(wanted, held)
    assert tensors_of(dataclasses.replace(wanted, tensors=tensors), other) is tensors
    write_adapter(wanted, tensors)
    found = tensors_of(wanted, None)
    assert digest_of(found) == digest_of(tensors)
    write_adapter(wanted, other)
    with pytest.raises(NotHeldError):
        tensors_of(wanted, None)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(NotHeldError):
        tensors_of(wanted, None)


def test_tensors_are_sent_where_they_are_not_held(tensors, monkeypatch):
    monkeypatch.setattr(adapters, "remote_get", lambda call: call())
    for held, sendings in ((tensors, [None]), (None, [None, tensors])):
        sent = []

        def call(adapter, held=held, sent=sent):
            sent.append(adapter.tensors)
            return lambda: tensors_of(adapter, held)

        assert ask(call, reference(tensors), tensors) is tensors
        assert sent == sendings


@pytest.mark.parametrize("where", ["local", "memory://runs/mine"])
def test_it_is_written_into_the_run_s_directory(tensors, tmp_path, where):
    """A path or a URL; of a second run of that name there is the second one."""
    directory = str(tmp_path / "run") if where == "local" else where
    clear_memory()
    for trained in (tensors, changed(tensors)):
        written = write_adapter(reference(trained, directory), trained)
        assert written == f"{directory}/adapter"
        read = Adapter.read(fetch(written))
        assert digest_of(read.tensors) == digest_of(trained)
        assert (read.config.r, read.config.alpha) == (2, 3)
        if where != "local":
            break  # what was fetched of a URL is kept
    if where == "local":
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]
    clear_memory()


def test_the_coordinator_assembles_once_and_keeps_it(tensors):
    coordinator = Coordinator()
    made = AdapterSpec("hf://org/base", CONFIG, {name: array.shape for name, array in tensors.items()}, num_ranks=2)
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        shards = [
            Shard(
                f"{MODULE}.lora_B.weight",
                ((own.start, own.stop), (0, 2)),
                tensors[f"{MODULE}.lora_B.weight"][own],
                rank,
            )
        ]
        if rank == 0:
            shards.append(Shard(f"{MODULE}.lora_A.weight", ((0, 2), (0, 6)), tensors[f"{MODULE}.lora_A.weight"], 0))
        if rank == 1:
            with pytest.raises(AdapterError, match=r"nothing came from rank \[1\]"):
                coordinator.adapter(made)
        coordinator.put_shards(rank, shards)
    assembled = coordinator.adapter(made)
    assert digest_of(assembled) == digest_of(tensors)
    # Asked again, as Ray does where the answer was lost.
    assert coordinator.adapter(made) is assembled
    coordinator.start_run()
    with pytest.raises(AdapterError):
        coordinator.adapter(made)

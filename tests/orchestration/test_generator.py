"""What `generate` runs in an actor and on a group: one program before and after training, and the default mesh."""

from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.train import RunConfig, ScalingConfig
from tiny import TARGETS
from transformers import AutoTokenizer

from kithara_ray import MeshShape
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration import generator, generator_group
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.generator import Request, Weights

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"])


def asked(directory) -> Request:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Request(["one and two", "seven"], tokenizer, 14, (), False, False, True)


def random_adapter(decoding) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in decoding.model.adapter_shapes.items()}


def test_one_program_serves_the_base_and_what_is_trained_on_it(tiny_models):
    """Without an adapter's tensors the base answers, with them the adapter does, as a model built for either would."""
    from kithara_ray.orchestration.decoding import Decoding

    directory = str(tiny_models["llama"])
    request, plain = asked(directory), Weights(directory, None, "float32", None)
    worker = generator.Generator()
    worker.load(Weights(directory, LORA, "float32", None))
    decoding, before = worker._decoding, worker.generate(request)
    assert before == Decoding(plain).generate(request)

    trained = Weights(directory, LORA, "float32", random_adapter(decoding))
    worker.unload()
    assert (decoding.decoder.factors, decoding.decoder.frozen) == ({}, [])
    worker.load(trained)
    after = worker.generate(request)
    assert after == Decoding(trained).generate(request) != before
    assert worker._decoding is decoding
    # A program for prompts, and one for steps.
    assert [block._cache_size() for block in decoding.decoder.programs.blocks] == [2]
    assert not decoding.fits(plain)


def test_magnitudes_that_are_not_trained_are_left_out():
    dora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    assert Weights("base", dora, "float32", None).adapted is None
    assert Weights("base", dora, "float32", {}).adapted is dora
    assert Weights("base", None, "float32", None).adapted is None


class Remote:
    """An actor's handle; `calls` holds what was asked of it."""

    def __init__(self, dies: bool = False):
        self.calls: list[str] = []
        self.dies = dies

    def __getattr__(self, name):
        def remote(*args):
            self.calls.append(name)
            if self.dies and "unload" in self.calls and name == "load":
                raise ActorDiedError
            return name

        return SimpleNamespace(remote=remote)


def test_an_actor_keeps_its_process_while_it_holds_no_weights(monkeypatch):
    first, second = Remote(dies=True), Remote()
    started = iter([first, second])
    monkeypatch.setattr(generator, "_started", lambda: next(started))
    monkeypatch.setattr(generator, "remote_get", lambda answer: answer)
    monkeypatch.setattr(generator.ray, "kill", lambda actor: actor.calls.append("killed"))
    user = generator.GeneratorActor()
    user.unload()
    user.generate(None, None)
    user.generate(None, None)
    user.unload()
    user.unload()
    assert first.calls == ["load", "generate", "generate", "unload"]
    user.generate(None, None)  # the first is dead by now
    user.end()
    user.end()
    assert second.calls == ["load", "generate", "killed"]


@pytest.mark.parametrize(("ram", "mesh"), [(10**9, MeshShape(data=-1, fsdp=1)), (10**6, MeshShape()), (None, None)])
def test_a_group_has_the_default_mesh_of_training(ram, mesh, tiny_models, monkeypatch):
    weights = Weights(str(tiny_models["llama"]), LORA, "float32", None)
    group = WorkerGroup(ScalingConfig(num_workers=2), RunConfig(name="g", storage_path="/g"), 1, 1.0)
    nodes = SimpleNamespace(of_cluster=lambda: SimpleNamespace(ram_of_worker=lambda group: ram))
    monkeypatch.setattr(generator_group, "Nodes", nodes)
    for name in ("wait", "begin"):
        monkeypatch.setattr(WorkerGroup, name, lambda self: None)
    monkeypatch.setattr(WorkerGroup, "run", lambda self, loop, config: SimpleNamespace(return_value=config["spec"]))
    assert generator_group.generate_on_group(group, weights, None, None).mesh == mesh
    given = MeshShape(tensor=2)
    assert generator_group.generate_on_group(group, weights, None, given).mesh == given

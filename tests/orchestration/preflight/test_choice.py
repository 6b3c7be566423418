"""The settings that a run leaves open: who fills them in, and from what."""

from dataclasses import dataclass, field

import pytest
from asking import LORA, V5E_4, loader, request

from kithara_ray import MeshShape
from kithara_ray.errors import ConfigError, PlanError
from kithara_ray.orchestration.driver.run_manifest import settings
from kithara_ray.orchestration.preflight import choice, memory_fit

TWO_SLICES = V5E_4 | {"topology": "4x4", "num_workers": 8}
OPEN = {"remat": "auto"}
WHOLE, SPLIT = {"data": 16, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 16, "tensor": 1}


@dataclass
class Best:
    """A chosen plan, as far as it is looked at."""

    mesh: dict = field(default_factory=lambda: dict(WHOLE))
    settings: dict = field(default_factory=lambda: {"remat": "dots", "per_device_batch_size": 4})
    fits: bool = True
    chosen: dict = field(default_factory=lambda: {"why": "it is the fastest"})

    def verdict(self) -> str:
        return "needs 99 GiB"


@pytest.fixture
def asked_of_the_planner(monkeypatch):
    """The arguments of each choice; `best` is what comes of it."""
    calls = []

    def choose(base, where, seq_len, rows, **how):
        calls.append((base, where.name, seq_len, rows, how))
        if isinstance(choose.best, Exception):
            raise choose.best
        return choose.best

    choose.best, choose.calls = Best(), calls
    monkeypatch.setattr(choice, "choose", choose)
    monkeypatch.setattr(memory_fit, "check", lambda *given: Best(fits=True))
    return choose


def test_on_cpus_nothing_is_compiled(asked_of_the_planner):
    asked = request(step={**OPEN, "mesh": MeshShape(data=-1, fsdp=1)})
    settled, fit = choice.fit(asked, (64, 64))
    assert (settled.step.remat, settled.step.mesh) == ("block", asked.step.mesh)
    assert fit == memory_fit.Fit(2, None)
    assert not asked_of_the_planner.calls


def test_open_settings_of_a_slice_are_chosen_and_told(asked_of_the_planner):
    settled, fit = choice.fit(request(TWO_SLICES, step=OPEN, train=loader("auto")), (128, 24))
    (call,) = asked_of_the_planner.calls
    assert call == (
        "/base", "v5e-16", 128, "auto",
        {
            "lora": LORA, "optimizer": ("keras", {}), "mesh": None, "remat": "auto", "precision": "float32",
            "gradient_accumulation_steps": 1, "predictions": 24, "slices": 2, "router_aux_loss_coef": 0.0,
            "train_weights": False, "quantize": None,
        },
    )  # fmt: skip
    assert (settled.step.remat, settled.step.mesh) == ("dots", MeshShape(data=-1, fsdp=1))
    told = settings(settled)["trainer"]
    assert (told["remat"], told["mesh"]) == ("dots", {"data": -1, "fsdp": 1, "tensor": 1, "expert": 1})
    assert fit.rows_per_device == 4
    assert fit.plan["chosen"] == {"why": "it is the fastest"}
    assert settled.default_mesh["why"] == "the planner chose it: it is the fastest"


def test_split_weights_are_never_split_between_slices(asked_of_the_planner):
    asked_of_the_planner.best = Best(mesh=SPLIT)
    settled, _ = choice.fit(request(TWO_SLICES, step=OPEN), (128, 24))
    assert settled.step.mesh == MeshShape(data=2, fsdp=-1)
    assert asked_of_the_planner.calls[0][3] == 2


def test_what_is_given_is_kept(asked_of_the_planner):
    mesh = MeshShape(data=2, tensor=2)
    settled, _ = choice.fit(request(TWO_SLICES, step={**OPEN, "mesh": mesh}), (128, 24))
    assert (settled.step.remat, settled.step.mesh) == ("dots", mesh)
    assert asked_of_the_planner.calls[0][4]["mesh"] == MeshShape(data=1, tensor=2)
    choice.fit(request(TWO_SLICES, step={"remat": "nested"}), (128, 24))
    assert asked_of_the_planner.calls[1][4]["remat"] == "nested"
    given = request(TWO_SLICES, step={"remat": "nested", "mesh": mesh})
    assert choice.fit(given, (128, 24))[0] is given
    assert len(asked_of_the_planner.calls) == 2


def test_a_choice_that_does_not_fit_ends_the_run(asked_of_the_planner):
    asked_of_the_planner.best = Best(fits=False)
    with pytest.raises(ConfigError, match="this run needs 99 GiB"):
        choice.fit(request(TWO_SLICES, step=OPEN), (128, 24))


@pytest.mark.parametrize("why", ["no compiler", "a compiler that fails"])
def test_without_a_compiled_program_the_defaults_stay(why, asked_of_the_planner, monkeypatch, caplog):
    asked_of_the_planner.best = PlanError(why)
    if why == "no compiler":
        monkeypatch.setattr(choice.planner, "why_not_compiled", lambda where: why)
    settled, fit = choice.fit(request(TWO_SLICES, step=OPEN), (128, 24))
    assert (settled.step.remat, settled.step.mesh, fit.rows_per_device) == ("block", None, 2)
    assert f"remat and mesh are not chosen: {why}" in caplog.text

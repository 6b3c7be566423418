"""A run is checked against its slice's chips before any worker is asked for."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from asking import LORA, V5E_4, loader, request
from ray.train import ScalingConfig
from ray.util.tpu import get_tpu_worker_resources

from kithara_ray import MeshShape
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.preflight import memory_fit
from kithara_ray.orchestration.preflight.checks import check_devices
from kithara_ray.plan import planner, slice_of
from kithara_ray.plan.chips import CHIPS, slice_sizes

# Eight blocks of 8.6 billion parameters: their weights alone do not fit.
HUGE = dict(
    model_type="llama", hidden_size=16384, intermediate_size=163840, num_hidden_layers=8, num_attention_heads=128,
    num_key_value_heads=8, vocab_size=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
STEP = {"mesh": MeshShape(data=2, tensor=2), "remat": "dots", "micro_batches": 5}


def test_what_cannot_fit_is_refused_with_what_to_try(tmp_path, monkeypatch):
    monkeypatch.setattr(planner.urls, "cache_dir", lambda: tmp_path)
    where, slices = memory_fit.slice_of_run(ScalingConfig(**V5E_4), "tpu")
    assert (where, slices) == (slice_of("v5e-4"), 1)
    # Two of its blocks, gathered, take more than a chip of v5e or v6e has.
    with pytest.raises(ConfigError, match=r"this run needs .* of 15\.8 GiB per chip of v5e-4 \(est.*\): try .*v5p-8"):
        memory_fit.check(HUGE, where, 512, 1, {})


@pytest.mark.parametrize("generation", CHIPS)
def test_hosts_are_the_workers_that_ray_makes_of_a_slice(generation):
    for size in slice_sizes(generation):
        where = slice_of(f"{generation}-{size}")
        topology = where.topology.partition(":")[2]
        workers, each = get_tpu_worker_resources(topology, f"TPU-{where.chip.ray}")
        assert (workers, each["TPU"]) == (where.hosts, where.chips_per_host), where.name


def test_auto_needs_a_run_that_is_planned():
    """It is refused by the checks, before rows are tokenised; a number of rows is taken as it is."""
    asked, message = request(train=loader("auto")), "is found for a known TPU slice .* give a number here"
    for refuse in (check_devices, lambda asked: memory_fit.fit(asked, (64, 64))):
        with pytest.raises(ConfigError, match=f'per_device_batch_size="auto" {message}'):
            refuse(asked)
    assert memory_fit.fit(request(train=loader(3)), (64, 64)) == memory_fit.Fit(3, None)


@pytest.mark.parametrize("model", [{"lora": None}, {"quantize": "nf4"}], ids=str)
def test_runs_without_lora_or_on_integers_are_planned(model):
    asked = request(V5E_4, model=model)
    assert memory_fit.planned_on(asked)[0].name == "v5e-4"
    settings = memory_fit.settings_of(asked, (64, 64))
    assert (settings["train_weights"], settings["quantize"]) == ("lora" in model, model.get("quantize"))


@dataclass
class Found:
    """A plan, as far as it is looked at."""

    settings: dict
    fits: bool = True

    def verdict(self) -> str:
        return "needs 99 GiB"


def test_the_planner_is_asked_for_what_the_request_says(monkeypatch):
    """`auto` takes the rows that it finds; a given number is checked and kept."""
    asked, calls = request(V5E_4 | {"topology": "4x4", "num_workers": 8}, step=STEP, train=loader("auto")), []

    def plans(base, where, seq_len, *rows, **settings):
        calls.append((base, where.name, seq_len, rows, settings))
        return Found({"per_device_batch_size": 16})

    monkeypatch.setattr(memory_fit, "largest_batch", plans)
    monkeypatch.setattr(memory_fit, "check", lambda base, where, t, rows, how: plans(base, where, t, rows, **how))
    assert memory_fit.fit(asked, (np.int64(128), np.int64(24))).rows_per_device == 16
    given = memory_fit.fit(dataclasses.replace(asked, train=loader(3)), (128, 24))
    assert (given.rows_per_device, given.plan["settings"]) == (3, {"per_device_batch_size": 16})
    (base, where, seq_len, rows, settings), second = calls
    assert second == (base, where, seq_len, (3,), settings)
    assert (base, where, seq_len, rows) == ("/base", "v5e-16", 128, ())
    assert (type(seq_len), type(settings["predictions"])) == (int, int)
    assert settings == {
        "lora": LORA,
        "train_weights": False,
        "quantize": None,
        "optimizer": ("keras", {}),
        "mesh": MeshShape(data=1, tensor=2),  # of one slice of two
        "remat": "dots",
        "precision": "float32",
        "gradient_accumulation_steps": 5,
        "predictions": 24,
        "router_aux_loss_coef": 0.0,
    }


def test_a_run_without_a_batch_that_fits(monkeypatch):
    monkeypatch.setattr(memory_fit, "largest_batch", lambda *given, **settings: Found({}, fits=False))
    with pytest.raises(ConfigError, match="this run needs 99 GiB"):
        memory_fit.fit(request(V5E_4, train=loader("auto")), (128, 24))

"""A run is checked against its slice's chips before any worker is asked for."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.util.tpu import get_tpu_worker_resources

from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.preflight import memory_fit
from kithara_ray.plan import planner, slice_of
from kithara_ray.plan.chips import slice_sizes

# Eight blocks of 8.6 billion parameters: their weights alone do not fit.
HUGE = dict(
    model_type="llama", hidden_size=16384, intermediate_size=163840, num_hidden_layers=8, num_attention_heads=128,
    num_key_value_heads=8, vocab_size=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
SCALING = ScalingConfig(use_tpu=True, topology="2x2", accelerator_type="TPU-V5LITEPOD", num_workers=1)


def test_what_cannot_fit_is_refused_with_what_to_try(tmp_path, monkeypatch):
    monkeypatch.setattr(planner.urls, "cache_dir", lambda: tmp_path)
    where, slices = memory_fit.slice_of_run(SCALING, "tpu")
    assert (where, slices) == (slice_of("v5e-4"), 1)
    # Two of its blocks, gathered, take more than a chip of v5e or v6e has.
    with pytest.raises(ConfigError, match=r"this run needs .* of 15\.8 GiB per chip of v5e-4 \(est.*\): try .*v5p-8"):
        memory_fit.check(HUGE, where, 512, 1, {})


@pytest.mark.parametrize("generation", ["v5e", "v6e", "v5p"])
def test_hosts_are_the_workers_that_ray_makes_of_a_slice(generation):
    for size in slice_sizes(generation):
        where = slice_of(f"{generation}-{size}")
        topology = where.topology.partition(":")[2]
        workers, each = get_tpu_worker_resources(topology, f"TPU-{where.chip.accelerator.upper()}")
        assert (workers, each["TPU"]) == (where.hosts, where.chips_per_host), where.name


def test_auto_needs_a_known_slice():
    spec = SimpleNamespace(platform="cpu", model=SimpleNamespace(lora=object(), quantize=None))
    assert memory_fit.slice_of_run(SCALING, "cpu") is None
    assert memory_fit.fitted(spec, SCALING, auto=False) is spec
    with pytest.raises(ConfigError, match='per_device_batch_size="auto" is found for a known TPU slice'):
        memory_fit.fitted(spec, SCALING, auto=True)

"""Learning rates step by step against transformers' schedulers, and through the trip to a worker."""

import keras
import numpy as np
import pytest
import torch
import transformers

from kithara_ray.errors import ConfigError
from kithara_ray.train.schedule import WarmupSchedule

STEPS, WARMUP = 20, 4


def theirs(shape: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    steps = {} if shape == "constant" else {"num_training_steps": STEPS}
    name = "constant_schedule" if shape == "constant" else f"{shape}_schedule"
    scheduler = getattr(transformers, f"get_{name}_with_warmup")(optimizer, num_warmup_steps=WARMUP, **steps)
    rates = []
    for _ in range(STEPS + 3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_rates_are_those_of_transformers(shape):
    schedule = WarmupSchedule(3e-4, shape, STEPS, WARMUP)
    optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(keras.optimizers.AdamW(schedule)))
    ours = [float(optimizer._learning_rate(step)) for step in range(STEPS)]
    np.testing.assert_allclose(ours, theirs(shape)[:STEPS], rtol=1e-5, atol=1e-10)
    assert len(set(ours)) > WARMUP


def test_the_end_is_kept():
    schedule = WarmupSchedule(1.0, "linear", STEPS, 0, final=0.25)
    assert [round(float(schedule(step)), 4) for step in (0, 10, 20, 99)] == [1.0, 0.625, 0.25, 0.25]


def test_what_is_wrong_is_named():
    with pytest.raises(ConfigError, match="a cosine schedule needs total_steps > warmup_steps=4, got None"):
        WarmupSchedule(1e-3, "cosine", None, 4)
    with pytest.raises(ConfigError, match="schedule must be one of constant, linear, cosine, got 'step'"):
        WarmupSchedule(1e-3, "step", 10)

"""From a request and tokens to the workers' spec: rows a device are decided before it is made. No Ray."""

import dataclasses

import numpy as np
import pytest
from asking import evaluation, loader, request

from kithara_ray import Checkpointer
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.driver.run_spec import Tokenized, limits_of, run_spec
from kithara_ray.orchestration.preflight.memory_fit import Fit
from kithara_ray.orchestration.worker.spec import Start


def store(longest: int) -> TokenStore:
    lengths = np.array([3, longest], np.int32)
    return TokenStore((), lengths, lengths - 2, np.array([0, 2]), pad_id=0)


DATA = Tokenized(store(20), store(40))
START = Start(100.0, 107.0)


def spec_of(asked, rows: int, plan=None):
    return run_spec(asked, DATA, Fit(rows, plan), None, {"a": 1}, None, START)


@pytest.mark.parametrize(
    ("train", "held_out", "found", "rows", "eval_rows"),
    [
        (2, None, 2, 6, None),
        (2, 5, 2, 6, 5),
        ("auto", 5, 16, 48, 5),  # a number that is given is kept
        ("auto", "auto", 16, 48, 16),
        (2, "auto", 2, 6, 2),
    ],
)
def test_rows_a_device(train, held_out, found, rows, eval_rows):
    """Of a training step, those of its three micro-batches together."""
    asked = request(
        train=loader(train), evaluation=evaluation(held_out) if held_out else None, step={"micro_batches": 3}
    )
    spec = spec_of(asked, found, {"slice": "v5e-4"})
    assert spec.train.rows_per_device == rows
    assert (spec.eval.data.rows_per_device if held_out else spec.eval) == eval_rows
    assert spec.plan == {"slice": "v5e-4"}


def test_a_request_is_carried_into_the_spec():
    held_out = dataclasses.replace(evaluation(), every_steps=4, every_epochs=None, max_samples=9)
    asked = request(
        {"num_workers": 2},
        train=loader(2, packing=True, seed=3, length_buckets=2, shuffle=False, shuffle_rows=8),
        evaluation=held_out,
        reporting={"log_steps_interval": 6, "tensorboard_dir": "/boards"},
    )
    spec = spec_of(asked, 2)
    train = spec.train
    assert (train.store, train.packed_len, train.buckets, train.seed) == (DATA.train, 64, 2, 3)
    assert (train.shuffle, train.shuffle_rows) == (False, 8)
    assert (spec.eval.data.store, spec.eval.data.packed_len) == (DATA.eval, None)
    assert (spec.eval.every_steps, spec.eval.every_epochs, spec.eval.max_samples) == (4, None, 9)
    assert (spec.steps, spec.epochs, spec.step) == (4, None, asked.step)
    assert (spec.platform, spec.num_workers, spec.num_devices, spec.directory) == ("cpu", 2, 2, "/runs/run")
    assert [type(callback).__name__ for callback in spec.callbacks] == ["RayMetrics", "TensorBoard"]
    assert (spec.log_steps_interval, spec.settings, spec.start) == (6, {"a": 1}, START)


def test_a_save_may_take_the_checkpointers_time():
    assert limits_of(request()).save_timeout_s == 0
    saved = limits_of(request(checkpointer=Checkpointer("/saved", save_timeout_s=7)))
    assert (saved.save_timeout_s, saved.step_timeout_s, saved.startup_timeout_s) == (7, 600, 3600)


@pytest.mark.parametrize(("packing", "shape"), [(False, (24, 24)), (True, (64, 64))])
def test_the_largest_shape_is_that_of_the_training_data(packing, shape):
    """On CPUs lengths are multiples of eight; packed, all but the few that are not trained are predicted."""
    asked = request(train=loader(2, packing=packing), evaluation=evaluation())
    assert DATA.largest_shape(asked) == shape

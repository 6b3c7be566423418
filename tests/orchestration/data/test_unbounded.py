"""A source without a known length: the same batches for all hosts and after a restart, whoever asks."""

import sys

import datasets
import jax
import numpy as np
import pytest
import ray
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer, mix
from kithara_ray.errors import ConfigError, DataError, UnsupportedError
from kithara_ray.orchestration.data.pipeline import tokenize
from kithara_ray.orchestration.data.unbounded import EndlessOrder
from kithara_ray.orchestration.data.unbounded_batches import EndlessStream

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS = tiny.rows(40)


def endless(rows=ROWS, directory=None, **how):
    source = datasets.IterableDataset.from_generator(generate, gen_kwargs={"rows": rows})
    return SFTDataset(source, tokenizer_handle=directory, max_seq_len=64, **how)


def generate(rows):
    yield from rows


@pytest.fixture(scope="module")
def directory(tiny_models):
    return str(tiny_models["llama"])


def texts(batch):
    """The rows of a batch as (ids, trained ids)."""
    found = []
    for b in range(len(batch["token_ids"])):
        for segment in range(1, batch["segment_ids"][b].max() + 1):
            found.append(tuple(batch["token_ids"][b][batch["segment_ids"][b] == segment].tolist()))
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_batches_are_a_function_of_source_seed_and_step(cluster, directory, packed):
    store = tokenize(endless(directory=directory))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), "x"), PartitionSpec("x"))
    order = EndlessOrder(batch_rows=4, seed=1, shuffle=True, shuffle_rows=20)

    def stream(order=order):
        return EndlessStream(store, order, store.shapes("cpu", 64 if packed else None, 4), sharding, packed, 2)

    first = stream()
    walked = [jax.device_get(first.batch(step)[0]) for step in range(14)]
    again, other = stream(), stream(EndlessOrder(4, 2, True, 20))
    for step in (13, 3):  # the second is behind what the reader has kept
        assert all((jax.device_get(again.batch(step)[0])[k] == walked[step][k]).all() for k in walked[step])
    assert texts(jax.device_get(other.batch(0)[0])) != texts(walked[0])

    expected = [tuple(row.token_ids.tolist()) for row in endless(directory=directory).row_tokenizer()(ROWS, 0).rows()]
    seen = [row for batch in walked for row in texts(batch)]
    if not packed:
        assert sorted(seen[:40]) == sorted(expected)  # one pass of two windows, then the next
        assert {batch["token_ids"].shape[1] for batch in walked} <= {8, 16, 32, 64}
        assert sorted(seen[:20]) == sorted(expected[:20])
        assert seen[:20] != expected[:20]
    else:
        assert set(seen) == set(expected)
        filled = np.mean([(batch["segment_ids"] > 0).mean() for batch in walked])
        assert filled > 0.9


def test_bad_rows_and_nothing_at_all(cluster, directory):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), PartitionSpec())
    order = EndlessOrder(batch_rows=2, seed=0, shuffle=False, shuffle_rows=8)
    bad = [*ROWS[:5], {"prompt": "a", "answer": None}]

    def first(dataset):
        store = tokenize(dataset)
        return texts(jax.device_get(EndlessStream(store, order, ((64, 64),), sharding, True, 1).batch(0)[0]))

    with pytest.raises(DataError, match="row 5 of the stream: column 'answer' is null"):
        first(endless(bad, directory))
    assert set(first(endless(bad, directory, on_bad_row="skip"))) == set(first(endless(ROWS[:5], directory)))
    with pytest.raises(DataError, match="has nothing to train on: 1 were skipped as bad"):
        first(endless(bad[5:], directory, on_bad_row="skip"))


def test_a_run_over_a_stream(cluster, directory, tmp_path):
    import keras
    from ray.train import RunConfig, ScalingConfig

    model = KerasHubModel.from_preset(directory, lora_rank=4, precision="float32")
    held_out = Dataloader(endless(directory=directory), per_device_batch_size=2)
    how = dict(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2),
        train_dataloader=Dataloader(endless(directory=directory).to_packed_dataset(), per_device_batch_size=1),
        eval_dataloader=held_out,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path)),
        progress=False,
    )
    with pytest.raises(ConfigError, match="so an epoch has no end; give steps="):
        Trainer(**how, max_eval_samples=5)
    with pytest.raises(ConfigError, match="give max_eval_samples="):
        Trainer(**how, steps=4)
    result = Trainer(**how, steps=6, max_eval_samples=5).train()
    assert len(result.history) == 6
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    counted = endless(directory=directory).row_tokenizer()(ROWS[:5], 0).loss_mask.sum()
    assert result.eval_history[-1]["eval_tokens"] == counted
    model.release()


def test_a_preview_reads_the_first_rows_and_a_mixture_refuses(cluster, directory):
    assert endless(directory=directory).preview(1).lengths.shape == (40,)
    with pytest.raises(UnsupportedError, match="dataset 0 streams; mix streams with datasets"):
        mix([(endless(directory=directory), 1)])

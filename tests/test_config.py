"""YAML is the Python API: every argument there and back, and every shipped file."""

import inspect
import re
from pathlib import Path

import pytest
import ray.train
import yaml

import kithara_ray
from kithara_ray import Checkpointer, Dataloader, KerasHubModel, MeshShape, Profiler, Trainer, config
from kithara_ray.cli.app import main
from kithara_ray.errors import ConfigError, KitharaRayError
from kithara_ray.orchestration.data.datasets import MixedDataset, mix
from kithara_ray.orchestration.search.search import search

ROOT = Path(__file__).parents[1]
SHIPPED = [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "kithara_ray" / "template.yaml"]
API = {
    "model": (KerasHubModel.from_preset, config.ModelSection),
    "dataloader": (Dataloader, config.DataloaderSection),
    "trainer": (Trainer, config.TrainerSection),
    "checkpointer": (Checkpointer, config.CheckpointerSection),
    "mesh": (MeshShape, config.MeshSection),
    "profiler": (Profiler, config.ProfilerSection),
    "scaling": (ray.train.ScalingConfig, config.ScalingSection),
    "run": (ray.train.RunConfig, config.RunSection),
    "failures": (ray.train.FailureConfig, config.FailureSection),
    "checkpoints": (ray.train.CheckpointConfig, config.CheckpointSection),
    "export": (KerasHubModel.save_in_hf_format, config.ExportSection),
    "tune": (search, config.TuneSection),
    "mix": (mix, config.MixSection),
    **{name: (kind, config.DATASET_SECTIONS[name]) for name, kind in config.DATASETS.items()},
    **{name: (kind, config.CALLBACK_SECTIONS[name]) for name, kind in config.CALLBACKS.items()},
}
TYPED = {*config.DATASETS, *config.CALLBACKS, "mix"}
# What only Python can say. A new argument belongs here, or has a type that YAML can say.
PYTHON_ALONE = {
    "trainer": {"model", "optimizer", "train_dataloader", "eval_dataloader", "scaling_config", "run_config"},
    "scaling": {"use_gpu", "elastic_resize_monitor_interval_s"},
    "run": {"storage_filesystem", "callbacks", "logging_config"}
    | {"sync_config", "verbose", "stop", "progress_reporter", "log_to_file"},
    "failures": {"fail_fast"},
    "tune": {"trainer_factory"},
    "checkpoints": {"checkpoint_frequency", "checkpoint_at_end"},
    **{name: {"tokenizer", "custom_formatting_fn"} for name in config.DATASETS},
}


@pytest.mark.parametrize("part", API)
def test_every_argument_is_a_key_and_every_key_an_argument(part):
    function, section = API[part]
    arguments = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    keys = set(section.model_fields) - ({"type"} if part in TYPED else set())
    assert keys == arguments - PYTHON_ALONE.get(part, set())
    assert set(section.__left_out__) == PYTHON_ALONE.get(part, set())


def test_every_dataset_of_the_api_is_a_type():
    assert set(config.DATASETS) == {name for name in kithara_ray.__all__ if name.endswith("Dataset")}


def test_the_optimizer_is_keras():
    import keras

    for name in config.OptimizerSection.model_fields["name"].annotation.__args__:
        optimizer = config.OptimizerSection(name=name, learning_rate=1e-3, global_clipnorm=2.0).build(None)
        assert type(optimizer) is getattr(keras.optimizers, name)
        assert optimizer.global_clipnorm == 2.0
    settings = set(config.OptimizerSection.model_fields) - {"name", "schedule"}
    assert settings <= {
        n for o in (keras.optimizers.AdamW, keras.optimizers.SGD) for n in inspect.signature(o).parameters
    }
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: AdamW has no such setting"):
        config.OptimizerSection(learning_rate=1e-3, momentum=0.9).build(None)


def test_the_schedule_is_as_long_as_the_run():
    section = config.OptimizerSection(learning_rate=1e-3, schedule={"name": "linear", "warmup_ratio": 0.1})
    rate = section.build(50)._learning_rate
    assert (rate.total_steps, rate.warmup_steps, rate.peak) == (50, 5, 1e-3)
    with pytest.raises(ConfigError, match=r"linear needs the number of steps.*trainer\.steps"):
        section.build(None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_valid(path, tmp_path):
    config.load(path)
    # The options too: a line that begins with #key.
    text = re.sub(r"(?m)^(\s*)#([\w-])", r"\1\2", path.read_text())
    (tmp_path / path.name).write_text(text)
    with_options = config.load(tmp_path / path.name)
    if "template" in path.name:
        assert with_options.eval_dataloader.dataset.source == "eval.jsonl"
        assert len(with_options.exports) == 3


def test_init_writes_a_valid_file_once(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert main(["init", str(path)]) == 0
    assert config.load(path).optimizer.learning_rate == 2e-4
    assert main(["init", str(path)]) == 1
    assert "exists; remove it or give another name" in capsys.readouterr().err


@pytest.fixture
def written(tmp_path, tiny_models):
    """Writes a valid small configuration with some keys changed; returns its path."""

    def write(**sections) -> str:
        content = {
            "model": {"preset_handle": str(tiny_models["llama"]), "lora_rank": 4},
            "train_dataloader": {"dataset": {"type": "SFTDataset", "source": "x.jsonl"}, "per_device_batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
        }
        for name, section in sections.items():
            content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def test_handles_have_what_was_written(written, tiny_models):
    path = written(
        model={"lora_alpha": 8, "target_modules": ["q_proj"], "precision": "float32"},
        trainer={
            "steps": 7,
            "mesh": {"data": 2},
            "seed": 3,
            "checkpointer": {"checkpoint_dir": "/c", "max_to_keep": 2},
            "profiler": {"directory": "/p", "steps": [2, 4]},
            "callbacks": [{"type": "WandB", "project": "mine"}, {"type": "MLflow", "tags": {"a": "b"}}],
        },
        scaling_config={"num_workers": 2, "resources_per_worker": {"CPU": 1}},
        run_config={"name": "mine", "failure_config": {"max_failures": 2}},
        exports=[{"output_dir": "/x/y", "only_save_adapters": True}],
    )
    job = config.build(
        config.load(path, ["optimizer.learning_rate=1e-4", "exports.0.output_dir=/z", "trainer.steps=9"])
    )
    assert (job.model.lora.r, job.model.lora.alpha, job.model.precision) == (4, 8, "float32")
    asked = job.trainer.request
    assert (asked.steps, asked.epochs, asked.step.seed) == (9, None, 3)
    assert asked.step.mesh == MeshShape(data=2)
    assert (asked.checkpointer.checkpoint_dir, asked.checkpointer.max_to_keep) == ("/c", 2)
    assert asked.reporting.profiler == Profiler("/p", (2, 4))
    wandb, mlflow = asked.reporting.callbacks
    assert (wandb.project, wandb.mode, mlflow.tags, mlflow.experiment) == ("mine", None, {"a": "b"}, "kithara_ray")
    assert asked.group.scaling_config.num_workers == 2
    assert (asked.group.run_config.name, asked.group.run_config.failure_config.max_failures) == ("mine", 2)
    assert asked.train.dataset.tokenizer == str(tiny_models["llama"])
    assert asked.config["trainer"]["steps"] == 9
    assert job.exports == [{"output_dir": "/z", "only_save_adapters": True}]
    kind, optimizer = asked.step.optimizer
    assert (kind, optimizer["config"]["learning_rate"]) == ("keras", pytest.approx(1e-4))
    assert optimizer["config"]["weight_decay"] == 0.0


ONE = {"type": "SFTDataset", "source": "x"}
BAD = {
    "a misspelt key": (
        dict(model={"lora_rnk": 3}),
        r"run.yaml:\d+: model.lora_rnk: no such key; did you mean 'lora_rank'",
    ),
    "a misspelt section": (dict(modle={}), "modle: no such key; did you mean 'model'"),
    "a key like no other": (dict(optimizer={"zzz": 1}), "optimizer.zzz: no such key; there are name, learning_rate"),
    "text for a number": (dict(model={"lora_rank": "16"}), "lora_rank: should be a valid integer, got '16'"),
    "true for a number": (dict(model={"lora_rank": True}), "lora_rank: should be a valid integer, got True"),
    "a number for a text": (dict(model={"preset_handle": 3}), "preset_handle: should be a valid string, got 3"),
    "a section that is a text": (dict(trainer="fast"), "trainer: should be a section of keys, got 'fast'"),
    "no learning rate": (dict(optimizer={"learning_rate": None}), "learning_rate: should be a valid number, got None"),
    "a learning rate of 0": (dict(optimizer={"learning_rate": 0}), "learning_rate: should be greater than 0, got 0"),
    "nan": (dict(optimizer={"learning_rate": float("nan")}), "learning_rate: should be a finite number, got nan"),
    "an optimizer unheard of": (dict(optimizer={"name": "adamw"}), "optimizer.name: should be 'AdamW'.* got 'adamw'"),
    "a schedule unheard of": (dict(optimizer={"schedule": {"name": "step"}}), "schedule.name: should be 'constant'"),
    "a dataset unheard of": (
        dict(train_dataloader={"dataset": {"type": "RLDataset"}}),
        "train_dataloader.dataset: type must be one of 'SFTDataset'.*got 'RLDataset'",
    ),
    "a dataset of no type": (dict(train_dataloader={"dataset": {"source": "x"}}), "dataset: 'type' is missing"),
    "a mixture of weight 0": (
        dict(
            train_dataloader={
                "dataset": {
                    "type": "mix",
                    "datasets": [{"weight": 0, "dataset": {"type": "SFTDataset", "source": "x"}}],
                }
            }
        ),
        "mix: the weight of dataset 0 must be > 0, got 0",
    ),
    "a misspelt key in a mixture": (
        dict(train_dataloader={"dataset": {"type": "mix", "datasets": [{"dataset": ONE | {"forma": 1}}]}}),
        "train_dataloader.dataset.datasets.0.dataset.forma: no such key; did you mean 'format'",
    ),
    "an unknown format": (
        dict(train_dataloader={"dataset": {"type": "SFTDataset", "source": "x", "format": "chatml"}}),
        "format must be one of 'auto', 'prompt_answer', .* got 'chatml'",
    ),
    "a share of more than all": (
        dict(train_dataloader={"eval_fraction": 1.5}),
        "eval_fraction must be > 0 and < 1, got",
    ),
    "two things to evaluate on": (
        dict(
            train_dataloader={"eval_fraction": 0.5},
            eval_dataloader={"dataset": ONE, "per_device_batch_size": 1},
        ),
        "Trainer takes one of eval_dataloader and train_dataloader's eval_fraction",
    ),
    "a misspelt key in a dataset": (
        dict(train_dataloader={"dataset": {"type": "SFTDataset", "source": "x", "max_len": 3}}),
        "train_dataloader.dataset.max_len: no such key; did you mean 'max_seq_len'",
    ),
    "a Python object": (
        dict(train_dataloader={"dataset": {"type": "SFTDataset", "source": "x", "custom_formatting_fn": "f"}}),
        "custom_formatting_fn: cannot be given in YAML here: it takes a Python function",
    ),
    "a tracker unheard of": (
        dict(trainer={"callbacks": [{"type": "Comet"}]}),
        "trainer.callbacks.0: type must be one of 'MLflow', 'WandB', got 'Comet'",
    ),
    "a misspelt key of a tracker": (
        dict(trainer={"callbacks": [{"type": "WandB", "projct": "x"}]}),
        "callbacks.0.projct: no such key; did you mean 'project'",
    ),
    "traced steps": (
        dict(trainer={"profiler": {"directory": "/p", "steps": [3, 2]}}),
        r"steps must be 1 <= first <= last, got \(3, 2\)",
    ),
    "a GPU": (dict(scaling_config={"use_gpu": True}), "use_gpu: cannot be given in YAML here: training runs on TPUs"),
    "an export to nowhere": (dict(exports=[{"dtype": "auto"}]), r"run.yaml:\d+: exports.0.output_dir: is missing"),
    "exports that are no list": (dict(exports={"output_dir": "x"}), "exports: should be a valid list"),
    "no model": (dict(model=None), "model: should be a section of keys, got None"),
    "ray's own refusal": (
        dict(scaling_config={"use_tpu": True, "num_workers": 4}),
        "ScalingConfig: .*topology",
    ),
    "two ways to say how long": (dict(trainer={"steps": 1, "epochs": 1}), "one of steps and epochs"),
    "warm-up twice": (
        dict(trainer={"steps": 9}, optimizer={"schedule": {"name": "linear", "warmup_ratio": 0.1, "warmup_steps": 1}}),
        "one of warmup_steps and warmup_ratio",
    ),
    "a warm-up longer than the run": (
        dict(trainer={"steps": 3}, optimizer={"schedule": {"name": "cosine", "warmup_steps": 3}}),
        "a cosine schedule needs total_steps > warmup_steps=3, got 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case, written, capsys):
    sections, message = BAD[case]
    path = written(**sections)
    with pytest.raises(KitharaRayError, match=message):
        config.build(config.load(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.steps", "expected key.key=value"),
        ("=3", "expected key.key=value"),
        ("trainer..steps=3", "expected key.key=value"),
        ("exports.3.dtype=auto", "exports is a list of 1; give 0, 1"),
        ("model.lora_rank.x=1", "model.lora_rank is a value and has no keys"),
        ("trainer.stps=3", "trainer.stps: no such key; did you mean 'steps'"),
        ("trainer.steps=[", "--set:1: not valid YAML"),
    ],
)
def test_overrides_that_are_wrong(written, override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(written(exports=[{"output_dir": "/x"}]), [override])


def test_a_mixture_is_written_as_its_datasets_and_weights(written, tiny_models):
    parts = [
        {"weight": 3, "dataset": {"type": "SFTDataset", "source": "a.jsonl", "format": "alpaca", "max_seq_len": 64}},
        {"dataset": {"type": "TextCompletionDataset", "source": "b.txt"}},
    ]
    path = written(train_dataloader={"dataset": {"type": "mix", "datasets": parts, "epoch": "first"}})
    mixed = config.build(config.load(path)).trainer.request.train.dataset
    assert isinstance(mixed, MixedDataset)
    assert (mixed.weights, mixed.epoch, mixed.max_seq_len) == ((3.0, 1.0), "first", 1024)
    assert [type(part).__name__ for part in mixed.datasets] == ["SFTDataset", "TextCompletionDataset"]
    assert mixed.datasets[0].format == "alpaca"
    assert {part.tokenizer for part in mixed.datasets} == {str(tiny_models["llama"])}


def test_a_part_is_held_out(written):
    job = config.build(config.load(written(train_dataloader={"eval_fraction": 0.1})))
    assert job.trainer.request.train.eval_fraction == 0.1
    assert job.trainer.request.evaluation.loader is job.trainer.request.train
    assert job.trainer.request.evaluation.every_epochs == 1
    assert [name for name, _ in job.trainer.request.loaders()] == ["train_dataloader"]


def test_secrets_from_the_environment_are_redacted(written, monkeypatch):
    from kithara_ray.redact import redact

    monkeypatch.setenv("BUCKET_TOKEN", "very-private-7")
    path = written(train_dataloader={"dataset": {"type": "SFTDataset", "source": "gs://b/${BUCKET_TOKEN}/a.jsonl"}})
    trainer = config.build(config.load(path)).trainer
    assert trainer.request.train.dataset.source == "gs://b/very-private-7/a.jsonl"
    assert "very-private-7" not in str(redact(trainer.request.config))

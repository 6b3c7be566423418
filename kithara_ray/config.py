"""Runs as YAML, with the same arguments as the Python API.

    model:             KerasHubModel.from_preset(...)
    train_dataloader:  Dataloader(...), with a dataset: SFTDataset(...) or another `type`, or a `mix` of several
    eval_dataloader:   the same
    optimizer:         a Keras optimizer by name, with a schedule
    trainer:           Trainer(...)
    scaling_config:    ray.train.ScalingConfig(...)
    run_config:        ray.train.RunConfig(...)
    exports:           a list of save_in_hf_format(...)
    tune:              tune.search(...), for `kithara-ray tune` only

Sections are built from these signatures, so every new Python argument also works in YAML.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import ray.train
from pydantic import Discriminator, Field, Tag, ValidationError

import kithara_ray
from kithara_ray.callbacks import MLflow, Profiler, WandB
from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.data.datasets import Dataloader, MixedDataset, RowDataset, mix
from kithara_ray.orchestration.model import KerasHubModel
from kithara_ray.orchestration.results import TrainResult
from kithara_ray.orchestration.search.search import search
from kithara_ray.orchestration.trainer import Trainer
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.signatures import Section, section_of, told
from kithara_ray.yaml_file import Where, escaped, override, put, read_yaml

__all__ = ["Config", "Job", "build", "checked", "dataloader", "load", "put", "require_absolute"]

_OWN_SECTION = "it has a section of its own"
_OLD = "Ray has retired it"

CheckpointerSection = section_of("CheckpointerSection", Checkpointer, {})
MeshSection = section_of("MeshSection", MeshShape, {})
ProfilerSection = section_of("ProfilerSection", Profiler, {})
# Custom callbacks require Python.
CALLBACKS = {kind.__name__: kind for kind in (MLflow, WandB)}
CALLBACK_SECTIONS = {
    name: section_of(f"{name}Section", kind, {}, type=(Literal[name], ...)) for name, kind in CALLBACKS.items()
}
_AnyCallback = Annotated[
    typing.Union[tuple(Annotated[section, Tag(name)] for name, section in CALLBACK_SECTIONS.items())],  # noqa: UP007
    Discriminator("type"),
]
ModelSection = section_of(
    "ModelSection",
    KerasHubModel.from_preset,
    {},
    # `Sequence` would accept a text as its letters.
    given_types={
        "target_modules": str | list[str],
        "target_parameters": list[str] | None,
        "init_lora_weights": bool | str,
        "exclude_modules": str | list[str] | None,
        "layers_to_transform": int | list[int] | None,
        "layers_pattern": str | list[str] | None,
        "modules_to_save": list[str] | None,
        "trainable_token_indices": list[int] | dict[str, list[int]] | None,
    },
)
DATASETS = {
    name: value
    for name in kithara_ray.__all__
    if isinstance(value := getattr(kithara_ray, name), type) and issubclass(value, RowDataset)
}
DATASET_SECTIONS = {
    name: section_of(
        f"{name}Section",
        dataset,
        {
            "tokenizer": "it takes a Python object; give tokenizer_handle",
            "custom_formatting_fn": "it takes a Python function; write a script, or prepare the rows beforehand",
        },
        given_types={"source": str | list[str] | list[dict[str, Any]]},
        type=(Literal[name], ...),
    )
    for name, dataset in DATASETS.items()
}
if TYPE_CHECKING:  # a section made from a signature has attributes that only the run knows
    _OneDataset: TypeAlias = Any
else:
    _OneDataset = Annotated[
        typing.Union[tuple(Annotated[section, Tag(name)] for name, section in DATASET_SECTIONS.items())],  # noqa: UP007
        Discriminator("type"),
    ]


class MixedSection(Section):
    """One dataset of a mixture, and its weight."""

    weight: float = 1.0
    dataset: _OneDataset


MixSection = section_of("MixSection", mix, {}, given_types={"datasets": list[MixedSection]}, type=(Literal["mix"], ...))
_AnyDataset = Annotated[
    typing.Union[  # noqa: UP007
        tuple(Annotated[section, Tag(name)] for name, section in (DATASET_SECTIONS | {"mix": MixSection}).items())
    ],
    Discriminator("type"),
]
DataloaderSection = section_of("DataloaderSection", Dataloader, {}, given_types={"dataset": _AnyDataset})
TrainerSection = section_of(
    "TrainerSection",
    Trainer,
    dict.fromkeys(
        ("model", "optimizer", "train_dataloader", "eval_dataloader", "scaling_config", "run_config"), _OWN_SECTION
    ),
    given_types={"checkpointer": CheckpointerSection | None, "callbacks": list[_AnyCallback]},
    nested={MeshShape: MeshSection, Profiler: ProfilerSection},
)
ScalingSection = section_of(
    "ScalingSection",
    ray.train.ScalingConfig,
    {
        "use_gpu": "training runs on TPUs, or on CPUs for experiments",
        "elastic_resize_monitor_interval_s": "the number of workers is fixed",
    },
    given_types={
        "num_workers": int,
        "resources_per_worker": dict[str, float] | None,
        "placement_strategy": str,
        "label_selector": dict[str, str] | list[dict[str, str]] | None,
    },
)
FailureSection = section_of("FailureSection", ray.train.FailureConfig, {"fail_fast": _OLD})
CheckpointSection = section_of(
    "CheckpointSection", ray.train.CheckpointConfig, dict.fromkeys(("checkpoint_frequency", "checkpoint_at_end"), _OLD)
)
RunSection = section_of(
    "RunSection",
    ray.train.RunConfig,
    dict.fromkeys(("sync_config", "verbose", "stop", "progress_reporter", "log_to_file"), _OLD),
    given_types={
        "failure_config": FailureSection | None,
        "checkpoint_config": CheckpointSection | None,
        "worker_runtime_env": dict[str, Any] | None,
    },
)
ExportSection = section_of("ExportSection", KerasHubModel.save_in_hf_format, {})
TuneSection = section_of(
    "TuneSection",
    search,
    {"trainer_factory": "it is what this file describes"},
    given_types={"space": dict[str, dict[str, list[Any]]]},
)

OptimizerName = Literal[
    "AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl", "Lion", "Lamb", "Adafactor"
]


class ScheduleSection(Section):
    """The schedule of the learning rate over the run; see `kithara_ray.train.schedule`."""

    name: Literal["constant", "linear", "cosine"]
    warmup_steps: int | None = Field(None, ge=0)
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    total_steps: int | None = Field(None, ge=1)
    final: float = Field(0.0, ge=0, le=1)


class OptimizerSection(Section):
    """A Keras optimizer, with the defaults of Keras, except for weight_decay, which defaults to 0."""

    name: OptimizerName = "AdamW"
    learning_rate: float = Field(gt=0)
    schedule: ScheduleSection | None = None
    weight_decay: float = Field(0.0, ge=0)
    global_clipnorm: float | None = Field(None, gt=0)
    clipnorm: float | None = Field(None, gt=0)
    clipvalue: float | None = Field(None, gt=0)
    momentum: float | None = Field(None, ge=0)
    beta_1: float | None = Field(None, ge=0, lt=1)
    beta_2: float | None = Field(None, ge=0, lt=1)
    epsilon: float | None = Field(None, gt=0)

    def build(self, steps: int | None) -> Any:
        """Build the Keras optimizer of a run of `steps` steps; None for a run counted in epochs."""
        import inspect

        import keras

        kind = getattr(keras.optimizers, self.name)
        known = inspect.signature(kind).parameters
        settings = {name: value for name, value in self if name not in ("name", "schedule") and value is not None}
        for name in settings:
            if name not in known:
                raise ConfigError(f"optimizer.{name}: {self.name} has no such setting")
        if self.schedule is not None:
            settings["learning_rate"] = self._schedule(self.schedule, steps)
        return kind(**settings)

    def _schedule(self, schedule: ScheduleSection, steps: int | None) -> Any:
        from kithara_ray.train.schedule import WarmupSchedule

        total = schedule.total_steps or steps
        if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
            raise ConfigError("optimizer.schedule takes one of warmup_steps and warmup_ratio")
        if total is None and (schedule.name != "constant" or schedule.warmup_ratio is not None):
            raise ConfigError(
                f"optimizer.schedule: {schedule.name} needs the number of steps, and the run is counted in epochs; "
                "give trainer.steps, or optimizer.schedule.total_steps"
            )
        warmup = schedule.warmup_steps or round((schedule.warmup_ratio or 0) * (total or 0))
        return WarmupSchedule(self.learning_rate, schedule.name, total, warmup, schedule.final)


if TYPE_CHECKING:
    _Model: TypeAlias = Any
    _Dataloader: TypeAlias = Any
    _Trainer: TypeAlias = Any
    _Scaling: TypeAlias = Any
    _Run: TypeAlias = Any
    _Export: TypeAlias = Any
    _Tune: TypeAlias = Any
else:
    _Model, _Dataloader, _Trainer = ModelSection, DataloaderSection, TrainerSection
    _Scaling, _Run, _Export, _Tune = ScalingSection, RunSection, ExportSection, TuneSection


class Config(Section):
    """A whole run."""

    model: _Model
    train_dataloader: _Dataloader
    eval_dataloader: _Dataloader | None = None
    optimizer: OptimizerSection
    trainer: _Trainer = Field(default_factory=TrainerSection)
    scaling_config: _Scaling | None = None
    run_config: _Run | None = None
    exports: list[_Export] = Field(default_factory=list)
    tune: _Tune | None = None


@dataclass
class Job:
    """Model, trainer and exports that a configuration describes.

    Attributes:
        exports: arguments of `model.save_in_hf_format`, one dict per export.
    """

    model: KerasHubModel
    trainer: Trainer
    exports: list[dict[str, Any]]

    def run(self) -> tuple[TrainResult, list[str]]:
        """Train, then write the exports; return the result and the exports' locations."""
        result = self.trainer.train(self.exports)
        return result, [self.model.save_in_hf_format(**export) for export in self.exports]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration and check it against the API. Reads only the file.

    Args:
        overrides: changes `a.b=value`, with the value in YAML.

    Raises:
        ConfigError: the configuration is wrong; names file, line and key.
    """
    raw, lines = read_yaml(path)
    for change in overrides:
        override(raw, change)
    return checked(raw, str(path), lines)


def checked(raw: dict[str, Any], name: str, lines: Mapping[Where, int] | None = None) -> Config:
    """Check raw content against the API.

    Args:
        name: name of the source, for messages.
        lines: lines of the keys.

    Raises:
        ConfigError: the content is wrong; names the key.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(told(error, Config, raw, name, lines))) from None


def build(config: Config) -> Job:
    """Build the Python objects. Raises the errors of their constructors."""
    model = KerasHubModel.from_preset(**config.model.given())
    loaders = {
        name: dataloader(getattr(config, name), config)
        for name in ("train_dataloader", "eval_dataloader")
        if getattr(config, name) is not None
    }
    settings = config.trainer.given()
    for name, kind in (("mesh", MeshShape), ("checkpointer", Checkpointer), ("profiler", Profiler)):
        if settings.get(name) is not None:
            settings[name] = kind(**settings[name].given())
    if "callbacks" in settings:
        settings["callbacks"] = [_callback(section) for section in settings["callbacks"]]
    trainer = Trainer(
        model=model,
        optimizer=config.optimizer.build(config.trainer.steps),
        scaling_config=_ray_config(ray.train.ScalingConfig, config.scaling_config),
        run_config=_ray_config(ray.train.RunConfig, config.run_config),
        **loaders,
        **settings,
    )
    trainer.adopt(dataclasses.replace(trainer.request, config=escaped(config.model_dump(exclude_unset=True))))
    return Job(model, trainer, [export.given() for export in config.exports])


def _callback(section: Section) -> Any:
    arguments = section.given()
    return CALLBACKS[arguments.pop("type")](**arguments)


def dataloader(section: Any, config: Config) -> Dataloader:
    """Build a Dataloader; its dataset uses the model's tokenizer if it names none."""
    settings = section.given()
    return Dataloader(_dataset(settings.pop("dataset"), config), **settings)


def _dataset(section: Section, config: Config) -> RowDataset | MixedDataset:
    arguments = section.given()
    if arguments["type"] != "mix":
        return _one_dataset(section, config)
    parts = [(_one_dataset(part.dataset, config), part.weight) for part in arguments.pop("datasets")]
    arguments.pop("type")
    return mix(parts, **arguments)


def _one_dataset(section: Section, config: Config) -> RowDataset:
    arguments = section.given()
    arguments.setdefault("tokenizer_handle", config.model.preset_handle)
    return DATASETS[arguments.pop("type")](**arguments)


def _ray_config(kind: type, section: Section | None) -> Any:
    if section is None:
        return None
    settings = section.given()
    for name, inner in (("failure_config", ray.train.FailureConfig), ("checkpoint_config", ray.train.CheckpointConfig)):
        if settings.get(name) is not None:
            settings[name] = inner(**settings[name].given())
    try:
        return kind(**settings)
    except (ValueError, TypeError) as error:  # raised by Ray
        raise ConfigError(f"{kind.__name__}: {' '.join(str(error).split())}") from error


def require_absolute(config: Config) -> None:
    """Refuse relative output paths in a configuration that will run in another directory.

    Raises:
        ConfigError: one of them is relative.
    """
    written = {f"exports.{number}.output_dir": export.output_dir for number, export in enumerate(config.exports)}
    if config.run_config is not None:
        written["run_config.storage_path"] = config.run_config.storage_path
    if config.trainer.checkpointer is not None:
        written["trainer.checkpointer.checkpoint_dir"] = config.trainer.checkpointer.checkpoint_dir
    if config.trainer.profiler is not None:
        written["trainer.profiler.directory"] = config.trainer.profiler.directory
    written["trainer.tensorboard_dir"] = config.trainer.tensorboard_dir
    for key, path in written.items():
        if path is not None and "://" not in path and not path.startswith("/"):
            raise ConfigError(
                f"{key}: {path!r} is relative, and a submitted job runs in a copy of the directory that is removed "
                "afterwards; give an absolute path of the head node, or a URL"
            )

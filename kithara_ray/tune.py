"""Search over the settings of runs: the public `tune.search`, for a trainer factory or a configuration.

`kithara_ray.orchestration.search.search.search` documents searches and all arguments; see also docs/tune.md.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from kithara_ray import config as configuration
from kithara_ray.config import Config
from kithara_ray.errors import ConfigError
from kithara_ray.hf.exports.request import requests_of
from kithara_ray.orchestration.search import search as searches
from kithara_ray.orchestration.search.search import SearchResult, TrialResult
from kithara_ray.orchestration.trainer import Trainer

__all__ = ["SearchResult", "TrialResult", "search"]

_OF_THE_SEARCH = {
    "scaling_config": "all trials have the same workers, so that the search knows how many run at once",
    "run_config": "it decides where the search is kept",
    "exports": "they are made from the best trial",
    "tune": "it is the search's own section",
    "trainer.checkpointer": "each trial has checkpoints of its own",
    "trainer.progress": "it changes nothing that is trained",
}


@functools.wraps(searches.search)
def search(
    trainer_factory: Callable[[dict[str, Any]], Trainer] | str | Path | Config,
    space: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SearchResult:
    # With a configuration, the space's names are its keys, and its section `tune` has the arguments not given here.
    if callable(trainer_factory):
        return searches.search(trainer_factory, space or {}, **settings)
    config = trainer_factory
    if not isinstance(config, Config):
        config = configuration.load(config)
    given: dict[str, Any] = {**(config.tune.given() if config.tune else {}), **settings}
    if space is not None:
        given["space"] = space
    if not given.get("space"):
        raise ConfigError(
            'a search needs a space: give tune.space in the configuration, as "optimizer.learning_rate": '
            "{loguniform: [1e-5, 1e-3]}, or space="
        )
    return searches.search(ConfigFactory(config, given["space"]), **given)


def run(config: Config) -> tuple[SearchResult, list[str]]:
    """Run a configuration's search, then export the best trial; return the result and the exports' locations."""
    exports = [export.given() for export in config.exports]
    model = configuration.build(config).model
    for export in requests_of(exports, model.lora):
        if not export.resume:
            model.check_destination(export.output_dir)
    result = search(config)
    return result, [result.model.save_in_hf_format(**export) for export in exports]


class ConfigFactory:
    """Make the Trainer for a point of a space whose names are a configuration's keys, "optimizer.learning_rate".

    Attributes:
        config: the configuration without search and exports, by which two searches are compared.
    """

    def __init__(self, config: Config, space: Mapping[str, Any]):
        for name in space:
            for key, reason in _OF_THE_SEARCH.items():
                if name == key or name.startswith(f"{key}."):
                    raise ConfigError(f"space {name!r}: {key} cannot be searched: {reason}")
        self.config = config.model_dump(exclude_unset=True, exclude={"tune", "exports"})

    def __call__(self, point: Mapping[str, Any]) -> Trainer:
        raw = copy.deepcopy(self.config)
        for name, value in point.items():
            configuration.put(raw, name.split("."), value, f"space {name!r}")
        return configuration.build(configuration.checked(raw, "space")).trainer


def table(result: SearchResult) -> Table:
    """Return a table of the trials, best first."""
    shown = Table("trial", "", result.metric, "step", "point", highlight=False)
    finished = [trial for trial in result.trials if trial.state == "finished"]
    finished.sort(key=lambda trial: trial.metrics[result.metric], reverse=result.mode == "max")
    for trial in [*finished, *(trial for trial in result.trials if trial.state != "finished")]:
        value = trial.metrics.get(result.metric)
        texts = [trial.id, trial.state, "" if value is None else f"{value:.4f}", str(trial.metrics.get("step", ""))]
        point = ", ".join(f"{name}={_short(value)}" for name, value in trial.point.items())
        shown.add_row(*texts, escape(f"{point}: {trial.error}" if trial.error else point))
    return shown


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

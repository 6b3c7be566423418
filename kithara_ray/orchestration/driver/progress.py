"""The display of a run's progress: a bar on a terminal, lines elsewhere."""

import datetime
import logging
import threading
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from kithara_ray.orchestration.driver.phases import Phases
from kithara_ray.orchestration.preflight.memory_fit import Fit
from kithara_ray.orchestration.request.facts import mesh_axes
from kithara_ray.orchestration.request.run_request import RunRequest

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_PHASES = {
    "check": "checking cluster, data and destinations",
    "tokenize": "tokenising the dataset",
    "plan": "planning for the slice",
    "sample": "generating the report's samples before training",
    "schedule": "waiting for the workers",
    "fetch": "reading the base checkpoint",
    "build": "building the model",
    "look": "looking for a checkpoint",
    "load": "loading the sharded weights",
    "compare": "comparing the hosts' copies",
    "compile": "compiling the step",
}


def figures_of(event: dict[str, Any]) -> str:
    """Format a logged step's figures as `name=value`; MFU and device memory only if the backend reports them."""
    share = event["input_wait_s"] / max(event["step_time_s"], 1e-9)
    figures = [f"loss={event['loss']:.4f}", f"lr={event['learning_rate']:.3g}"]
    figures += [f"tokens_per_s={event['tokens_per_s']:.0f}", f"input_wait={share:.1%}"]
    if "mfu" in event:
        figures.append(f"mfu={event['mfu']:.1%}")
    if "hbm_bytes" in event:
        limit = f"/{event['hbm_limit_bytes'] / 2**30:.1f}" if event.get("hbm_limit_bytes") else ""
        figures.append(f"hbm={event['hbm_bytes'] / 2**30:.1f}{limit}GiB")
    return " ".join(figures)


class Progress:
    """Shows the driver's phases and, once `follow` names a coordinator, its events. Use it in a `with` block.

    Attributes:
        phases: the times of the driver's phases.
    """

    def __init__(self, enabled: bool = True):
        self.phases = Phases()
        self._coordinator: ActorHandle | None = None
        self._console = Console(stderr=True, quiet=not enabled, highlight=False)
        self._seen = 0
        self._total_steps: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("starting", total=None, figures="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def follow(self, coordinator: ActorHandle) -> None:
        """Show the events of a run, in a thread."""
        self._coordinator = coordinator
        self._thread.start()

    def __exit__(self, *exc) -> None:
        self._stop.set()
        if self._coordinator is not None:
            self._thread.join()
            if exc[0] is None:
                self._drain()
        self._bar.stop()

    def phase(self, name: str) -> None:
        """Begin a phase of the driver, and show it."""
        self.phases.enter(name)
        self._show({"kind": "phase", "name": name})

    def mesh(self, request: RunRequest) -> None:
        """Tell the mesh of a run, and why it has it if it was chosen by default."""
        axes = mesh_axes(request)
        if request.default_mesh is None or axes is None:
            return
        line = f"mesh {' '.join(f'{axis}={size}' for axis, size in axes.items())}: {request.default_mesh['why']}"
        logger.info("%s", line)
        self._note(line)

    def chosen(self, fit: Fit) -> None:
        """Tell the settings that the planner chose, if it chose any."""
        if fit.plan is not None and fit.plan.get("chosen"):
            line = f"chosen: {fit.plan['chosen']['why']}"
            logger.info("%s", line)
            self._note(line)

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._drain()

    def _drain(self) -> None:
        if self._coordinator is None:
            return
        try:
            events = ray.get(self._coordinator.events.remote(self._seen), timeout=10)
        except RayError:
            return
        self._seen += len(events)
        for event in events:
            self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "phase":
            self._say(_PHASES[event["name"]])
            self._bar.update(self._task, description=_PHASES[event["name"]])
        elif kind == "fetch":
            self._say(f"fetched {event['here'] / 1e9:.2f} of {event['total'] / 1e9:.2f} GB")
            self._bar.update(self._task, completed=event["here"], total=event["total"])
        elif kind == "started":
            share = event["trainable"] / event["parameters"]
            self._note(
                f"training {event['trainable']:,} of {event['parameters']:,} parameters ({share:.2%}) "
                f"for {event['total_steps']} steps"
            )
            phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in event["phases"].items() if seconds >= 0.5)
            self._note(f"ready after {sum(event['phases'].values()):.0f} s: {phases}")
            self._total_steps = event["total_steps"]
            self._bar.update(self._task, completed=0, total=event["total_steps"], description="training")
        elif kind == "first_step":
            self._note(f"the first step took {event['seconds']:.1f} s")
        elif kind == "resumed":
            for note in event["notes"]:
                self._note(f"skipped a checkpoint: {note}")
            self._note(f"resuming after step {event['step']} from {event['checkpoint']}")
        elif kind == "stalled":
            self._note(f"no progress, ending the workers: {event['text']}")
        elif kind == "dropped":
            self._note(f"going on without it: {event['text']}")
        elif kind == "skipped":
            self._note(f"step={event['step']} skipped: its loss or gradient is not finite; rows {event['rows']}")
        elif kind == "step":
            figures = figures_of(event)
            self._say(f"step={event['step']} {figures}{self._remaining(event)}")
            self._bar.update(self._task, completed=event["step"], figures=figures)
        elif kind == "eval":
            self._note(
                f"step={event['step']} eval_loss={event['eval_loss']:.4f} "
                f"eval_perplexity={event['eval_perplexity']:.3f}"
            )
        elif kind == "export":
            self._note(f"step={event['step']} adapter: {event['error'] or event['path']}")
        elif kind == "finished":
            share = event["input_wait_s"] / max(event["training_s"], 1e-9)
            self._note(f"trained in {event['training_s']:.0f} s, of which {share:.1%} waited for input")

    def _remaining(self, event: dict[str, Any]) -> str:
        """Estimate the remaining time from the pace of the last logged steps."""
        left = (self._total_steps or 0) - event["step"]
        return f" eta={datetime.timedelta(seconds=round(left * event['step_time_s']))}" if left > 0 else ""

    def _say(self, line: str) -> None:
        """Print a line if there is no bar."""
        if self._bar.disable:
            self._console.print(line, soft_wrap=True)

    def _note(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(line, soft_wrap=True)

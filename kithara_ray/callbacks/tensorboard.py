"""TensorBoard's event files, written by tensorboardX, which imports neither TensorFlow nor torch."""

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kithara_ray.callbacks.callback import Callback, RunInfo
from kithara_ray.storage.places import Place

_PUT_EVERY_S = 30.0
_FLUSH_S = 5


class TensorBoard(Callback):
    """The callback of `Trainer(tensorboard_dir=)`.

    It logs a step's numbers as `train/...` and an evaluation's as `eval/...`. A resumed run hides the entries logged
    after the checkpoint from which it resumes.

    Args:
        directory: on rank 0's host, or `gs://...`, `s3://...`. Objects cannot be appended to, so there the file is
            uploaded again every half a minute.
    """

    required = False

    def __init__(self, directory: str):
        self.directory = directory
        self._local: Path | None = None
        self._put_at = 0.0

    def on_start(self, run: RunInfo) -> None:
        from tensorboardX import SummaryWriter

        place = Place(self.directory)
        # A place that cannot be written to raises before anything is loaded.
        place.put_bytes(b"", "", f".probe-{run.name}")
        place.remove("", [f".probe-{run.name}"])
        self._local = Path(place.path() if place.is_local else tempfile.mkdtemp(prefix="kithara_ray_events_"))
        purge: dict[str, Any] = {"purge_step": run.step + 1} if run.step else {}
        self._writer = SummaryWriter(str(self._local), flush_secs=_FLUSH_S, **purge)
        self._put_at = time.monotonic()

    def on_step(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        self._write("train", step, metrics)

    def on_eval(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        self._write("eval", step, {name.removeprefix("eval_"): value for name, value in metrics.items()})

    def on_end(self, run: RunInfo, outcome: str, error: str | None) -> None:
        self._writer.add_text("outcome", error or outcome, run.total_steps)
        self._writer.close()
        self._put()
        if not Place(self.directory).is_local and self._local is not None:
            shutil.rmtree(self._local, ignore_errors=True)

    def _write(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(f"{group}/{name}", value, step)
        if time.monotonic() - self._put_at > _PUT_EVERY_S:
            self._writer.flush()
            self._put()

    def _put(self) -> None:
        place = Place(self.directory)
        if not place.is_local and self._local is not None:
            for path in self._local.iterdir():
                place.put(path, "", path.name)
        self._put_at = time.monotonic()

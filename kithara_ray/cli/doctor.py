"""`kithara-ray doctor`: the checks of a run's start by themselves, as one table."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kithara_ray import config
from kithara_ray.errors import KitharaRayError
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.preflight import checks
from kithara_ray.orchestration.preflight.checks import FAILED, OK, Finding
from kithara_ray.redact import redact

_STYLES = {OK: "green", checks.WARNING: "yellow", FAILED: "bold red", checks.SKIPPED: "dim"}


def diagnose(path: Path | None, overrides: Sequence[str]) -> list[Finding]:
    """Findings on a configuration, its base and the cluster; on the cluster alone without a configuration.

    Nothing is waited for: what another job holds is found to be busy.
    """
    if path is None:
        start_ray()
        return checks.check_cluster()
    try:
        loaded = config.load(path, overrides)
    except KitharaRayError as error:
        return [Finding("configuration", FAILED, str(error), error)]
    findings = [Finding("configuration", OK, f"{path} is valid")]
    try:
        job = config.build(loaded)
    except KitharaRayError as error:
        return [*findings, Finding("model, arguments", FAILED, str(error), error)]
    model = job.model
    what = f"{model.preset_handle}, rank {model.lora.r}" if model.lora else model.preset_handle
    findings.append(Finding("model, arguments", OK, what))
    start_ray()
    return findings + checks.check_run(job.trainer, job.exports, wait_s=0.0, tokenize=True)


def show(findings: Sequence[Finding], console: Console) -> None:
    """The table. A text that is not ok ends in what to do."""
    table = Table("check", "", "found, and what to do", highlight=False)
    for finding in findings:
        style = _STYLES[finding.state]
        table.add_row(finding.name, f"[{style}]{finding.state}[/]", escape(redact(finding.text)))
    console.print(table)

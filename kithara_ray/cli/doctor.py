"""Run `kithara-ray doctor`: only the checks at the start of a run, shown as one table."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kithara_ray import config
from kithara_ray.errors import KitharaRayError
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.preflight.checks import check_cluster, check_run
from kithara_ray.orchestration.preflight.findings import FAILED, OK, SKIPPED, WARNING, Finding
from kithara_ray.redact import redact

_STYLES = {OK: "green", WARNING: "yellow", FAILED: "bold red", SKIPPED: "dim"}


def diagnose(path: Path | None, overrides: Sequence[str]) -> list[Finding]:
    """Return findings on a configuration, its base and the cluster; without a configuration, only on the cluster.

    The checks do not wait: they report resources of other jobs as busy.
    """
    if path is None:
        start_ray()
        return check_cluster()
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
    return findings + check_run(job.trainer.request, job.exports, wait_s=0.0, tokenize=True)[0]


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the table. The text of every check that is not ok ends with a remedy."""
    table = Table("check", "", "found, and what to do", highlight=False)
    for finding in findings:
        style = _STYLES[finding.state]
        table.add_row(finding.name, f"[{style}]{finding.state}[/]", escape(redact(finding.text)))
    console.print(table)

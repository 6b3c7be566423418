"""Render a run's records as one self-contained HTML page, with its styles, script and pictures.

All text that comes from a run is untrusted: rows, prompts, names, errors. Jinja escapes all of it, and the page's own
policy allows only the script whose hash it names.
"""

import base64
import functools
import hashlib
import importlib.resources
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from kithara_ray.report.charts import Series, chart, seconds, short, size

_PHASES = {
    "connect": "connect to Ray",
    "check": "check cluster and data",
    "sample": "sample before training",
    "tokenize": "tokenise the data",
    "plan": "plan for the slice",
    "schedule": "wait for the workers",
    "import": "import and join",
    "fetch": "read the base",
    "build": "build the model",
    "look": "look for a checkpoint",
    "load": "load the weights",
    "compare": "compare the hosts' copies",
    "compile": "compile",
    "first_step": "first step",
}
_BESIDE = {"tokenizer": "load the tokenizer", "imports": "import in a worker"}
_STATUS = {
    "finished": ("good", "finished"),
    "failed": ("bad", "failed"),
    "running": ("open", "running"),
    "steps": ("good", "finished"),
    "early_stopping": ("good", "stopped early"),
    "callback": ("good", "stopped by a callback"),
    "interrupt": ("open", "interrupted"),
}
_LONGEST_TEXT = 4000


def render(run: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        run: run.json.
        history: history.json: events, samples, exports; the page leaves out missing entries.
    """
    template = _environment().get_template("report.html")
    return template.render(**_content(run, history), **_own())


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_file)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "short": short,
        "seconds": seconds,
        "size": size,
        "clipped": _clipped,
        "thousands": _thousands,
    }
    return environment


def _file(name: str) -> str:
    return importlib.resources.files("kithara_ray.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _own() -> dict[str, Any]:
    """Return style and script, and the hash by which the page's policy allows the script."""
    style, script = _file("report.css"), _file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_hash": f"sha256-{digest}"}


def _content(run: Mapping[str, Any], history: Mapping[str, Any]) -> dict[str, Any]:
    events = [event for event in history.get("events") or [] if isinstance(event, Mapping)]
    steps, evaluations = _of(events, "step"), _of(events, "eval")
    started = (_of(events, "started") or [{}])[-1]
    charts = [made for made in _charts(steps, evaluations) if made is not None]
    settings = run.get("settings") or {}
    trainer = settings.get("trainer") or {}
    stopped = (run.get("result") or {}).get("stopped")
    status = run.get("status", "running")
    mood, state = _STATUS.get(str(stopped if status == "finished" else status), ("open", str(status)))
    return {
        "name": (settings.get("run_config") or {}).get("name") or "run",
        "mood": mood,
        "state": state,
        "base": (run.get("base") or {}).get("name"),
        "started": run.get("started"),
        "ended": run.get("ended"),
        "error": run.get("error"),
        "tiles": _tiles(run, steps, evaluations, started),
        "charts": charts,
        "data": {made["name"]: made["data"] for made in charts},
        "phases": _phases(events, run),
        "samples": [sample for sample in history.get("samples") or [] if isinstance(sample, Mapping)],
        "statistics": _data_rows(run),
        "skipped": _of(events, "skipped"),
        "dropped": _of(events, "dropped"),
        "adapters": _of(events, "export"),
        "exports": [export for export in history.get("exports") or [] if isinstance(export, Mapping)],
        "plan": _plan_rows(run, steps),
        "resumed": _of(events, "resumed"),
        "configuration": _lines(run.get("config") or settings),
        "made_of": _made_of(run, trainer),
        "versions": run.get("versions") or {},
        "environment": run.get("environment") or {},
    }


def _of(events: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event.get("kind") == kind]


def _charts(steps: Sequence[Mapping], evaluations: Sequence[Mapping]) -> list[dict | None]:
    def points(rows: Sequence[Mapping], name: str) -> list[tuple[Any, Any]]:
        return [(row["step"], row[name]) for row in rows if row.get(name) is not None and "step" in row]

    loss = [Series("training", points(steps, "loss"))]
    loss.append(Series("evaluation", points(evaluations, "eval_loss"), colour=2, dots=True))
    times = [Series("step", points(steps, "step_time_s")), Series("of it, input", points(steps, "input_wait_s"), 2)]
    load = [Series("fullest expert", points(steps, "expert_load"))]
    note = "Tokens of the fullest expert in any block, as a multiple of the mean; 1 is even."
    return [
        chart("loss", "Loss", loss, note="Mean over the trained tokens of the global batch."),
        chart("rate", "Learning rate", [Series("learning rate", points(steps, "learning_rate"))], from_zero=True),
        chart("tokens", "Real tokens a second", [Series("tokens/s", points(steps, "tokens_per_s"))], from_zero=True),
        chart("time", "Seconds a step", times, from_zero=True),
        chart("norm", "Gradient norm", [Series("gradient norm", points(steps, "grad_norm"))], from_zero=True),
        chart("experts", "Load of experts", load, note=note),
        chart("router", "Routers' auxiliary loss", [Series("auxiliary loss", points(steps, "router_aux_loss"))]),
        chart("mfu", "Model FLOPs utilisation", [Series("MFU", points(steps, "mfu"))], from_zero=True),
    ]


def _tiles(run: Mapping, steps: Sequence[Mapping], evaluations: Sequence[Mapping], started: Mapping) -> list[dict]:
    """Return the most important figures, for the top of the page."""
    tiles = []

    def tile(name: str, value: str, below: str = "") -> None:
        tiles.append({"name": name, "value": value, "below": below})

    losses = [row["loss"] for row in steps if isinstance(row.get("loss"), (int, float))]
    if losses:
        tile("training loss", short(losses[-1]), f"from {short(losses[0])}")
    found = [(row["eval_loss"], row["step"]) for row in evaluations if isinstance(row.get("eval_loss"), (int, float))]
    if found:
        best, at = min(found)
        tile("evaluation loss", short(found[-1][0]), f"best {short(best)} at step {at}")
    if steps:
        total = started.get("total_steps")
        tile("steps", _thousands(steps[-1]["step"]), f"of {_thousands(total)}" if total else "")
        speeds = [row["tokens_per_s"] for row in steps if isinstance(row.get("tokens_per_s"), (int, float))]
        if speeds:
            tile("real tokens/s", short(statistics.median(speeds)), "median of logged steps")
        utilisation = [row["mfu"] for row in steps if row.get("mfu") is not None]
        if utilisation:
            tile("MFU", f"{statistics.median(utilisation):.1%}", "median of logged steps")
        memory = [(row["hbm_bytes"], row.get("hbm_limit_bytes")) for row in steps if row.get("hbm_bytes")]
        if memory:
            most, limit = max(memory)
            tile("device memory", f"{most / 2**30:.2f} GiB", f"of {limit / 2**30:.2f} GiB" if limit else "")
    if started.get("parameters"):
        share = started["trainable"] / started["parameters"]
        tile("trained parameters", short(started["trainable"]), f"{share:.2%} of {short(started['parameters'])}")
    return tiles


def _phases(events: Sequence[Mapping], run: Mapping) -> list[dict]:
    """Return the phases of start-up in order, as shares of the total time, and what was done beside them."""
    started = (_of(events, "started") or [{}])[-1]
    phases = dict(started.get("phases") or (run.get("result") or {}).get("phases") or {})
    for event in _of(events, "first_step"):
        phases["first_step"] = event["seconds"]
    total = sum(phases.values())
    ordered = sorted(phases.items(), key=lambda item: list(_PHASES).index(item[0]) if item[0] in _PHASES else 99)

    def bar(name: str, begins_s: float, time_s: float, kind: str = "") -> dict:
        left = min(100.0, 100 * begins_s / total) if total else 0
        width = min(100 - left, 100 * time_s / total) if total else 0
        return {"name": name, "text": seconds(time_s), "left": round(left, 2), "width": round(width, 2), "kind": kind}

    past, rows = 0.0, []
    for name, time_s in ordered:
        rows.append(bar(_PHASES.get(name) or str(name), past, time_s))
        past += time_s
    for name, (begins_s, ends_s) in (started.get("beside") or {}).items():
        rows.append(bar(f"beside: {_BESIDE.get(name, name)}", begins_s, ends_s - begins_s, "beside"))
    return rows


def _data_rows(run: Mapping) -> list[dict]:
    """Return one table row per dataset."""
    rows = []
    for name, told in (run.get("data") or {}).items():
        tokens, trained = told.get("tokens"), told.get("trained_tokens")
        lengths = told.get("lengths") or {}
        rows.append(
            {
                "name": {"train": "training", "eval": "evaluation"}.get(name, name),
                "rows": _thousands(told.get("rows")),
                "tokens": _thousands(tokens),
                "trained": f"{_thousands(trained)} ({trained / tokens:.0%})" if tokens and trained is not None else "",
                "lengths": " / ".join(str(lengths[key]) for key in ("min", "median", "p95", "max") if key in lengths),
                "fingerprint": told.get("fingerprint") or "",
            }
        )
    return rows


def _plan_rows(run: Mapping, steps: Sequence[Mapping]) -> list[dict]:
    """Return the plan's figures next to the measured ones."""
    plan = run.get("plan") or {}
    if not plan:
        return []

    def middle(name: str) -> float | None:
        values = [row[name] for row in steps if isinstance(row.get(name), (int, float))]
        return statistics.median(values) if values else None

    def gib(value: float | None) -> str:
        return "" if value is None else f"{value / 2**30:.2f} GiB"

    hbm = plan.get("hbm_bytes_per_chip") or {}
    peak = max((row["hbm_bytes"] for row in steps if row.get("hbm_bytes")), default=None)
    bound, speed = plan.get("step_time_s_bound"), plan.get("tokens_per_s_bound")
    mfu, measured = plan.get("mfu_bound"), middle("mfu")
    step = middle("step_time_s")
    chosen = plan.get("chosen")
    return [
        *([{"name": "settings that the planner chose", "plan": chosen["why"], "found": ""}] if chosen else []),
        {"name": f"memory of a chip ({plan.get('slice')})", "plan": gib(hbm.get("total")), "found": gib(peak)},
        {
            "name": "seconds a step (the plan's is a lower bound)",
            "plan": "" if bound is None else seconds(bound),
            "found": "" if step is None else seconds(step),
        },
        {
            "name": "tokens/s (planned with padding, measured without)",
            "plan": "" if speed is None else short(speed),
            "found": short(middle("tokens_per_s") or 0.0),
        },
        {
            "name": "MFU",
            "plan": "" if mfu is None else f"{mfu:.1%}",
            "found": "" if measured is None else f"{measured:.1%}",
        },
    ]


def _made_of(run: Mapping, trainer: Mapping) -> list[tuple[str, str]]:
    """Return the facts that distinguish this run from others."""
    base, mesh, git = run.get("base") or {}, run.get("mesh") or {}, run.get("git") or {}
    axes = " ".join(f"{name}={mesh[name]}" for name in ("data", "fsdp", "expert", "tensor") if name in mesh)
    optimizer = (run.get("settings") or {}).get("optimizer")
    lora = ((run.get("settings") or {}).get("model") or {}).get("lora") or {}
    facts = {
        "started": run.get("started"),
        "ended": run.get("ended"),
        "base": " ".join(str(base[name]) for name in ("name", "revision", "model_type") if base.get(name)),
        "fingerprint of the base": base.get("fingerprint"),
        "LoRA": f"rank {lora['r']}, alpha {lora.get('lora_alpha') or lora['r']}" if lora.get("r") else "all weights",
        "optimizer": optimizer.get("class_name") if isinstance(optimizer, Mapping) else optimizer,
        "seed": trainer.get("seed"),
        "mesh": axes,
        "devices": f"{mesh.get('devices')} {mesh.get('platform')} on {mesh.get('hosts')} host(s)" if mesh else "",
        "revision of the code": f"{git['revision']}{' with changes' if git.get('dirty') else ''}" if git else "",
        "ended in": (run.get("result") or {}).get("path"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _lines(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _thousands(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\u202f")
    return "" if value is None else str(value)


def _clipped(text: Any) -> str:
    """Shorten a long text, since a row may be as long as a book."""
    text = str(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ... ({len(text):,} characters)"

"""What the benchmarks share: contenders in processes of their own, rounds in turn, a table and a JSON file."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("jax", "keras", "keras-hub", "ray", "torch", "transformers", "peft")


def peak_rss_mb() -> float:
    """Of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(script: str, *args: str) -> dict:
    """One contender in a fresh process; what it reports as JSON on its last line of output."""
    command = [sys.executable, script, *args]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rounds(script: str, contenders: list[str], count: int) -> dict[str, list[dict]]:
    """Every contender once a round, so that a slow minute of the machine meets all of them."""
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(count):
        for name in contenders:
            results[name].append(run(script, name))
            print(f"round {number + 1}/{count} {name}: {results[name][-1]}", file=sys.stderr)
    return results


def middle(values: list[float]) -> str:
    """The median, and the range behind it."""
    return f"{statistics.median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


def machine(more: tuple[str, ...] = ()) -> dict:
    """Where and with what a figure was measured."""
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory_gb, 1),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in (*PACKAGES, *more)},
    }


def write(name: str, command: str, table: list[str], figures: dict, packages: tuple[str, ...] = ()) -> None:
    """benchmarks/results/<name>.md and .json; `packages` are named beside those of all."""
    where = machine(packages)
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    versions = ", ".join(f"{package} {version}" for package, version in where["packages"].items())
    lines = [
        f"# {name}",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {where['cores']} cores of {where['cpu']}, {where['memory_gb']} GB, "
        f"Python {where['python']}; {versions}. Medians, with the range over rounds behind them.",
        "",
        *table,
        "",
    ]
    (out / f"{name}.md").write_text("\n".join(lines))
    (out / f"{name}.json").write_text(json.dumps({"command": command, "machine": where, **figures}, indent=1) + "\n")
    print("\n".join(lines))

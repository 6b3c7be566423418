"""The arrows of the house: which room may import which, and which libraries stay out of a room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kithara_ray"
HEAVY = {"jax", "keras", "keras_hub", "ray", "torch", "tensorflow"}
# What a worker imports by path, after its process was set up.
WORKERS_OWN = {f"kithara_ray.orchestration.{name}" for name in ("worker.run", "worker.start", "decoding")}
# Rooms of what is imported -> what its import must not load. Each is tried in a process of its own.
LIGHT = {
    "kithara_ray": (["kithara_ray"], HEAVY),
    "errors": (["kithara_ray.errors"], HEAVY),
    "command line": (["kithara_ray.cli.app"], HEAVY | {"pydantic", "transformers"}),
    "storage": (["kithara_ray.storage"], HEAVY),
    "hf": (["kithara_ray.hf"], HEAVY),
    "sft": (["kithara_ray.sft"], HEAVY),
    "checkpoint": (["kithara_ray.checkpoint.run_files", "kithara_ray.checkpoint.checkpointer"], HEAVY),
    "sharding": (["kithara_ray.sharding"], HEAVY - {"jax"}),
    "sharding, driver's part": (["kithara_ray.sharding.shape", "kithara_ray.sharding.gather"], HEAVY),
    "model": (["kithara_ray.model"], {"ray", "torch"}),
    "model, driver's part": (["kithara_ray.model.families.llama", "kithara_ray.model.lora.targets"], HEAVY),
    "train": (["kithara_ray.train"], {"ray", "torch"}),
    "configuration": (
        ["kithara_ray.config", "kithara_ray.cli.doctor", "kithara_ray.tune"],
        {"keras", "keras_hub", "torch", "tensorflow", "transformers"},
    ),
    "report": (["kithara_ray.report"], HEAVY),
    "callbacks": (["kithara_ray.callbacks"], HEAVY | {"tensorboardX", "wandb", "mlflow"}),
    "plan": ([f"kithara_ray.plan.{name}" for name in ("planner", "report", "search", "hlo", "terms")], HEAVY),
    # A process that Ray starts for a task imports the task's module first.
    "tasks at a run's start": (
        ["kithara_ray.orchestration.preflight.tasks", "kithara_ray.orchestration.preflight.node_facts"],
        HEAVY - {"ray"} | {"ray.train", "ray.data", "pandas", "transformers"},
    ),
    "the actor of generate": (
        ["kithara_ray.orchestration.generator"],
        HEAVY - {"ray"} | {"ray.train", "ray.data", "pandas", "transformers"},
    ),
    "orchestration, on the driver": (
        [
            f"kithara_ray.orchestration.{name}"
            for name in ("trainer", "model", "results", "generator_group", "search.search")
        ],
        {"keras", "keras_hub", "torch", "tensorflow", *WORKERS_OWN},
    ),
}
# Room -> the rooms that it may import, besides itself. A room of rooms is listed with its own rooms inside.
ARROWS = {
    "storage": {"errors"},
    "hf": {"errors", "storage"},
    "hf.exports": {"errors", "storage", "hf", "hf.publish", "kithara_ray"},
    "hf.publish": {"errors", "storage", "hf"},
    "sft": {"errors", "hf", "storage"},
    "sharding": {"errors"},
    "checkpoint": {"errors", "storage", "hf", "sharding"},
    "model": {"errors", "storage", "hf", "hf.exports", "sharding"},
    "train": {"errors", "sharding", "model"},
    "plan": {"errors", "storage", "hf", "sharding", "model", "train"},
    "callbacks": {"errors", "storage"},
    "report": {"errors", "storage", "checkpoint", "redact"},
    "orchestration.cluster": {"errors", "storage"},
    "orchestration.data": {"errors", "storage", "sft", "sharding", "orchestration.cluster"},
    # A value of what the user asked; below all that carries it out.
    "orchestration.request": {
        *("errors", "storage", "hf", "sharding", "checkpoint", "callbacks"),
        *("orchestration.cluster", "orchestration.data"),
    },
    "orchestration.worker": {
        *("errors", "storage", "hf", "sharding", "model", "train", "checkpoint", "plan", "callbacks", "sft"),
        *("orchestration.cluster", "orchestration.data", "orchestration.request"),
    },
    "orchestration.preflight": {
        *("errors", "storage", "hf", "hf.exports", "hf.publish", "sharding", "plan"),
        *("orchestration.cluster", "orchestration.data", "orchestration.request"),
    },
    # From a request, its tokens and its plan to the spec that the workers get.
    "orchestration.driver": {
        *("errors", "storage", "hf", "hf.exports", "sft", "redact", "checkpoint", "callbacks"),
        *(f"orchestration.{room}" for room in ("cluster", "data", "request", "preflight", "worker")),
    },
    "orchestration.head": {
        *("errors", "storage", "hf", "hf.exports", "sharding", "model", "checkpoint", "report"),
        *("orchestration.cluster", "orchestration.worker"),
    },
    # The handles: trainer, model, results, generator, generator_group, submit.
    "orchestration": {
        *("errors", "storage", "hf", "hf.exports", "hf.publish", "sft", "sharding", "model", "train", "callbacks"),
        *("yaml_file", "checkpoint", "redact"),
        *(f"orchestration.{room}" for room in ("cluster", "data", "request", "preflight", "worker", "head", "driver")),
    },
    "orchestration.search": {
        *("errors", "storage", "checkpoint", "redact"),
        *("orchestration", "orchestration.cluster", "orchestration.request"),
    },
}
MOST_MODULES, MOST_LINES = 15, 400


def modules_of(package: str) -> list[str]:
    """All modules below a package of ours; a module's own name where it is none."""
    path = PACKAGE.parent / package.replace(".", "/")
    files = sorted(path.rglob("*.py")) if path.is_dir() and package != "kithara_ray" else []
    return [_name(file) for file in files if file.stem not in ("__init__", "__main__")] or [package]


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Module of ours -> the modules of ours that it imports anywhere in it, but for type checkers alone."""
    files = {_name(file): file for file in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        found[module] = set()
        for node in _nodes(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                each = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in files else str(node.module) for name in each]
            found[module] |= {name for name in names if name in files}
    return found


def _nodes(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from _nodes(node)


def room_of(module: str) -> str:
    """The innermost room of ARROWS that holds a module; its own first name where there is none."""
    parts = module.removeprefix("kithara_ray").lstrip(".").split(".")
    within = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    return next((room for room in within if room in ARROWS), parts[0] or "kithara_ray")


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of imports; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if circle := walk(target, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(arrows) if (circle := walk(name, []))), [])


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Each import that no arrow allows, as text."""
    return [
        f"{module} imports {target}: {room_of(module)} may not import {room_of(target)}"
        for module, targets in arrows.items()
        if room_of(module) in ARROWS
        for target in sorted(targets)
        if room_of(target) not in {room_of(module), *ARROWS[room_of(module)]}
    ]


def imported_by(modules: list[str]) -> set[str]:
    lines = ["import sys, importlib"]
    if any(".model." in module or ".train." in module for module in modules):
        lines.append("import os; os.environ['KERAS_BACKEND'] = 'jax'")
        lines.append("sys.modules['tensorflow'] = sys.modules['tensorflow_text'] = None")
    lines += [f"importlib.import_module({module!r})" for module in modules]
    lines.append("print('\\n'.join(name for name, module in sys.modules.items() if module is not None))")
    out = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("room", LIGHT)
def test_a_room_does_not_import_what_it_must_not(room):
    packages, absent = LIGHT[room]
    assert not imported_by([module for package in packages for module in modules_of(package)]) & absent


def test_every_import_follows_an_arrow():
    assert not upward(imports())


def test_no_circle_of_imports_is_left():
    assert not circle_in(imports())
    assert not circle_in(ARROWS)


def test_a_turned_arrow_is_seen():
    arrows = imports()
    arrows["kithara_ray.storage.urls"].add("kithara_ray.hf.fetch")
    assert any("storage may not import hf" in line for line in upward(arrows))
    assert circle_in(arrows)


def test_orchestration_alone_imports_ray():
    users = {room_of(_name(file)).partition(".")[0] for file in PACKAGE.rglob("*.py") if _imports_ray(file)}
    assert users <= {"orchestration", "config", "tune"}


def test_a_rank_knows_the_cluster_by_its_channel_alone():
    """The callbacks' own metrics are Ray's."""
    worker = PACKAGE / "orchestration" / "worker"
    assert {file.stem for file in worker.glob("*.py") if _imports_ray(file)} == {"callback_runner"}


def _imports_ray(file: Path) -> bool:
    names = [
        name
        for node in _nodes(ast.parse(file.read_text()))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    return any(name == "ray" or name.startswith("ray.") for name in names)


def test_rooms_and_modules_are_small():
    rooms = {folder: len([f for f in folder.glob("*.py") if f.stem != "__init__"]) for folder in PACKAGE.rglob("*")}
    assert not {str(folder): count for folder, count in rooms.items() if count > MOST_MODULES}
    lines = {str(file): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert not {file: count for file, count in lines.items() if count > MOST_LINES}


def test_public_names_are_all_there():
    import kithara_ray

    assert sorted(kithara_ray._HOMES) == kithara_ray.__all__
    for name in kithara_ray.__all__:
        assert getattr(kithara_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        kithara_ray.trainer  # noqa: B018

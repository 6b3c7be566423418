"""The arrows of the house: each room is imported in a process of its own, and what must be absent is absent."""

import subprocess
import sys

import pytest

HEAVY = {"jax", "keras", "keras_hub", "ray", "torch", "tensorflow"}
ROOMS = {
    "kithara_ray": (["kithara_ray"], HEAVY),
    "errors": (["kithara_ray.errors"], HEAVY),
    "command line": (["kithara_ray.cli.app"], HEAVY | {"pydantic", "transformers"}),
    "hf": (
        [f"kithara_ray.hf.{name}" for name in ("storage", "checkpoint", "adapter", "merge", "export", "combine")],
        HEAVY,
    ),
    "sft": (
        [
            f"kithara_ray.sft.{name}"
            for name in ("formats", "chat", "files", "tokenize", "tokenizer", "collate", "order", "buckets", "preview")
        ],
        HEAVY,
    ),
    "sharding": (
        [f"kithara_ray.sharding.{name}" for name in ("shape", "mesh", "gather")],
        HEAVY - {"jax"},
    ),
    "sharding, driver's part": (["kithara_ray.sharding.shape", "kithara_ray.sharding.gather"], HEAVY),
    "model, driver's part": (["kithara_ray.model.families", "kithara_ray.model.lora.targets"], HEAVY),
    "model": (
        [f"kithara_ray.model.{name}" for name in ("runtime", "causal_lm", "weights", "lora", "generate")],
        {"ray", "torch"},
    ),
    "train, what a run has left in files": (["kithara_ray.checkpoint.run_files"], HEAVY),
    "train": ([f"kithara_ray.train.{name}" for name in ("loss", "optimizer", "step")], {"ray", "torch"}),
    "configuration": (
        [f"kithara_ray.{name}" for name in ("config", "doctor", "tune")],
        {"keras", "keras_hub", "torch", "tensorflow", "transformers"},
    ),
    "report": (["kithara_ray.report.files", "kithara_ray.report.page"], HEAVY),
    "callbacks": (["kithara_ray.callbacks"], HEAVY | {"tensorboardX", "wandb", "mlflow"}),
    "plan": ([f"kithara_ray.plan.{name}" for name in ("planner", "report", "search", "hlo", "terms")], HEAVY),
    "orchestration, on the driver": (
        [f"kithara_ray.orchestration.{name}" for name in ("data", "model", "trainer", "coordinator", "tune")],
        {"keras", "keras_hub", "torch", "tensorflow"},
    ),
}
UPWARD = {
    "hf": ("sft", "sharding", "model", "train", "orchestration"),
    "sft": ("sharding", "model", "train", "orchestration"),
    "sharding": ("hf", "sft", "model", "train", "orchestration"),
    "model": ("sft", "train", "orchestration"),
    "train": ("sft", "orchestration"),
    "plan": ("sft", "orchestration"),
    "report": ("sft", "model", "plan", "callbacks", "orchestration"),
    "callbacks": ("sft", "sharding", "model", "plan", "orchestration"),
}


def imported_by(modules: list[str]) -> set[str]:
    lines = ["import sys, importlib"]
    if any(".model." in module or ".train." in module for module in modules):
        lines.append("import os; os.environ['KERAS_BACKEND'] = 'jax'")
        lines.append("sys.modules['tensorflow'] = sys.modules['tensorflow_text'] = None")
    lines += [f"importlib.import_module({module!r})" for module in modules]
    lines.append("print('\\n'.join(name for name, module in sys.modules.items() if module is not None))")
    out = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_does_not_import_what_it_must_not(room):
    modules, absent = ROOMS[room]
    assert not imported_by(modules) & absent


@pytest.mark.parametrize("room", UPWARD)
def test_no_room_imports_upward(room):
    modules, _ = ROOMS[room]
    above = [name for name in imported_by(modules) if name.startswith(tuple(f"kithara_ray.{u}" for u in UPWARD[room]))]
    assert not above


def test_public_names_are_all_there():
    import kithara_ray

    assert sorted(kithara_ray._HOMES) == kithara_ray.__all__
    for name in kithara_ray.__all__:
        assert getattr(kithara_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        kithara_ray.trainer  # noqa: B018

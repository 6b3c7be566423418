"""Requirements and best possible speed of a run on a TPU slice that nobody has rented yet.

`plan` compiles the exact training step for the slice and reads the program. The TPU's own compiler (libtpu, which needs
no TPU) does this in a separate process. Without libtpu, or for an unknown generation, `plan` builds the same model but
does not compile. It then estimates the compiler's figures and labels them as estimates.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from kithara_ray.errors import ConfigError, PlanError, UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.resizing.tables import with_vocabulary
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.model.lora.conversion import converted
from kithara_ray.model.options import ModelOptions
from kithara_ray.plan.chips import Slice, slice_of
from kithara_ray.plan.report import Plan, assemble
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage import urls
from kithara_ray.storage.atomic import write_atomic

# Code that the step depends on besides the request: these rooms and the compilers.
_ROOMS = ("model", "train", "sharding", "plan")
_PACKAGES = ("jax", "jaxlib", "libtpu", "keras", "keras-hub")
_ADAMW = {"module": "keras.optimizers", "class_name": "AdamW", "config": {"learning_rate": 1e-4}}
# A TPU program needs sequence lengths that are multiples of this.
_LENGTH_MULTIPLE = 128


def plan(
    base: str | Path | Mapping[str, Any],
    slice: str | Slice,
    seq_len: int,
    per_device_batch_size: int = 1,
    *,
    lora: LoraConfig | None = None,
    optimizer: tuple[str, Any] | None = None,
    mesh: MeshShape | None = None,
    remat: str = "block",
    precision: str = "mixed_bfloat16",
    quantize: str | None = None,
    train_weights: bool = False,
    gradient_accumulation_steps: int = 1,
    predictions: int | None = None,
    routed: bool | None = None,
    router_aux_loss_coef: float | None = None,
    price_per_chip_hour: float | None = None,
    tokens_per_epoch: int | None = None,
    compile: bool = True,
    cache: bool = True,
    timeout_s: float = 3600.0,
) -> Plan:
    """Plan a run with these settings on this slice: its requirements and its best possible speed.

    Args:
        base: a directory with a config.json (weights are not needed), a handle such as `hf://google/gemma-2-2b`, or
            the parsed config.json.
        slice: e.g. "v5e-16"; "cpu-4" plans for four CPU devices of one process.
        seq_len: T, rounded up as training does.
        per_device_batch_size: rows per device and micro-batch.
        lora: the LoRA settings; rank 16 on q and v by default.
        optimizer: ("keras", its serialised configuration); AdamW by default. An optax transformation is a closed
            function. The plan assumes AdamW for it, whose state is as large as that of most optimizers.
        mesh: axes of the device mesh; None takes the default of a run on this slice, see `default_mesh`.
        quantize: storage of the frozen kernels, one of `options.QUANTIZATIONS`; None keeps the base's dtype.
        train_weights: all weights are trained, without LoRA.
        predictions: K, trained tokens per row; all of them by default.
        routed: False plans a mixture that computes every expert for every token, to compare with; None plans the step
            that training runs.
        router_aux_loss_coef: factor of the routers' auxiliary loss; None leaves it out.
        price_per_chip_hour: price in any currency, for the cost.
        tokens_per_epoch: tokens of the data set, for the cost of an epoch.
        compile: False only estimates.
        cache: reuse an earlier result for the same program, and keep this one.

    Raises:
        ConfigError: an argument is wrong, or the library cannot honour the model.
        PlanError: compilation failed for a reason other than memory.
    """
    where = slice if isinstance(slice, Slice) else slice_of(slice)
    rows = Rows(seq_len, per_device_batch_size, gradient_accumulation_steps, predictions)
    own = {"routed": routed, "router_aux_loss_coef": router_aux_loss_coef or 0.0}
    own |= {"quantize": quantize, "train_weights": train_weights}
    computation = ModelOptions(precision=precision, remat=remat, **own)
    request = request_of(base, where, rows, lora or LoraConfig(), optimizer, mesh, computation)
    why = why_not_compiled(where, compile)
    request |= {"compile": why is None, "topology": where.topology if why is None and not where.is_cpu else None}
    found = _facts(request, where, cache, timeout_s)
    return assemble(request, where, found, why, price_per_chip_hour, tokens_per_epoch)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The input of a step on one device.

    Attributes:
        seq_len: T, as requested.
        per_device_batch_size: rows of a micro-batch.
        gradient_accumulation_steps: number of micro-batches.
        mesh: axes of the device mesh; None takes the default of a run on this slice, see `default_mesh`.
        predictions: K, trained tokens per row; None trains all.
    """

    seq_len: int
    per_device_batch_size: int
    gradient_accumulation_steps: int
    predictions: int | None

    def __post_init__(self):
        for name in ("seq_len", "per_device_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"plan: {name} must be an integer >= 1, got {value!r}")

    def on(self, where: Slice) -> "Rows":
        """A copy with the sequence length that this slice's program uses, and with `predictions` filled in."""
        seq_len = self.seq_len if where.is_cpu else -(-self.seq_len // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        return dataclasses.replace(self, seq_len=seq_len, predictions=min(self.predictions or seq_len, seq_len))


def request_of(
    base: str | Path | Mapping[str, Any],
    where: Slice,
    rows: Rows,
    lora: LoraConfig,
    optimizer: tuple[str, Any] | None,
    mesh: MeshShape | None,
    options: ModelOptions,
) -> dict[str, Any]:
    """The request for `program.facts`, except whether to compile and for which slice."""
    config, stored = config_of(base)
    if lora.resize_token_embeddings is not None:
        config = with_vocabulary(config, lora.resize_token_embeddings)
    kind, optimizer_config = optimizer or ("keras", _ADAMW)
    return {
        "config": config,
        "devices": where.devices,
        "hosts": where.hosts,
        "chip_config": where.chip.config if where.chip else None,
        **dataclasses.asdict(rows.on(where)),
        "lora": None if options.train_weights else _recorded(lora, config),
        "optimizer": optimizer_config if kind == "keras" else _ADAMW,
        "mesh": None if mesh is None else dataclasses.asdict(mesh),
        # The default mesh depends on it. A plan does not know the memory of CPU devices.
        "device_bytes": where.chip.hbm_bytes if mesh is None and where.chip else None,
        "remat": options.remat,
        "routed": options.routed,
        "router_aux_loss_coef": options.router_aux_loss_coef,
        "precision": options.precision,
        "quantize": options.quantize,
        "base_dtype": "bfloat16" if options.precision == "bfloat16" else stored,
    }


def _recorded(lora: LoraConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA settings as plain data, without the values of added rows."""
    return dataclasses.replace(converted(lora, config), added_rows=None).recorded()


def config_of(base: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str | dict[str, str]]:
    """Read a base's config.json, and the dtype of its weights, which may be absent.

    Returns:
        config.json, and one dtype, or each tensor's if they differ. The weights' headers say it; without weights,
        config.json does.

    Raises:
        CheckpointError: the directory holds weights that do not match config.json.
    """
    if isinstance(base, Mapping):
        return dict(base), _configured_dtype(base)
    described = BaseCheckpoint.described(str(base))
    if not described.has_weights:
        return described.config, _configured_dtype(described.config)
    check_tensors(described, values=False)
    stored = {name: info.numpy_dtype.name for name, info in sorted(described.tensors.items())}
    return described.config, stored if len(set(stored.values())) > 1 else next(iter(stored.values()))


def _configured_dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    configs = [config, *([text] if isinstance(text, Mapping) else [])]
    given = (each.get(name) for each in configs for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in given if dtype), "bfloat16")


def why_not_compiled(where: Slice, compile: bool = True) -> str | None:
    """The reason why no program is compiled for this slice here; None if one is."""
    if where.is_cpu and compile:
        return None
    if not compile:
        return "the plan was requested without compiling"
    if where.chip is None:
        return f"the chips of {where.name} are not known"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu, the TPU's compiler, is not installed (pip install 'jax[tpu]'; it needs no TPU)"
    return None


# --- the other process -----------------------------------------------------------------------------------------------


def _facts(request: dict[str, Any], where: Slice, cache: bool, timeout_s: float) -> dict[str, Any]:
    (found,) = facts_of_all([(request, where)], cache, timeout_s)
    return checked(found)


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return the facts, or raise the error that stands in their place."""
    if "config_error" in found:
        kind, message = found["config_error"]
        raise (UnsupportedError if kind == "UnsupportedError" else ConfigError)(message)
    return found


def facts_of_all(asked: Sequence[tuple[dict[str, Any], Slice]], cache: bool, timeout_s: float) -> list[dict[str, Any]]:
    """Return the facts of each request, or its `config_error`; one process finds all that are not cached.

    Several requests must all be estimates: a process compiles for one slice only.
    """
    kept = [urls.cache_dir() / "plans" / f"{_key(request, where)}.json" for request, where in asked]
    found = [json.loads(file.read_text()) | {"cached": True} if cache and file.is_file() else {} for file in kept]
    missing = [number for number, known in enumerate(found) if not known]
    if not missing:
        return found
    requests = [asked[number] for number in missing]
    for number, made in zip(missing, _run(requests, timeout_s), strict=True):
        found[number] = made
        if cache and "config_error" not in made:
            kept[number].parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept[number], json.dumps(made).encode())  # several plans may run at the same time
    return found


def _run(asked: Sequence[tuple[dict[str, Any], Slice]], timeout_s: float) -> list[dict[str, Any]]:
    """Answer all requests in one process, which has as many devices as the largest slice."""
    largest, where = max(asked, key=lambda pair: pair[1].devices)
    with tempfile.TemporaryDirectory(prefix="kithara-plan-") as directory:
        given, answered = Path(directory, "requests.json"), Path(directory, "results.json")
        given.write_text(json.dumps([request for request, _ in asked]))
        command = [sys.executable, "-m", "kithara_ray.plan.program", str(given), str(answered)]
        try:
            done = subprocess.run(command, env=_environment(largest, where), capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise PlanError(f"the step did not compile for {where.name} within {timeout_s:g} s") from error
        if done.returncode or not answered.is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise PlanError(f"the step did not compile for {where.name}: {said[-1] if said else 'no message'}")
        return json.loads(answered.read_text())


def _environment(request: Mapping[str, Any], where: Slice) -> dict[str, str]:
    """Environment of a process that holds no accelerator and compiles for one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "XLA_FLAGS"))}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if request["topology"] is None:
        return env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={where.devices}"}
    return env | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": where.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # The process runs nothing on a TPU, so it need not wait for another process that does.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _key(request: Mapping[str, Any], where: Slice) -> str:
    digest = hashlib.sha256(json.dumps([request, where.name], sort_keys=True).encode())
    package = Path(__file__).parents[1]
    for room in _ROOMS:
        for file in sorted((package / room).rglob("*.py")):
            digest.update(_code_of(file.read_text(encoding="utf-8")).encode())
    digest.update(json.dumps([_version(name) for name in _PACKAGES]).encode())
    return digest.hexdigest()[:32]


def _code_of(source: str) -> str:
    """A module's code without comments and docstrings, so that cached plans survive a change of wording."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""The facts about a step's program: built without weights, and compiled for devices that need not exist.

`program` imports this module in a process of its own, whose environment names the slice, with Keras' backend chosen.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.tower import text_of
from kithara_ray.model.blocks import attention, mixtures
from kithara_ray.model.causal_lm import CausalLM, build
from kithara_ray.model.families import family_of
from kithara_ray.model.families.family import completed
from kithara_ray.model.identity import IdentitySet
from kithara_ray.plan.default_mesh import NUMBERS_OF_TRAINED, default_mesh
from kithara_ray.plan.hlo import cost_of, refused_bytes
from kithara_ray.plan.hlo_text import arrays_of
from kithara_ray.plan.terms import Counts
from kithara_ray.sharding.mesh import WEIGHT_AXES, make_mesh
from kithara_ray.sharding.shape import MeshShape, axes_told
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer, is_elementwise


def facts(request: Mapping[str, Any]) -> dict[str, Any]:
    """Collect all facts about one request's program.

    Keys: `devices`, `mesh`, `default_mesh` (None if the request gives a mesh), `counts`, `bytes` (on one device, by
    part), `frozen_bytes`, `adapter_bytes`, `optimizer_bytes` and `state_bytes` (of all devices), `uneven_bytes` and
    `rows`. A compiled program adds `memory`, `compile_s`, `compile_cpu_s`, `square_arrays` and `cost`. A refused one
    adds `refusal` and `refused_bytes`.
    """
    devices = _devices(request)
    optimizer = KerasOptimizer(request["optimizer"])
    lora = None if request["lora"] is None else LoraConfig(**request["lora"])

    def built(shape: MeshShape) -> tuple[CausalLM, Any, Any]:
        model = build(
            request["config"],
            lora,
            make_mesh(shape, devices),
            request["precision"],
            remat=request["remat"],
            quantize=request["quantize"],
            train_weights=lora is None,
            routed=request["routed"],
            router_aux_loss_coef=request["router_aux_loss_coef"],
            stack_factors=is_elementwise("keras", request["optimizer"]),
        )
        state = step.abstract_state(model, optimizer)
        return model, state, [] if lora is None else model.abstract_frozen(_dtypes(request["base_dtype"]))

    asked, chosen = request["mesh"], None
    model, state, frozen = built(MeshShape() if asked is None else MeshShape(**asked))
    if asked is None:
        chosen = default_mesh(_state_bytes(state, frozen), request["device_bytes"])
        model, state, frozen = (model, state, frozen) if chosen.splits else built(chosen.shape)
    mesh, micro = model.mesh, request["gradient_accumulation_steps"]
    rows = request["per_device_batch_size"] * micro * mesh.size
    batch = step.abstract_batch(model, rows, request["seq_len"], request["predictions"])
    found = {
        "devices": mesh.size,
        "mesh": axes_told(mesh.shape),
        "default_mesh": chosen and chosen.told(),
        "counts": dataclasses.asdict(counts_of(model, request["config"], _nbytes(frozen or state["params"]))),
        "bytes": {
            "frozen": _on_one_device(frozen),
            "adapter": _on_one_device(state["params"]),
            "optimizer": _on_one_device(state["opt"]),
            "batch": _on_one_device(batch),
        },
        "frozen_bytes": _nbytes(frozen),
        "uneven_bytes": _uneven_bytes(frozen, mesh),
        "adapter_bytes": _nbytes(state["params"]),
        "optimizer_bytes": _nbytes(state["opt"]),
        "state_bytes": _nbytes(state),
        "largest_array_bytes": max(map(_nbytes, jax.tree.leaves([frozen, state["params"]]))),
        "rows": rows,
    }
    return found | (_compiled(model, optimizer, state, frozen, batch, micro) if request["compile"] else {})


def _state_bytes(state: Mapping[str, Any], frozen: Any) -> int:
    """Count the whole state as `default_mesh` does, from the built model's arrays."""
    return _nbytes(frozen) + NUMBERS_OF_TRAINED * _nbytes(state["params"])


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _dtypes(given: str | Mapping[str, str]) -> np.dtype | dict[str, np.dtype]:
    """The dtype of all tensors, or of each by its name."""
    known = {"bfloat16": ml_dtypes.bfloat16}
    if isinstance(given, str):
        return np.dtype(known.get(given, given))
    return {name: np.dtype(known.get(dtype, dtype)) for name, dtype in given.items()}


def _compiled(model: CausalLM, optimizer, state, frozen, batch, micro: int) -> dict[str, Any]:
    started = time.monotonic(), time.process_time()
    try:
        compiled = step.compile_step(model, optimizer, state, frozen, batch, micro)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refusal": str(error).splitlines()[0], "refused_bytes": refused_bytes(str(error))}
    seconds, cpu_seconds = time.monotonic() - started[0], time.process_time() - started[1]
    memory, text = compiled.memory_analysis(), compiled.as_text()
    seq_len = batch["token_ids"].shape[1]
    sizes = ("argument", "output", "alias", "temp", "generated_code", "host_temp")
    return {
        "compile_s": round(seconds, 1),
        "compile_cpu_s": round(cpu_seconds, 1),
        "square_arrays": len({dims for _, dims in arrays_of(text) if dims.count(seq_len) > 1}),
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in sizes},
        "cost": dataclasses.asdict(cost_of(text)),
    }


def _devices(request: Mapping[str, Any]) -> list:
    """The slice's devices, which need not exist; for a CPU plan or an estimate, devices of this process."""
    if request["topology"] is None:
        return jax.devices()[: request["devices"]]
    # libtpu assumes four chips per host unless told otherwise; a slice of one host may have fewer, or eight.
    sizes = [int(size) for size in request["topology"].partition(":")[2].split("x")]
    one = {"chips_per_host_bounds": (*sizes, 1, 1)[:3]} if request["hosts"] == 1 else {}
    config = {"chip_config_name": request["chip_config"]} if request["chip_config"] else {}
    return list(topologies.get_topology_desc(request["topology"], "tpu", **one, **config).devices)


def _on_one_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _uneven_bytes(frozen: Any, mesh: Mesh) -> int:
    """Count the bytes on one device that weights take because the mesh does not divide them evenly."""
    ways = math.prod(mesh.shape[axis] for axis in WEIGHT_AXES)
    uneven = [leaf for leaf in jax.tree.leaves(frozen) if leaf.sharding.mesh != mesh]
    return _on_one_device(uneven) - sum(leaf.size * leaf.dtype.itemsize for leaf in uneven) // ways


def counts_of(model, config: Mapping[str, Any], held_bytes: int | None = None) -> Counts:
    """Count the elements that a token is multiplied with; only the experts that a token is sent to count.

    Args:
        held_bytes: bytes of all weights as the run holds them; None for those that the base stores.
    """
    config = completed(family_of(config), text_of(config))
    in_blocks = IdentitySet(variable for block in model.chain.blocks for variable in block.variables)
    size = lambda variable: math.prod(variable.shape)  # noqa: E731
    # The stored variables are those that a tensor feeds, in the blocks too.
    ports = IdentitySet(port.variable for slot in model.slots for port in slot.ports)
    trained = IdentitySet(variable for slot in model.factor_slots for variable in slot.variables)
    nbytes = lambda variable: size(variable) * _itemsize(variable)  # noqa: E731
    shares, routing = mixtures.shares(model.chain.blocks), mixtures.routing(model.chain.blocks)
    multiplied = lambda v: size(v) * shares.get(v, 1) if len(v.shape) > 1 else 0  # noqa: E731
    # A token's widest activation is inside its experts: all of them, unless only the chosen ones are computed.
    kernels = ((v, share) for v, share in shares.items() if v in ports)
    of_experts = (v.shape[0] * v.shape[2] * (share if model.share < 1 else 1) for v, share in kernels)
    blocks = [v for v in ports if v in in_blocks]
    tables = [v for v in ports if v.path.rpartition("/")[2] in ("embeddings", "reverse_embeddings")]
    heads = [v for v in tables if v.path.endswith("reverse_embeddings")] or tables
    of_block = [sum(nbytes(v) for v in block.variables if v in ports) for block in model.chain.blocks]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    attends = [attention.layer_of(block) for block in model.chain.blocks if attention.attends(block)]
    in_attention = IdentitySet(v for layer in attends for v in layer.variables)
    settings = [attention.settings_of(block) for block in model.chain.blocks if attention.attends(block)]
    return Counts(
        blocks=int(sum(multiplied(v) for v in blocks)),
        head=size(heads[0]),
        lora=sum(math.prod(shape) for shape in model.adapter_shapes.values()),
        attention=tuple((config["num_attention_heads"], width, s.window) for s in settings),
        hidden=config["hidden_size"],
        layers=len(model.chain.blocks),
        steps=model.chain.steps,
        weights_bytes=sum(nbytes(v) for v in ports),
        held_bytes=held_bytes,
        blocks_bytes=sum(of_block),
        widest_bytes=max(of_block),
        intermediate=int(max([config.get("intermediate_size") or 4 * config["hidden_size"], *of_experts])),
        parameters=sum(size(v) for v in ports),
        share=model.share,
        idle=round(sum(size(v) * (1 - share) for v, share in shares.items() if v in trained)),
        experts_bytes=sum(nbytes(v) for v in shares if v in ports),
        experts=math.gcd(*(count for count, _ in routing)),
        sent=config["hidden_size"] * sum(chosen for _, chosen in routing),
        trains_weights=model.trains_weights,
        mixing=int(sum(multiplied(v) for v in blocks if v in in_attention)),
    )


def _itemsize(variable) -> int:
    return 2 if str(variable.dtype) in ("bfloat16", "float16") else np.dtype(str(variable.dtype)).itemsize

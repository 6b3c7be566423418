"""Merging an adapter into a checkpoint: ours beside peft's merge_and_unload + save_pretrained, and beside `cp -r`.

    make bench-export

A random llama of 1.14 GB in bfloat16, in three weight files; LoRA of rank 16 on q_proj and v_proj. Each contender runs
in a process of its own, and every written file is on the disk (fsync) when its clock stops. Imports are not counted.
Ours also writes the model card, hashes every file, and reads all of it back to prove it. Peak RSS is the process'.

Then memory against size: real merges of a quarter, a half and the whole, and what the head node does of an export of
Llama-3.1-70B (141 GB in 30 sparse files, which take no disk) when its parts are run by others: a stand-in for the
tasks gives each part a sparse file of the right header, so that nothing but the weights' own bytes is missing.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROUNDS = 3
ROOT = Path(os.environ.get("KITHARA_RAY_BENCH", Path(tempfile.gettempdir(), "kithara_ray_bench_export")))
SMALL = {"hidden": 2048, "inner": 5632, "kv": 512, "layers": 10, "vocabulary": 32000, "files": 3}
LLAMA_70B = {"hidden": 8192, "inner": 28672, "kv": 1024, "layers": 80, "vocabulary": 128256, "files": 30}
LLAMA_8B = {"hidden": 4096, "inner": 14336, "kv": 1024, "layers": 32, "vocabulary": 128256, "files": 4}
RANK = 16


def shapes_of(hidden: int, inner: int, kv: int, layers: int, vocabulary: int, **_) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{leaf}_proj.weight": (hidden, hidden) for leaf in ("q", "o")}
        shapes |= {f"{at}self_attn.{leaf}_proj.weight": (kv, hidden) for leaf in ("k", "v")}
        shapes |= {f"{at}mlp.{leaf}_proj.weight": (inner, hidden) for leaf in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{leaf}.weight": (hidden,) for leaf in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_base(directory: Path, size: dict, sparse: bool = False) -> None:
    """A checkpoint of a size, random or (sparse) all zeros without blocks on the disk."""
    import ml_dtypes
    import numpy as np
    from transformers import LlamaConfig

    from kithara_ray.hf.safetensors_file import pack_header, write_arrays

    directory.mkdir(parents=True)
    shapes, rng = shapes_of(**size), np.random.default_rng(0)
    per_file = -(-len(shapes) // size["files"])
    names, where = list(shapes), {}
    for number in range(size["files"]):
        file = f"model-{number + 1:05d}-of-{size['files']:05d}.safetensors"
        mine = names[number * per_file : (number + 1) * per_file]
        where |= dict.fromkeys(mine, file)
        if sparse:
            with (directory / file).open("wb") as stream:
                header = pack_header([(name, "BF16", shapes[name]) for name in mine], {"format": "pt"})
                stream.write(header)
                stream.truncate(len(header) + 2 * sum(int(np.prod(shapes[name])) for name in mine))
        else:
            arrays = {
                name: (rng.standard_normal(shapes[name], np.float32) * 0.02).astype(ml_dtypes.bfloat16) for name in mine
            }
            write_arrays(directory / file, arrays, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    heads = size["hidden"] // 128
    config = LlamaConfig(
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=heads,
        num_key_value_heads=size["kv"] // 128,
        vocab_size=size["vocabulary"],
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


def write_adapter(directory: Path, size: dict) -> None:
    import numpy as np

    from kithara_ray.hf.adapter import Adapter, LoraConfig

    rng, tensors = np.random.default_rng(1), {}
    for name, shape in shapes_of(**size).items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((RANK, shape[1]), np.float32) * 0.02
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((shape[0], RANK), np.float32) * 0.02
    Adapter(LoraConfig(r=RANK, lora_alpha=32), tensors).write(directory, "n")


def peak_mb() -> float:
    """Of this program: getrusage would also count what its parent held when it forked."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def gigabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.iterdir()) / 1e9


# ------------------------------------------------------------------------------------------------------- contenders


def ours(name: str = "base") -> dict:
    from kithara_ray.hf.adapter import Adapter
    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.hf.exports.export import Layout, export

    before, mark = peak_mb(), time.perf_counter()
    base, adapter = BaseCheckpoint.open(ROOT / name), Adapter.read(ROOT / f"{name}-adapter")
    export(base, adapter, str(ROOT / "out-ours"), Layout.MERGED, base_name="n")
    seconds = time.perf_counter() - mark
    return {"seconds": seconds, "peak_mb": peak_mb(), "imports_mb": before}


def peft() -> dict:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    mark = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(ROOT / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, ROOT / "base-adapter").merge_and_unload()
    merged.save_pretrained(ROOT / "out-peft")
    sync(ROOT / "out-peft")
    return {"seconds": time.perf_counter() - mark, "peak_mb": peak_mb()}


def copy() -> dict:
    mark = time.perf_counter()
    subprocess.run(["cp", "-r", str(ROOT / "base"), str(ROOT / "out-copy")], check=True)
    sync(ROOT / "out-copy")
    return {"seconds": time.perf_counter() - mark}


def head(name: str) -> dict:
    """What one process does for an export whose parts others run: its peak RSS, less the adapter it holds."""
    from kithara_ray.hf.adapter import Adapter
    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.hf.exports.export import Layout, export
    from kithara_ray.hf.exports.part import Written
    from kithara_ray.hf.safetensors_file import pack_header

    def stand_in(parts):
        for part in parts:
            infos = part.base.in_file_order()
            with Path(part.target, part.name).open("wb") as stream:
                header = pack_header([(i.name, i.dtype, i.shape) for i in infos], {"format": "pt"})
                stream.write(header)
                stream.truncate(len(header) + part.out_bytes)
            counts = {"untouched": 0, "merged": len(part.adapter.modules), "merged_and_changed": 0}
            digests = {info.name: bytes(32) for info in infos}
            yield Written(part.name, {"bytes": 0, "sha256": ""}, counts, digests)

    before = peak_mb()
    base, adapter = BaseCheckpoint.open(ROOT / name), Adapter.read(ROOT / f"{name}-adapter")
    held = sum(array.nbytes for array in adapter.tensors.values()) / 1e6
    read = peak_mb()
    export(base, adapter, str(ROOT / "out-head"), Layout.MERGED, base_name="n", write=stand_in)
    return {
        "gigabytes": sum(info.nbytes for info in base.tensors.values()) / 1e9,
        "adapter_mb": held,
        "imports_mb": before,
        "adapter_read_mb": read,
        "peak_mb": peak_mb(),
    }


def is_identical() -> bool:
    """Our merged tensors and peft's, bit by bit."""
    from kithara_ray.hf.checkpoint import BaseCheckpoint

    one, other = (BaseCheckpoint.open(ROOT / out) for out in ("out-ours", "out-peft"))
    assert one.names == other.names
    return all(one.view(name).tobytes() == other.view(name).tobytes() for name in one.names)


def clean(*names: str) -> None:
    for name in names:
        shutil.rmtree(ROOT / name, ignore_errors=True)


SIZES = {"quarter": SMALL | {"layers": 1, "files": 1}, "half": SMALL | {"layers": 4, "files": 2}, "base": SMALL}
HEADS = {"sparse_small": SMALL, "sparse_8b": LLAMA_8B, "sparse_70b": LLAMA_70B}


def prepare() -> dict:
    shutil.rmtree(ROOT, ignore_errors=True)
    for name, size in (SIZES | HEADS).items():
        write_base(ROOT / name, size, sparse=name in HEADS)
        write_adapter(ROOT / f"{name}-adapter", size)
    return {}


def main() -> None:
    if not ROOT.exists():
        common.run(__file__, "prepare")
    try:
        measure(SIZES, HEADS)
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)


def measure(sizes: dict, heads: dict) -> None:
    os.sync()
    results: dict[str, list[dict]] = {"ours": [], "peft": [], "copy": []}
    for number in range(ROUNDS):
        clean("out-ours", "out-peft", "out-copy")
        for name, rows in results.items():
            os.sync()  # what another has written is not paid for by the next
            rows.append(common.run(__file__, name))
            print(f"round {number + 1}/{ROUNDS} {name}: {rows[-1]}", file=sys.stderr)
    same = is_identical()
    clean("out-ours", "out-peft", "out-copy")
    grown = {}
    for name in sizes:
        grown[name] = {"gigabytes": gigabytes(ROOT / name), **common.run(__file__, "ours", name)}
        clean("out-ours")
    planned = {}
    for name in heads:
        planned[name] = common.run(__file__, "head", name)
        clean("out-head")

    def median(name: str, what: str) -> float:
        return common.statistics.median(row[what] for row in results[name])

    table = ["| merge of 1.14 GB, to disk | seconds | peak RSS, MB |", "|---|---|---|"]
    labels = {"ours": "kithara_ray", "peft": "peft `merge_and_unload`, `save_pretrained`", "copy": "`cp -r`"}
    for name, label in labels.items():
        peak = common.middle([row["peak_mb"] for row in results[name]]) if name != "copy" else ""
        table.append(f"| {label} | {common.middle([row['seconds'] for row in results[name]])} | {peak} |")
    ratios = {
        "time_over_peft": median("ours", "seconds") / median("peft", "seconds"),
        "time_over_copy": median("ours", "seconds") / median("copy", "seconds"),
        "peak_mb": median("ours", "peak_mb"),
    }
    table += ["", *(f"- {name.replace('_', ' ')}: {value:.2f}" for name, value in ratios.items())]
    table += [f"- bit-identical to peft's: {'yes' if same else 'NO'}", ""]
    table += ["| real merges of | peak RSS, MB |", "|---|---|"]
    table += [f"| {row['gigabytes']:.2f} GB | {row['peak_mb']:.0f} |" for row in grown.values()]
    table += ["", "| the head, for | adapter, MB | peak RSS, MB | of it imports, adapter |", "|---|---|---|---|"]
    for row in planned.values():
        columns = [f"{row['gigabytes']:.1f} GB", *(f"{row[key]:.0f}" for key in ("adapter_mb", "peak_mb"))]
        table.append(f"| {' | '.join(columns)} | {row['adapter_read_mb']:.0f} |")
    figures = {"results": results, "ratios": ratios, "identical": same, "grown": grown, "planned": planned}
    common.write("export", "make bench-export", table, figures)
    if not same:
        raise SystemExit("the merged tensors differ from peft's")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        main()
    else:
        contender = {"prepare": prepare, "ours": ours, "peft": peft, "copy": copy, "head": head}[sys.argv[1]]
        print(json.dumps(contender(*sys.argv[2:])))

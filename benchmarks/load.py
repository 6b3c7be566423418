"""Loading a base onto two hosts of two devices each: ours beside KerasHub's `from_preset` under `keras.distribution`.

    make bench-load

SmolLM2-135M in float32 (538 MB). Two processes meet over loopback, each with two CPU devices, and every weight is split
over all four. RSS grown is its peak minus what it was when all imports were done. Touched is what stays resident of the
file's mapping when no page is given back, in a run of its own, with the file cached in single pages.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common

BASE = "runs/SmolLM2-135M-Instruct"
HOSTS, DEVICES, ROUNDS = 2, 2, 3
ENV = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
}


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """Since `forget_peak`; the kernel's own high-water mark."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def mapped_mb(path: str) -> float:
    """Resident pages of a file in this process' mappings."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            ours = line.endswith(path)
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total * 1024 / 1e6


def cache_in_single_pages(path: Path) -> None:
    """Read a file into the page cache anew, a page at a time. Of the larger folios that writing it may leave, the
    kernel maps more than the page that is touched."""
    file, page = os.open(path, os.O_RDONLY), os.sysconf("SC_PAGE_SIZE")
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    for begin in range(0, os.fstat(file).st_size, page):
        os.pread(file, page, begin)
    os.close(file)


def ours(rank: int, address: str) -> dict:
    from kithara_ray.model import runtime

    runtime.prepare()
    import jax

    jax.distributed.initialize(address, HOSTS, rank)
    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.model.causal_lm import build
    from kithara_ray.sharding.mesh import make_mesh

    if "--touched" in sys.argv:
        BaseCheckpoint.forget_pages = lambda self: None
    import keras_hub  # noqa: F401

    forget_peak()
    before, mark = rss_mb(), time.perf_counter()
    base = BaseCheckpoint.open(BASE)
    frozen = build(base.config, None, make_mesh(), "float32").load(base)
    jax.block_until_ready(frozen)
    seconds = time.perf_counter() - mark
    assert not any(array.is_fully_addressable for array in frozen if array.size >= 2048)
    return {"seconds": seconds, "grown_mb": peak_mb() - before, "touched_mb": mapped_mb("model.safetensors")}


def kerashub(rank: int, address: str) -> dict:
    sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
    import keras

    keras.distribution.initialize(address, HOSTS, rank)
    import keras_hub

    mesh = keras.distribution.DeviceMesh((1, HOSTS * DEVICES), ("batch", "model"), keras.distribution.list_devices())
    layout = keras.distribution.LayoutMap(mesh)
    # One dim of every matrix, one that four devices divide.
    layout["token_embedding/embeddings"] = ("model", None)
    layout[".*(query|key|value)/kernel"] = ("model", None, None)
    layout[".*attention_output/kernel"] = (None, None, "model")
    layout[".*feedforward_(gate|intermediate)_dense/kernel"] = (None, "model")
    layout[".*feedforward_output_dense/kernel"] = ("model", None)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
    forget_peak()
    before, mark = rss_mb(), time.perf_counter()
    model = keras_hub.models.CausalLM.from_preset(BASE, preprocessor=None, dtype="float32")
    for variable in model.variables:
        variable.value.block_until_ready()
    seconds = time.perf_counter() - mark
    return {"seconds": seconds, "grown_mb": peak_mb() - before}


def group(name: str, *flags: str) -> dict:
    """Both hosts of one contender; the slower and the larger of the two counts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, name, address]
    started = [
        subprocess.Popen([*command, str(rank), *flags], env=os.environ | ENV, stdout=subprocess.PIPE, text=True)
        for rank in range(HOSTS)
    ]
    rows = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in started]
    return {key: max(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    sys.path.insert(0, "examples")
    from smollm2 import write_smollm2

    write_smollm2(BASE)
    file = Path(BASE) / "model.safetensors"
    size_mb = file.stat().st_size / 1e6
    results: dict[str, list[dict]] = {"ours": [], "kerashub": []}
    for number in range(ROUNDS):
        for name, rows in results.items():
            rows.append(group(name))
            print(f"round {number + 1}/{ROUNDS} {name}: {rows[-1]}", file=sys.stderr)
    cache_in_single_pages(file)
    touched = group("ours", "--touched")["touched_mb"]

    def values(name, what):
        return [row[what] for row in results[name]]

    table = ["| each of 2 hosts | seconds | RSS grown by MB |", "|---|---|---|"]
    for name, label in (("ours", "kithara_ray"), ("kerashub", "KerasHub `from_preset`, `keras.distribution`")):
        seconds, grown = (common.middle(values(name, what)) for what in ("seconds", "grown_mb"))
        table.append(f"| {label} | {seconds} | {grown} |")
    ratios = {
        "time_over_kerashub": statistics.median(values("ours", "seconds"))
        / statistics.median(values("kerashub", "seconds")),
        "touched_over_file": touched / size_mb,
        "rss_over_0.6_file_plus_100_mb": statistics.median(values("ours", "grown_mb")) / (0.6 * size_mb + 100),
    }
    table += ["", *(f"- {name.replace('_', ' ')}: {value:.2f}" for name, value in ratios.items())]
    table += [f"- the file: {size_mb:.0f} MB, of which each host touched {touched:.0f} MB"]
    common.write("load", "make bench-load", table, {"results": results, "touched_mb": touched, "ratios": ratios})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        main()
    else:
        contender = {"ours": ours, "kerashub": kerashub}[sys.argv[1]]
        print(json.dumps(contender(int(sys.argv[3]), sys.argv[2])))

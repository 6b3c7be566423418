"""What a run survives: real processes are killed, stopped and signalled while they train, save and evaluate.

    make faults                      all of it, 20 minutes
    python benchmarks/faults.py NAME ...          some, or "operations"; put into the table that is there

A tiny llama on two workers of two CPU devices, 16 steps of 8 rows, a checkpoint every 4. Each scenario is a driver in
a process of its own with a Ray of its own. What the ranks executed is in a log that they write themselves; from it come
the rows that were lost or doubled in the run as it counts, and the times: from the fault until the next loop begins
(Ray's polling, ending the old group, scheduling, imports), until its model is built, and until its first step
is done (ours). Without a group that begins again, the first of these is the time until a coordinator that was started
again has answered. A scenario has survived if it ends as the undisturbed run does, with its driver or the next one;
"disk full" must first end with an error that says so.

Last come the suite's tests that let a checkpoint or an export die or fail at each of its operations, one run for each.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import common

STEPS, EVERY, STEP_TIMEOUT_S = 16, 4, 15.0
ROOT = Path(__file__).parents[1]
MARK = "KITHARA_RAY_FAULTS"


@dataclass
class Fault:
    """One scenario.

    Attributes:
        where: a step's number, "eval", "save" (before the manifest) or "first" (before the first step is done).
        what: "kill", "stop" (SIGSTOP), "term" or "interrupt" (SIGINT).
        who: "rank 0", "rank 1", "node", "coordinator" or "driver".
        twice: the same to rank 0 two steps later.
        drivers: how many drivers it takes to the end.
        step_s: seconds by which a step is slowed down: what Ray takes long to notice must come before the run ends.
    """

    name: str
    what: str = "kill"
    who: str = "rank 1"
    where: str = "6"
    twice: bool = False
    drivers: int = 1
    step_s: float = 0.25
    failures: int = 3
    disk_kb: int | None = None
    expect: str | None = None


FAULTS = [
    Fault("undisturbed", what="nothing"),
    Fault("kill -9 of rank 0", who="rank 0"),
    Fault("kill -9 of rank 1"),
    Fault("kill -9 of a node's raylet", who="node", step_s=3.0),
    Fault("kill -9 of the coordinator", who="coordinator", step_s=1.0),
    Fault("kill -9 of the driver", who="driver", drivers=2),
    Fault("SIGSTOP of rank 1", what="stop"),
    Fault("SIGTERM to rank 1", what="term"),
    Fault("SIGINT to the driver", what="interrupt", who="driver", drivers=2, expect="KeyboardInterrupt"),
    Fault("two kills in a row", twice=True),
    Fault("kill -9 in an evaluation", where="eval"),
    Fault("kill -9 of rank 0 in a save", who="rank 0", where="save"),
    Fault("kill -9 in the first step", where="first"),
    Fault("disk full", what="nothing", disk_kb=40, drivers=2, failures=0, expect="No space left on device"),
]


# ------------------------------------------------------------------------------------------- in the workers' processes


def log(out: Path, **line) -> None:
    with (out / "log.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": time.time(), "pid": os.getpid(), **line}) + "\n")


def make_loop(out: str, fault: dict):
    """The workers' own loop, slowed down, that writes down what it does and meets its fault."""
    from loops import loop_with

    directory = Path(out)

    def begun(run):
        from kithara_ray.checkpoint import disk_format

        # When the loop did, which has imported since.
        log(directory, kind="begin", rank=run.rank, began=time.time() - run.log.phases["import"])
        commit, evaluate = disk_format.commit, run.evaluate

        def committing(*arguments):
            if fault["where"] == "save":
                meet(run, directory, fault)
            return commit(*arguments)

        def evaluating():
            if fault["where"] == "eval":
                meet(run, directory, fault)
            return evaluate()

        disk_format.commit, run.evaluate = committing, evaluating

    def built(run):
        log(directory, kind="built", rank=run.rank, step=run.number)

    def before_step(run):
        number = int(fault["where"]) if fault["where"].isdigit() else None
        if fault["where"] == "first" or run.number == number:
            meet(run, directory, fault)
        if fault["twice"] and run.number == number + 2 and (directory / "met-1-1").exists():
            meet(run, directory, fault, again=True)
        time.sleep(fault["step_s"])

    def after_step(run, metrics):
        import jax

        if run.rank == 0:
            jax.block_until_ready(metrics)
            rows = [int(row) for pack in run.data.order.batch(run.number - 1) for row in pack]
            log(directory, kind="step", rank=0, step=run.number, rows=rows)

    return loop_with(begun=begun, built=built, before_step=before_step, after_step=after_step)


def meet(run, directory: Path, fault: dict, again: bool = False) -> None:
    """The fault, once, on the rank that it is for; `again`: a kill of rank 0."""
    who = "rank 0" if again else fault["who"]
    rank = int(who[-1]) if who.startswith("rank") else 1 if who == "node" else 0
    once = directory / f"met-{2 if again else 1}-{run.rank}"
    if run.rank != rank or once.exists() or fault["what"] == "nothing":
        return
    once.touch()
    log(directory, kind="fault", rank=run.rank)
    if who.startswith("rank"):
        sent = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[fault["what"]]
        os.kill(os.getpid(), sent)
        if sent == signal.SIGTERM:
            from kithara_ray.orchestration.cluster.process_setup import terminated

            terminated.wait(30)
        return
    import ray

    if who == "coordinator":
        coordinator = run.spec.channel.coordinator
        pid = ray.get(coordinator.__ray_call__.remote(lambda self: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        threading.Thread(target=wait_for_answer, args=(coordinator, pid, directory), daemon=True).start()
    else:
        (directory / "now.writing").write_text(ray.get_runtime_context().get_node_id())
        (directory / "now.writing").rename(directory / "now")


def wait_for_answer(coordinator, dead: int, directory: Path) -> None:
    """Of a coordinator that is another process than the dead one."""
    import ray

    pid = dead
    while pid == dead:
        time.sleep(0.1)
        with contextlib.suppress(ray.exceptions.RayActorError):
            pid = ray.get(coordinator.__ray_call__.remote(lambda self: os.getpid()))
    log(directory, kind="answered")


# ------------------------------------------------------------------------------------------------------ in the driver


def driver(out: Path, fault: dict) -> None:
    """One driver's run to its end; writes the adapter and the history, or the error."""
    import keras
    import numpy as np
    import ray
    import tiny
    from loops import use
    from ray.cluster_utils import Cluster
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    import kithara_ray

    cluster = None
    if fault["who"] == "node":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        def wait_then_kill() -> None:
            while not (out / "now").exists():
                time.sleep(0.02)
            node = next(node for node in nodes if node.node_id == (out / "now").read_text())
            node.all_processes["raylet"][0].process.kill()

        threading.Thread(target=wait_then_kill, daemon=True).start()
    else:
        ray.init("local", num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    use(make_loop(str(out), fault))
    directory = str(out / "model")
    model = kithara_ray.KerasHubModel.from_preset(directory, lora_rank=4, lora_dropout=0.1, precision="float32")
    data = kithara_ray.SFTDataset(tiny.rows(22), tokenizer_handle=directory)
    resources = {"CPU": 1}
    trainer = kithara_ray.Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2),
        train_dataloader=kithara_ray.Dataloader(data, per_device_batch_size=2),
        eval_dataloader=kithara_ray.Dataloader(
            kithara_ray.SFTDataset(tiny.rows(5), tokenizer_handle=directory), per_device_batch_size=1
        ),
        eval_steps_interval=6,
        steps=STEPS,
        checkpointer=kithara_ray.Checkpointer(out / "checkpoints", save_interval_steps=EVERY, max_to_keep=2),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker=resources, placement_strategy="SPREAD"),
        run_config=RunConfig(
            name="run", storage_path=str(out / "runs"), failure_config=FailureConfig(max_failures=fault["failures"])
        ),
        cpu_devices_per_worker=2,
        mesh=kithara_ray.MeshShape(),  # weights cross processes
        step_timeout_s=STEP_TIMEOUT_S,
        progress=False,
    )
    result: dict = {}
    try:
        trained = trainer.train()
        result = {"losses": {row["step"]: row["loss"] for row in trained.history}, "stopped": trained.stopped}
        np.savez(out / "adapter.npz", **model.adapter)
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (out / "result.json").write_text(json.dumps(result))
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


# ------------------------------------------------------------------------------------------------------- the injector


def processes(mark: str) -> dict[int, str]:
    """The live processes that carry a mark in their environment: pid -> command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80].strip()
    return found


def orphans(mark: str, wait_s: float = 30.0) -> tuple[dict[int, str], float]:
    """What is left of a scenario's processes once its drivers have ended, and how long that took to settle."""
    started = time.monotonic()
    while (left := processes(mark)) and time.monotonic() - started < wait_s:
        time.sleep(0.25)
    took_s = time.monotonic() - started
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left, took_s


def run_driver(out: Path, fault: Fault, mark: str) -> tuple[dict, str]:
    (out / "result.json").unlink(missing_ok=True)
    env = os.environ | {
        MARK: mark,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks")]),
    }
    command = [sys.executable, __file__, "--driver", str(out), json.dumps(asdict(fault))]
    with (out / "driver.log").open("a") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
        deadline = time.monotonic() + 300
        injected = fault.who != "driver" or (out / "injected").exists()
        while process.poll() is None:
            if not injected and (out / "now").exists():
                process.send_signal({"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[fault.what])
                (out / "injected").touch()
                injected = True
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.02)
    text = (out / "result.json").read_text() if (out / "result.json").exists() else "{}"
    return json.loads(text), f"ended by signal {-process.returncode}" if process.returncode < 0 else ""


def scenario(fault: Fault, model: Path, base: Path) -> dict:
    out = base / fault.name.replace(" ", "-")
    out.mkdir()
    (out / "model").symlink_to(model)
    if fault.disk_kb:
        (out / "checkpoints").mkdir()
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={fault.disk_kb}k", "tmpfs", str(out / "checkpoints")]
        if subprocess.run(mounted, capture_output=True).returncode:
            return {"name": fault.name, "skipped": "a tmpfs cannot be mounted here; it needs root"}
    mark = f"{os.getpid()}-{out.name}"
    first, left, settled = {}, {}, 0.0
    started = time.time()
    for number in range(fault.drivers):
        result, how = run_driver(out, fault, mark)
        remains, settled_s = orphans(mark)
        left, settled = left | remains, max(settled, settled_s)
        if number == 0:
            first = {"error": result.get("error", ""), "how": how}
            if fault.disk_kb:
                subprocess.run(["mount", "-o", "remount,size=64m", str(out / "checkpoints")], check=True)
    row = {"name": fault.name, "wall_s": time.time() - started, "orphans": sorted(left.values()), "settled_s": settled}
    row |= {"first_error": first["error"], "error": result.get("error", ""), "losses": result.get("losses")}
    row |= figures([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    row |= stored(out / "checkpoints")
    row["adapter"] = str(out / "adapter.npz")
    row["expected"] = fault.expect is None or fault.expect in first["error"]
    if fault.disk_kb:
        subprocess.run(["umount", str(out / "checkpoints")], check=True)
    return row


def figures(lines: list[dict]) -> dict:
    """What the ranks' own log tells: steps and rows as they count, and the times of the recovery."""
    counts: dict[int, list] = {}
    executed = 0
    for line in lines:
        if line["kind"] == "built" and line["rank"] == 0:
            counts = {step: rows for step, rows in counts.items() if step <= line["step"]}
        elif line["kind"] == "step":
            executed += 1
            counts[line["step"]] = line["rows"]
    row = {"steps": sorted(counts), "rows": counts, "steps_lost": executed - len(counts)}
    faults = [line["time"] for line in lines if line["kind"] == "fault"]
    if faults:

        def first(kind: str, since: float) -> dict | None:
            after = (line for line in lines if line["kind"] == kind and line["time"] > since)
            return min(after, key=lambda line: line["time"], default=None)

        # A rank that lives on may have been built a moment after another's fault.
        begin = first("begin", faults[-1])
        built = begin and first("built", begin["time"])
        step = built and first("step", built["time"])
        if answered := first("answered", faults[-1]):
            row["group_s"] = answered["time"] - faults[-1]
        if step:
            row["group_s"] = begin["began"] - faults[-1]
            row |= {"build_s": built["time"] - begin["began"], "step_s": step["time"] - built["time"]}
    return row


def stored(directory: Path) -> dict:
    """Whether what is stored is whole, and what else lies there."""
    from kithara_ray.checkpoint import disk_format
    from kithara_ray.errors import CheckpointError
    from kithara_ray.storage.places import Place

    place, torn = Place(str(directory)), []
    for name in disk_format.committed(place):
        try:
            disk_format.Checkpoint.open(place, name).verify()
        except CheckpointError as error:
            torn.append(str(error))
    return {"torn": torn, "litter": disk_format.unfinished(place) + [p.name for p in directory.glob(".*")]}


def judge(row: dict, reference: dict) -> dict:
    """Against the undisturbed run."""
    import numpy as np

    if "skipped" in row:
        return row
    same_rows = row["rows"] == reference["rows"]
    seen = [number for rows in row["rows"].values() for number in rows]
    wanted = [number for rows in reference["rows"].values() for number in rows]
    row["rows_lost"] = sum(max(0, wanted.count(number) - seen.count(number)) for number in set(wanted))
    row["rows_doubled"] = sum(max(0, seen.count(number) - wanted.count(number)) for number in set(seen))
    row["difference"] = None
    if os.path.exists(row["adapter"]):
        ours, theirs = np.load(row["adapter"]), np.load(reference["adapter"])
        row["difference"] = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs.files)
    same = row["difference"] is not None and row["difference"] <= 1e-6 and row["losses"] == reference["losses"]
    clean = row["expected"] and not row["torn"] and row["steps_lost"] <= EVERY + 1
    row["survived"] = bool(same and same_rows and clean)
    return row


def show(rows: list[dict]) -> list[str]:
    head = "| injected | survived | steps lost | rows lost / doubled | adapter differs by | fault to next loop s "
    head += "| build s | first step s | torn | orphans |"
    lines = [head, "|---" * 10 + "|"] if len(rows) > 1 else []
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['name']} | not run: {row['skipped']} |" + " |" * 8)
            continue
        times = " | ".join(f"{row[key]:.1f}" if key in row else "-" for key in ("group_s", "build_s", "step_s"))
        difference = "-" if row["difference"] is None else f"{row['difference']:.0e}" if row["difference"] else "0"
        lines.append(
            f"| {row['name']} | {'yes' if row['survived'] else 'NO: ' + (row['error'] or 'see the JSON')} "
            f"| {row['steps_lost']} | {row['rows_lost']} / {row['rows_doubled']} | {difference} | {times} "
            f"| {len(row['torn'])} | {len(row['orphans'])} |"
        )
    return lines


def operations(base: Path) -> list[dict]:
    """What the suite's tests of each operation count, a row a test."""
    report = base / "operations.xml"
    files = ["tests/checkpoint/test_checkpoint_faults.py", "tests/hf/test_hf_stores.py", "tests/hf/test_hf_hub.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "at_every",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
        *files,
    ]
    subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            counted = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
            broken = [name for name in ("failure", "error") if case.find(name) is not None]
            rows.append(
                {"test": case.get("name"), "operations": int(counted.get("operations", 0)), "survived": not broken}
            )
    return rows


def show_operations(rows: list[dict]) -> list[str]:
    head = ["", "| at each operation of its own | runs | survived |", "|---|---|---|"]
    return head + [f"| `{r['test']}` | {r['operations']} | {'yes' if r['survived'] else 'NO'} |" for r in rows]


def write(rows: list[dict], each: list[dict], into: bool) -> None:
    """The table; `into` the one that is there, rows of the same name are replaced."""
    if into:
        before = json.loads((common.HERE / "results" / "faults.json").read_text())
        new = {row["name"]: row for row in rows}
        rows, each = [new.get(row["name"], row) for row in before["faults"]], each or before["operations"]
    figures = {"steps": STEPS, "save_interval": EVERY, "faults": rows, "operations": each}
    common.write("faults", "make faults", show(rows) + show_operations(each), figures)


def main(names: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import tiny

    chosen = [fault for fault in FAULTS if not names or fault.name in names or fault.name == "undisturbed"]
    base = Path(tempfile.mkdtemp(prefix="kithara_ray_faults_"))
    try:
        model = tiny.write_model(base / "tiny", "llama")
        rows: list[dict] = []
        for fault in chosen:
            row = scenario(fault, model, base)
            rows.append(judge(row, rows[0] if rows else row))
            print(show(rows[-1:])[-1], file=sys.stderr)
            if not row.get("survived", True):
                print((base / fault.name.replace(" ", "-") / "driver.log").read_text()[-3000:], file=sys.stderr)
        each = operations(base) if not names or "operations" in names else []
        for row in rows:
            row.pop("rows", None), row.pop("adapter", None)
        write(rows, each, bool(names))
        if not all(row.get("survived", True) and not row.get("orphans") for row in rows + each):
            raise SystemExit("not everything was survived")
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        driver(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main(sys.argv[1:])

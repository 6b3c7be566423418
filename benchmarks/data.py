"""Rows to packed tokens: ours beside Hugging Face `datasets.map` + TRL's packing, and a dataset larger than the store.

    make bench-data

1. Prompts and answers of PyPI's chatterbot-corpus through SmolLM2's chat template, 40 times over, from a JSONL file, to
   ids, loss masks and packs of 2,048 tokens, on two cores: tokens/s. `datasets.map` encodes batches in two processes,
   as fast as its users can have it, builds labels, and TRL's `pack_dataset` packs. Ours runs on a local Ray of two
   CPUs, from the start of tokenising to the plan of an epoch's packs. Start-up (imports, Ray) counts for neither; both
   have handled a few rows before.
2. A dataset of four times the object store, tokenised and then read in a shuffled epoch by two workers: the peak memory
   of the driver and of each worker, shared memory that is mapped included, beside the dataset's size.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

BASE = "runs/SmolLM2-135M-Instruct"
MAX_LEN, COPIES, ROUNDS = 2048, 40, 3
STORE_BYTES, TIMES = 100 * 2**20, 4
PACKAGES = ("trl", "datasets", "chatterbot-corpus")


def write_rows(path: Path, copies: int) -> None:
    from sft import pairs

    with path.open("w") as file:
        for copy in range(copies):
            for row in pairs_once(pairs):
                row = dict(row, answer=f"{copy} {row['answer']}")
                file.write(json.dumps(row) + "\n")


def pairs_once(pairs, kept=[]):  # noqa: B006
    kept[:] = kept or pairs()
    return kept


def start_ray(**how) -> None:
    import ray

    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment}, **how)


def ours(path: str) -> None:
    from kithara_ray import SFTDataset
    from kithara_ray.orchestration.data.pipeline import tokenize
    from kithara_ray.sft.batches.order import PackedOrder

    start_ray()
    few = [json.loads(line) for line, _ in zip(open(path), range(5000), strict=False)]
    tokenize(SFTDataset(few, tokenizer_handle=BASE, max_seq_len=MAX_LEN))  # workers are up, the tokenizer loaded
    mark = time.perf_counter()
    store = tokenize(SFTDataset(path, tokenizer_handle=BASE, max_seq_len=MAX_LEN))
    tokenized = time.perf_counter()
    room = store.packed_shape("cpu", MAX_LEN)
    order = PackedOrder(
        lengths=store.lengths, trained=store.trained, seq_len=room[0], predictions=room[1], batch_rows=1
    )
    packs = order.steps_of(0)
    done = time.perf_counter()
    tokens = int(store.lengths.sum())
    print(json.dumps({
        "tokens_per_s": tokens / (done - mark), "tokens": tokens, "tokenize_s": tokenized - mark,
        "pack_s": done - tokenized, "filled": tokens / (packs * MAX_LEN),
    }))  # fmt: skip


def theirs(path: str) -> None:
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def encode(batch):
        prompts = tokenizer(batch["prompt"], add_special_tokens=False)["input_ids"]
        texts = [p + a for p, a in zip(batch["prompt"], batch["answer"], strict=True)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        labels = [[-100] * len(p) + i[len(p) :] for p, i in zip(prompts, ids, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def run(source):
        rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
        rows = rows.map(encode, batched=True, num_proc=2, remove_columns=rows.column_names)
        return rows, pack_dataset(rows.shuffle(seed=0), MAX_LEN, map_kwargs={"num_proc": 2})

    with tempfile.TemporaryDirectory() as cache:
        few = Path(cache) / "few.jsonl"
        few.write_text("".join(line for line, _ in zip(open(path), range(2000), strict=False)))
        run(str(few))
        mark = time.perf_counter()
        rows, packed = run(path)
        seconds = time.perf_counter() - mark
        tokens = sum(map(len, rows["input_ids"]))
    print(json.dumps({"tokens_per_s": tokens / seconds, "tokens": tokens, "filled": tokens / (len(packed) * MAX_LEN)}))


def large(path: str) -> None:
    """A text dataset whose tokens take TIMES the object store, and two workers that read a shuffled epoch of it."""
    import ray

    from kithara_ray import TextCompletionDataset
    from kithara_ray.orchestration.data.pipeline import tokenize
    from kithara_ray.sft.batches.order import BatchOrder

    start_ray(object_store_memory=STORE_BYTES)
    before = common.peak_rss_mb()
    mark = time.perf_counter()
    store = tokenize(TextCompletionDataset(path, tokenizer_handle=BASE, max_seq_len=MAX_LEN))
    tokenized = time.perf_counter() - mark
    store_bytes = int(store.lengths.sum()) * 5
    order = BatchOrder(size=store.num_rows, batch_rows=16, shuffle_rows=8192)

    @ray.remote(num_cpus=1)
    def read(store, order, host: int) -> tuple[int, float, float]:
        from kithara_ray.orchestration.data.token_rows import Rows

        before = common.peak_rss_mb()
        rows, tokens = Rows(store), 0
        for step in range(order.steps_of(0)):
            tokens += sum(len(rows.row(int(row)).token_ids) for pack in order.batch(step)[host::2] for row in pack)
        return tokens, before, common.peak_rss_mb()

    mark = time.perf_counter()
    shared = ray.put(store)
    done = ray.get([read.remote(shared, order, host) for host in range(2)])
    seconds = time.perf_counter() - mark
    assert sum(tokens for tokens, *_ in done) == int(store.lengths.sum())
    spilled = sum(f.stat().st_size for f in Path("/tmp/ray/session_latest").rglob("ray_spilled_objects_*/*"))
    print(json.dumps({
        "dataset_mb": store_bytes / 2**20, "store_mb": STORE_BYTES / 2**20, "tokenize_s": tokenized,
        "epoch_s": seconds, "tokens_per_s": int(store.lengths.sum()) / seconds, "driver_peak_mb": common.peak_rss_mb(),
        "worker_peak_mb": max(mb for *_, mb in done), "worker_before_mb": max(mb for _, mb, _ in done),
        "driver_before_mb": before, "spilled_mb": spilled / 2**20,
    }))  # fmt: skip


def write_text(path: Path) -> None:
    """Text of TIMES the object store in tokens of 5 bytes (id and mask): real sentences in ever new order."""
    from sft import pairs

    sentences = [row["answer"].removesuffix("<|im_end|>") for row in pairs()]
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(TIMES * STORE_BYTES // 5 // 600):
            file.write(json.dumps({"text": " ".join(rng.choice(sentences, 62))}) + "\n")


def main() -> None:
    sys.path.insert(0, "examples")
    from smollm2 import write_smollm2

    write_smollm2(BASE)
    with tempfile.TemporaryDirectory() as directory:
        rows, text = Path(directory) / "rows.jsonl", Path(directory) / "text.jsonl"
        write_rows(rows, COPIES)
        results: dict[str, list[dict]] = {"ours": [], "theirs": []}
        for number in range(ROUNDS):
            for name, found in results.items():
                found.append(common.run(__file__, name, str(rows)))
                print(f"round {number + 1}/{ROUNDS} {name}: {found[-1]}", file=sys.stderr)
        write_text(text)
        beyond = common.run(__file__, "large", str(text))
    labels = {"ours": "kithara_ray", "theirs": "datasets.map + TRL `pack_dataset`"}
    table = ["| | tokenised and packed tokens/s | filled |", "|---|---|---|"]
    for name, label in labels.items():
        speed = common.middle([row["tokens_per_s"] for row in results[name]])
        table.append(f"| {label} | {speed} | {results[name][0]['filled']:.1%} |")
    ratio = statistics.median(r["tokens_per_s"] for r in results["ours"]) / statistics.median(
        r["tokens_per_s"] for r in results["theirs"]
    )
    table += ["", f"- speed over datasets + TRL: {ratio:.2f}"]
    table += [f"- of a dataset of {beyond['dataset_mb']:.0f} MB of tokens and an object store of "
              f"{beyond['store_mb']:.0f} MB, two workers read a shuffled epoch in {beyond['epoch_s']:.0f} s "
              f"({beyond['tokens_per_s']:.0f} tokens/s); the peak of each is {beyond['worker_peak_mb']:.0f} MB, shared "
              f"memory included, of which {beyond['worker_before_mb']:.0f} MB are there before the first row; the "
              f"driver's is {beyond['driver_peak_mb']:.0f} MB, {beyond['driver_before_mb']:.0f} MB before; tokenised "
              f"in {beyond['tokenize_s']:.0f} s"]  # fmt: skip
    common.write("data", "make bench-data", table, {"results": results, "beyond": beyond, "ratio": ratio}, PACKAGES)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        main()
    else:
        {"ours": ours, "theirs": theirs, "large": large}[sys.argv[1]](sys.argv[2])

"""The table of test_bad_input_table.py: what a user gets wrong, and what the message says."""

import bad_files
import tiny
from bad_space import CASES, Space, case, setting, text

__all__ = ["CASES", "ON_THE_CLUSTER", "Space", "bad_files"]

# --- configuration ---------------------------------------------------------------------------------------------------

text("an empty file", "expected sections such as 'model:', found nothing", "")
text("a list", "found a list", "- model")
text("half a file", "not valid YAML", "model: {preset_handle: [")
text("a key twice", "'model' is given twice, first in line 1", "model: {}\nmodel: {}")
text("a Python object", "the tag .*python.* is not supported", "model: !!python/object/apply:os.system [true]")
text("aliases without end", "values once its aliases are followed", "a: &a [*a, *a]\nmodel: *a")
text("not UTF-8 nor YAML", "not valid YAML", "\x01\x02")
setting("a misspelt key", "model.lora_rnk: no such key; did you mean 'lora_rank'", "model.lora_rnk", 3)
setting("a misspelt section", "trianer: no such key; did you mean 'trainer'", "trianer", {})
setting("a rank in words", "lora_rank: should be a valid integer, got '16'", "model.lora_rank", "16")
setting("rank 0", "lora_rank must be >= 1, got 0", "model.lora_rank", 0)
setting("a negative alpha", "lora_alpha must be finite and > 0", "model.lora_alpha", -1.0)
setting("dropout of all", r"lora_dropout must be in \[0, 1\)", "model.lora_dropout", 1.0)
setting("no such target", "target_modules: 'query' matches no linear", "model.target_modules", ["query"])
setting("a target twice over", r"\[\] is empty|target_modules", "model.target_modules", [])
setting("a pattern that is none", "rank_pattern: '\\(' is not a regular", "model.rank_pattern", {"(": 2})
setting("a precision unheard of", "precision must be one of", "model.precision", "int3")
setting("learning rate 0", "learning_rate: should be greater than 0", "optimizer.learning_rate", 0)
setting("learning rate nan", "learning_rate: should be a valid number", "optimizer.learning_rate", float("nan"))
setting("an optimizer unheard of", "optimizer.name: should be 'AdamW'", "optimizer.name", "AdamWW")
setting("a setting of another optimizer", "AdamW has no such setting", "optimizer.momentum", 0.9)
setting("steps and epochs", "one of steps and epochs, got steps=1 and epochs=2", "trainer.epochs", 2)
setting("no steps", "steps must be an integer >= 1, got 0", "trainer.steps", 0)
setting("an interval of 0", "log_steps_interval must be an integer >= 1", "trainer.log_steps_interval", 0)
setting("remat", "remat must be one of auto, block, attention", "trainer.remat", "all")
setting("a batch of 0", "per_device_batch_size must be", "train_dataloader.per_device_batch_size", 0)
setting("a GPU", "use_gpu: cannot be given in YAML here", "scaling_config.use_gpu", True)
setting("a mesh of nothing", "mesh axes must be >= 1", "trainer.mesh", {"data": 0})
setting("a mesh that does not fit", "data=3 .* does not fit 1 devices", "trainer.mesh", {"data": 3})
setting(
    "checkpoints never",
    "save_interval_steps must be",
    "trainer.checkpointer",
    {"checkpoint_dir": "/x", "save_interval_steps": 0},
)
setting("an export without a place", "exports.0.output_dir: is missing", "exports", [{"dtype": "auto"}])


@case("a schedule longer than the run", "a cosine schedule needs total_steps > warmup_steps=5, got 1")
def _(space):
    space.config["optimizer"]["schedule"] = {"name": "cosine", "warmup_steps": 5}


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(name: str, message: str, *given: dict) -> None:
    CASES[name] = (lambda space: space.rows(*given), message)


GOOD = tiny.rows(2)
rows(
    "a missing column",
    r"line 1 of \S+: no column 'prompt', found 'question', 'answer'",
    {"question": "a", "answer": "b"},
)
rows("a null", r"line 3 of \S+: column 'answer' is null", *GOOD, {"prompt": "a", "answer": None})
rows("an empty answer", r"line 3 of \S+: column 'answer' is empty", *GOOD, {"prompt": "a", "answer": ""})
rows("a blank answer", r"line 3 of \S+: column 'answer' is blank", *GOOD, {"prompt": "a", "answer": " \n"})
rows("a number", r"line 1 of \S+: column 'answer' is int, not text", {"prompt": "a", "answer": 3})
rows("a list in a column", r"line 1 of \S+: column 'prompt' is list, not text", {"prompt": ["a"], "answer": "b"})
rows(
    "prompts that fill it",
    "3 were dropped because truncation left nothing",
    *[{"prompt": "one " * 99, "answer": "b"}] * 3,
)
rows("no rows", "the dataset is empty|cannot be read")
setting("rows that are not there", "no such file", "DATA.source", "/nowhere/x.jsonl")
setting("a format unheard of", "unknown extension '.pdf'", "DATA.source", "/x.pdf")
setting(
    "a column of another name",
    "maps 'question', but the expected",
    "DATA.column_mapping",
    {"question": "prompt"},
)
setting("a column that is not there", "no column 'q', found 'prompt', 'answer'", "DATA.column_mapping", {"prompt": "q"})
setting("rows of one token", "max_seq_len must be an integer >= 2, got 1", "DATA.max_seq_len", 1)
setting("bad rows ignored", "on_bad_row must be one of", "DATA.on_bad_row", "ignore")
setting("a dataset unheard of", "type must be one of", "DATA.type", "RLDataset")


@case("rows that are not JSON", r"line 1 of \S+bad\.jsonl.* not JSON")
def _(space):
    space.dataset["source"] = space.file("bad.jsonl", "{not json\n")


@case("a parquet file that is none", r"bad\.parquet")
def _(space):
    space.dataset["source"] = space.file("bad.parquet", b"PAR1" + bytes(40))


@case("a CSV with other columns", "no column 'prompt', found 'a', 'b'")
def _(space):
    space.dataset["source"] = space.file("rows.csv", "a,b\n1,2\n")


@case("text of another column", "no column 'text', found 'prompt', 'answer'")
def _(space):
    space.dataset["type"] = "TextCompletionDataset"


# --- destination -----------------------------------------------------------------------------------------------------


def export(name: str, message: str, **arguments) -> None:
    CASES[name] = (lambda space: space.config.update(exports=[arguments]), message)


export("a destination in the way of the system", "/proc/x: /proc cannot be written", output_dir="/proc/x")
export("a hub out of reach as a destination", "hf://org/name: it cannot be read", output_dir="hf://org/name")
export("a destination unheard of", "no filesystem for it", output_dir="nope://bucket/x")
export("a dtype unheard of", "dtype", output_dir="/tmp/never", dtype="float12")
export("a size of no unit", "max_shard_size must be bytes or text", output_dir="/tmp/never", max_shard_size="5 beans")
export(
    "logits of an adapter",
    "check_logits compares a merged model .* writes the adapter separately",
    output_dir="/tmp/never",
    only_save_adapters=True,
    check_logits=True,
)
export("logits of a store", "check_logits .* memory://b/x is a URL", output_dir="memory://b/x", check_logits=True)
setting("a run that cannot be written", "/proc/runs.*cannot be written", "run_config.storage_path", "/proc/runs")
setting(
    "checkpoints that cannot be written",
    "/proc/c.*cannot be written",
    "trainer.checkpointer",
    {"checkpoint_dir": "/proc/c"},
)


@case("a destination that is full of something", "exists and is not empty")
def _(space):
    (space.root / "out" / "merged").mkdir(parents=True)
    (space.root / "out" / "merged" / "mine.txt").write_text("mine")


@case("a destination that is a file", "exists and is a file")
def _(space):
    (space.root / "out").mkdir()
    (space.root / "out" / "merged").write_text("mine")


@case("a destination under a file", "cannot be written|is a file|Not a directory")
def _(space):
    (space.root / "out").write_text("mine")


@case("two exports to one place", "give each a directory of its own")
def _(space):
    space.config["exports"] *= 2


@case("an export inside another", "give each a directory of its own")
def _(space):
    space.config["exports"] += [
        {"output_dir": str(space.root / "out" / "merged" / "adapter"), "only_save_adapters": True}
    ]


# --- cluster ---------------------------------------------------------------------------------------------------------

setting("no workers", "num_workers=0", "scaling_config.num_workers", 0)
setting("too many workers", r"can hold \d of 64 workers", "scaling_config.num_workers", 64)
setting("a resource that nobody has", "huge_disk: 2", "scaling_config.resources_per_worker", {"CPU": 1, "huge_disk": 2})
setting("a TPU of no shape", "topology", "scaling_config", {"use_tpu": True, "num_workers": 2})
setting(
    "a TPU slice that is not there",
    "the cluster has no 'TPU-v4-16-head'",
    "scaling_config",
    {"use_tpu": True, "num_workers": 2, "topology": "2x2x2", "accelerator_type": "TPU-V4"},
)
setting("a placement unheard of", "placement_strategy|PACKED", "scaling_config.placement_strategy", "PACKED")
setting(
    "TPUs without Ray's knowing",
    "no node has a TPU",
    "run_config.worker_runtime_env",
    {"env_vars": {"JAX_PLATFORMS": "tpu"}},
)
setting("no CPU devices", "cpu_devices_per_worker must be an integer >= 1", "trainer.cpu_devices_per_worker", 0)

# The cases that are refused after Ray has started: the nodes look at rows, tokenizers, destinations and resources.
ON_THE_CLUSTER = (
    "a mesh that does not fit",
    "a missing column",
    "a null",
    "an empty answer",
    "a blank answer",
    "a number",
    "a list in a column",
    "prompts that fill it",
    "no rows",
    "rows that are not there",
    "a format unheard of",
    "a column that is not there",
    "rows that are not JSON",
    "a parquet file that is none",
    "a CSV with other columns",
    "text of another column",
    "a tokenizer that is not there",
    "no tokenizer files",
    "a tokenizer file cut short",
    "a tokenizer that ends nothing",
    "a destination in the way of the system",
    "a hub out of reach as a destination",
    "a destination unheard of",
    "a dtype unheard of",
    "a size of no unit",
    "logits of an adapter",
    "logits of a store",
    "a run that cannot be written",
    "checkpoints that cannot be written",
    "a destination that is full of something",
    "a destination that is a file",
    "a destination under a file",
    "two exports to one place",
    "an export inside another",
    "too many workers",
    "a resource that nobody has",
    "a TPU slice that is not there",
    "a placement unheard of",
    "TPUs without Ray's knowing",
)

"""A run's files as a run leaves them, for the tests of its page."""

import math

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def run_json(status: str = "finished", **more) -> dict:
    return {
        "manifest_version": 1,
        "status": status,
        "started": "2026-11-24T08:00:00Z",
        "ended": "2026-11-24T08:42:10Z",
        "versions": {"ray": "2.60.0", "jax": "0.10.2", "keras": "3.15.1", "kithara_ray": "0.1.0"},
        "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "environment": {"JAX_PLATFORMS": "tpu", "HF_TOKEN": "***"},
        "base": {"name": "google/gemma-2-2b", "revision": None, "fingerprint": "7f" * 16, "model_type": "gemma2"},
        "data": {
            "train": {
                "rows": 51760,
                "tokens": 6_412_008,
                "trained_tokens": 2_950_112,
                "lengths": {"min": 18, "median": 96, "p95": 311, "max": 1024},
                "fingerprint": "ab" * 16,
            },
            "eval": {"rows": 512, "tokens": 64_100, "trained_tokens": 30_002, "fingerprint": "cd" * 16},
        },
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1, "platform": "tpu", "devices": 16, "hosts": 4},
        "settings": {
            "model": {"preset_handle": "hf://google/gemma-2-2b", "lora": {"r": 16, "lora_alpha": 32}},
            "optimizer": {"class_name": "AdamW", "config": {"learning_rate": 2e-4}},
            "trainer": {"steps": 1200, "seed": 0},
            "run_config": {"name": "gemma-2-2b-alpaca", "storage_path": "gs://bucket/runs"},
        },
        "result": {"path": "gs://bucket/runs/gemma-2-2b-alpaca", "stopped": "steps"},
        **more,
    }


def steps(count: int, every: int = 1) -> list[dict]:
    """A loss that falls and wobbles; figures of a TPU."""
    rows = []
    for step in range(every, count + 1, every):
        wave = math.sin(step * 1.7) + math.sin(step * 0.37)
        rows.append(
            {
                "kind": "step",
                "step": step,
                "loss": 0.9 + 1.4 * math.exp(-step / 160) + 0.05 * wave,
                "learning_rate": 2e-4 * min(step / 36, 0.5 + 0.5 * math.cos(math.pi * step / count)),
                "grad_norm": 0.6 + 0.5 * math.exp(-step / 80) + 0.06 * wave,
                "tokens_per_s": 61_000 + 1_500 * wave,
                "step_time_s": 1.06 - 0.02 * wave,
                "input_wait_s": 0.004 + 0.001 * abs(wave),
                "mfu": 0.31 + 0.01 * wave,
                "hbm_bytes": 9_600_000_000,
                "hbm_limit_bytes": 16_911_433_728,
                "epoch": step / 400,
            }
        )
    return rows


def history(count: int = 1200, **more) -> dict:
    phases = {
        "connect": 0.8,
        "check": 2.9,
        "tokenize": 21.3,
        "schedule": 4.2,
        "import": 8.9,
        "fetch": 31.0,
        "build": 3.1,
        "load": 5.4,
    }
    phases |= {"compare": 0.6, "compile": 48.0}
    beside = {"tokenizer": (0.9, 2.7), "imports": (26.1, 29.0)}
    begun = {"kind": "started", "total_steps": count, "trainable": 3_194_880, "parameters": 2_617_536_000}
    evaluations = [
        {"kind": "eval", "step": step, "eval_loss": 1.0 + 1.2 * math.exp(-step / 170), "eval_perplexity": 2.9}
        for step in range(100, count + 1, 100)
    ]
    events = [
        {**begun, "phases": phases, "beside": beside},
        {"kind": "first_step", "seconds": 2.4},
        *steps(count),
        *evaluations,
    ]
    samples = [
        {
            "prompt": "Give three tips for staying healthy.",
            "before": "Give three tips for staying healthy. Give three tips for staying healthy. Give three",
            "after": "1. Eat a balanced diet of vegetables and whole grains.\n2. Walk every day.\n3. Sleep well.",
        },
        {"prompt": "Name the capital of France.", "before": "Name the capital of", "after": "Paris."},
    ]
    export = {
        "path": "gs://bucket/merged",
        "layout": "merged",
        "bytes": 5_228_000_000,
        "seconds": 61.0,
        "checks": [
            "checkpoint reopened; untouched tensors equal the base's bit by bit",
            "sampled rows of every merged tensor equal W + scale * B @ A in float64 up to rounding",
        ],
        "notes": ["generation_config.json ends sequences at <end_of_turn>"],
    }
    return {"events": events, "samples": samples, "exports": [export], **more}


PLAN = {
    "slice": "v5e-16",
    "hbm_bytes_per_chip": {"total": 9_214_000_000},
    "step_time_s_bound": 0.71,
    "tokens_per_s_bound": 92_000.0,
    "mfu_bound": 0.47,
}

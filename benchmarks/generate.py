"""Greedy decoding beside transformers' batched `generate`: tokens a second, memory, and the first answer.

    make bench-generate

SmolLM2-135M, float32. 64 prompts, each through the model's chat template, are continued by 64 tokens each; no token
ends a row, so every contender computes the same 4,096. The first call compiles or warms up and is timed by itself, as
"first call"; the second is the measured one. "First answer" is a fresh process that answers one chat with 32 tokens,
from the first import to the text. Every contender runs in a process of its own, in turn. Ours keeps its programs on
disk, as `generate` does: the first of the rounds may compile, the later ones do not.
"""

import json
import statistics
import sys
import time

import common

PROMPTS, NEW, CHAT, ROUNDS = 64, 64, 32, 3
BASE = "runs/SmolLM2-135M-Instruct"
SUBJECTS = ("rivers", "bread", "the moon", "a lighthouse", "small numbers", "old maps", "a violin", "the tides")
ASKED = ("Tell me about", "Write two sentences on", "Why do people like", "List three facts about")
STYLES = ("", " Be brief.")


def chats() -> list[str]:
    """The prompts: every combination of the words above."""
    return [f"{ask} {subject}.{style}" for subject in SUBJECTS for ask in ASKED for style in STYLES]


def rendered(tokenizer, questions: list[str]) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]


class Ours:
    def __init__(self):
        sys.modules["torch"] = None  # ours needs none, and transformers' tokenizers import it where it is installed
        from kithara_ray.model import runtime

        runtime.prepare()
        runtime.keep_compiled("cpu")
        from kithara_ray.hf.checkpoint import BaseCheckpoint
        from kithara_ray.model.causal_lm import build
        from kithara_ray.model.generate import decoder_of
        from kithara_ray.sft.tokens.tokenizer import load_tokenizer
        from kithara_ray.sharding.mesh import make_mesh

        self.tokenizer = load_tokenizer(BASE)
        base = BaseCheckpoint.open(BASE)
        model = build(base.config, None, make_mesh(), "float32", scan=False)
        self._decoder = decoder_of(model, {}, model.load(base))

    def __call__(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        rows = self._decoder.greedy(prompts, longest + new, ())
        return [row[len(prompt) : len(prompt) + new] for row, prompt in zip(rows, prompts, strict=True)]


class Transformers:
    def __init__(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self._model = AutoModelForCausalLM.from_pretrained(BASE).eval()
        self._model.generation_config.eos_token_id = None

    def __call__(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return out[:, longest:].tolist()


CONTENDERS = {"ours": Ours, "transformers": Transformers}


def many(name: str) -> None:
    contender = CONTENDERS[name]()
    prompts = rendered(contender.tokenizer, chats())
    assert len(prompts) == PROMPTS
    seconds = []
    for _ in range(2):
        mark = time.perf_counter()
        rows = contender(prompts, NEW)
        seconds.append(time.perf_counter() - mark)
    assert all(len(row) == NEW for row in rows)
    figures = {"tokens_per_s": PROMPTS * NEW / seconds[1], "first_call_s": seconds[0]}
    print(json.dumps(figures | {"peak_rss_mb": common.peak_rss_mb(), "rows": rows}))


def one(name: str) -> None:
    mark = time.perf_counter()
    contender = CONTENDERS[name]()
    (row,) = contender(rendered(contender.tokenizer, [chats()[0]]), CHAT)
    text = contender.tokenizer.decode(row)
    print(json.dumps({"first_answer_s": time.perf_counter() - mark, "peak_rss_mb": common.peak_rss_mb(), "text": text}))


def main() -> None:
    sys.path.insert(0, "examples")
    from smollm2 import write_smollm2

    write_smollm2(BASE)
    results = common.rounds(__file__, ["ours", "transformers"], ROUNDS)
    firsts = common.rounds(__file__, ["ours one", "transformers one"], ROUNDS)
    equal = sum(a == b for a, b in zip(results["ours"][0]["rows"], results["transformers"][0]["rows"], strict=True))
    for runs in results.values():
        for run in runs:
            del run["rows"]

    def median(of, name, what):
        return statistics.median(row[what] for row in of[name])

    table = ["| | tokens/s | first call, s | peak RSS MB | first answer, s |", "|---|---|---|---|---|"]
    for name, label in (("ours", "kithara_ray"), ("transformers", "transformers `generate`")):
        cells = [common.middle([r[what] for r in results[name]]) for what in ("tokens_per_s", "first_call_s")]
        cells.append(common.middle([r["peak_rss_mb"] for r in results[name]]))
        cells.append(common.middle([r["first_answer_s"] for r in firsts[f"{name} one"]]))
        table.append(f"| {label} | {' | '.join(cells)} |")
    ratios = {
        "speed_over_transformers": median(results, "ours", "tokens_per_s")
        / median(results, "transformers", "tokens_per_s"),
        "memory_over_transformers": median(results, "ours", "peak_rss_mb")
        / median(results, "transformers", "peak_rss_mb"),
    }
    table += ["", *(f"- {name.replace('_', ' ')}: {value:.2f}" for name, value in ratios.items())]
    table += [f"- rows of {NEW} tokens equal in both: {equal} of {PROMPTS}"]
    figures = {"results": results, "first_answers": firsts, "ratios": ratios, "equal_rows": equal}
    common.write("generate", "make bench-generate", table, figures)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        main()
    else:
        what, *first = sys.argv[1].split()
        (one if first else many)(what)

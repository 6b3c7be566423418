"""The task of the examples: sums and differences of two numbers below 100, and a scorer that shows what tuning did.

`chain_sum` of reasoning-gym with 2 terms of 1 to 2 digits: "State the final answer to the following arithmetic problem:
23 - 60 =" is answered by "-37". SmolLM2-135M-Instruct answers next to none of them before fine-tuning.
"""

from typing import Any

import reasoning_gym

_TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
# Shorter than the template's own, which is half of these rows. SmolLM2's have at most 40 tokens with it; of 41, batches
# would be padded to 48.
SYSTEM = "Give the number."
# Of the 16,400 that exist, 200 have one digit, and those are half of the draws.
MAX_QUESTIONS = 8_000


def make_rows(n_train: int, n_held_out: int, seed: int, tokenizer: Any) -> tuple[list[dict], list[dict]]:
    """Training rows {"prompt", "answer"} and held-out rows {"prompt", "answer", "entry"}; a function of the arguments.

    No question stands twice, neither within nor across the two. The held-out ones are drawn first, so they do not
    depend on `n_train`. `tokenizer` (transformers) renders the prompt by its chat template; the answer is the plain
    number, followed by the template's end of turn if that is not the EOS which tokenising adds anyway. `entry` is what
    `score` wants.
    """
    if min(n_train, n_held_out) < 0 or n_train + n_held_out > MAX_QUESTIONS:
        raise ValueError(f"at most {MAX_QUESTIONS} questions in all, got {n_train} + {n_held_out}")
    ending = end_of_turn(tokenizer)
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "system", "content": SYSTEM}, {"role": "user", "content": entry["question"]}],
                tokenize=False,
                add_generation_prompt=True,
            ),
            "answer": entry["answer"] + ending,
            "entry": entry,
        }
        for entry in _distinct_entries(n_held_out + n_train, seed)
    ]
    train = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows[n_held_out:]]
    return train, rows[:n_held_out]


def score(text: str, entry: dict) -> bool:
    """Whether the generated text (without prompt and special tokens) is the answer, by reasoning-gym's own scorer."""
    return reasoning_gym.get_score_answer_fn("chain_sum")(text, entry) == 1.0


def end_of_turn(tokenizer: Any) -> str:
    """What the chat template writes behind an answer; empty if that begins with the tokenizer's EOS."""
    answer = "ANSWER"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}], tokenize=False
    )
    ending = rendered[rendered.rindex(answer) + len(answer) :].strip()
    return "" if ending.startswith(tokenizer.eos_token) else ending


def _distinct_entries(count: int, seed: int) -> list[dict]:
    # reasoning-gym draws item i from Random(seed + i), so data sets of neighbouring seeds share nearly all their items:
    # both sets come from one, by question.
    task = reasoning_gym.create_dataset("chain_sum", **_TASK, seed=seed, size=max(1, 100 * count))
    entries: dict[str, dict] = {}
    for i in range(task.size):
        if len(entries) == count:
            return list(entries.values())
        entries.setdefault(task[i]["question"], task[i])
    assert len(entries) == count, f"{len(entries)} distinct questions in {task.size} draws"
    return list(entries.values())

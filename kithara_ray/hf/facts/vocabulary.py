"""The number of tokens that a model knows: the rows of its embedding, whatever config.json says."""

from kithara_ray.hf.checkpoint import BaseCheckpoint

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)
_TEXT = ("language_model", "text_model")


def embedding_rows(base: BaseCheckpoint) -> int | None:
    """Return the rows of the token embedding; config.json's vocabulary size if no tensor has a known name."""
    found = {
        name: info.shape[0]
        for name, info in base.tensors.items()
        if name.endswith(_EMBEDDINGS) and len(info.shape) == 2
    }
    of_text = {name: rows for name, rows in found.items() if any(part in name for part in _TEXT)}
    if found:
        return max((of_text or found).values())
    text = base.config.get("text_config")
    return base.config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)

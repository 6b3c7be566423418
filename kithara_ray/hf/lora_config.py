"""LoRA settings with PEFT's meaning, and their adapter_config.json."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.facts.experts import is_parameter
from kithara_ray.hf.lora_checks import (
    EMBEDDING,
    check_alpha,
    check_rank,
    checked_exclusions,
    checked_layer_patterns,
    checked_layers,
    checked_modules,
    checked_parameters,
    checked_patterns,
    checked_rows,
    checked_targets,
    checked_tokens,
    is_number,
)
from kithara_ray.hf.resizing.added import AddedRows

BIASES = ("none", "all", "lora_only")

# Initialisations of the factors of an adapter that is trained here.
INITIALISATIONS = (True, False, "gaussian")
# PEFT's other initialisations that do not change the base: such adapters are plain LoRA.
_PLAIN = ("eva", "orthogonal")
# Initialisations that change the base, each with the way to convert its adapter to plain LoRA. A name may have a
# suffix: pissa_niter_16.
_RESIDUAL = (
    "PEFT has replaced the base's weights by their residuals, so the adapter does not fit the base itself. Load it "
    "with PeftModel.from_pretrained, write get_peft_model(base, the same config) with save_pretrained(first), and "
    "convert it: save_pretrained(directory, path_initial_model_for_weight_conversion=first) makes plain LoRA of twice "
    "the rank"
)
_FROM_DATA = (
    "PEFT has replaced the base's weights by residuals derived from data, so the adapter does not fit the base itself. "
    "Convert it where it was trained: save_pretrained(directory, path_initial_model_for_weight_conversion=first), "
    "with the adapter saved before training as first, makes plain LoRA of twice the rank"
)
_CONVERSIONS: Mapping[str, str] = {
    "pissa": _RESIDUAL,
    "olora": _RESIDUAL,
    "corda": _FROM_DATA,
    "lora_ga": _FROM_DATA,
    "loftq": "PEFT has replaced the base's weights by quantised ones, so the adapter does not fit the base itself. "
    "Write a base with both: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)",
    "mica": "PEFT trains only lora_A of such an adapter. Set init_lora_weights to true in adapter_config.json: "
    "the base is unchanged, so the merged model is the same, and both factors can be trained further",
}

# Fields of adapter_config.json that change what an adapter computes or where it sits, with the values that mean "off".
# (peft.LoraConfig 0.21; a field unknown here is refused by the same rule unless it is empty.)
_OFF: Mapping[str, tuple[Any, ...]] = {
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
# Fields that do not affect the arithmetic.
# An initialisation's settings add nothing to its name: `init_lora_weights` decides.
_NEUTRAL = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
    | {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
)
_HONOURED = frozenset(
    {"alpha_pattern", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern"}
    | {"target_modules", "target_parameters", "task_type", "use_dora", "use_rslora"}
    | {"exclude_modules", "layers_pattern", "layers_to_transform"}
    | {"bias", "ensure_weight_tying", "lora_bias", "modules_to_save", "trainable_token_indices"}
)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA settings with the meaning of PEFT's LoraConfig; `lora_alpha=None` means `r` (scale 1), as in Kithara.

    r: rank of every module that rank_pattern does not name.
    target_modules: a module is a target when its name equals an entry or ends with "." + entry; or one string, a
        regular expression that matches the whole name. It may be empty if there are target_parameters.
    target_parameters: parameters of a mixture of experts, by their names' ends ("mlp.experts.down_proj"). Neither
        exclude_modules nor layers_to_transform applies to them, as in PEFT.
    use_dora: the update turns each row of the weight, and a trained vector gives the rows' lengths (arXiv:2402.09353).
    rank_pattern, alpha_pattern: regular expression -> value, matched as PEFT does against the end of the name of the
        module or parameter.
    exclude_modules: modules that are not targets, in the form of target_modules; None excludes nothing.
    layers_to_transform: numbers of the blocks to adapt; None adapts all. A target given by its full name is adapted
        whatever its number, as in PEFT.
    layers_pattern: names of the list of blocks, for example "layers", as regular expressions; None takes the first
        number in a module's name.
    bias: "all" trains the base's biases too, "lora_only" only those of the targets.
    lora_bias: give lora_B a trained bias, scaled like the product.
    modules_to_save: "embed_tokens", "lm_head" or both, trained as a whole.
    trainable_token_indices: tokens whose rows are trained, keyed by "embed_tokens" and "lm_head"; a list applies to the
        embedding.
    ensure_weight_tying: train the embedding of modules_to_save and the head that shares its weight as one.
    resize_token_embeddings: the rows that embedding and head have after rows for added tokens; None adds none. It is
        an argument of transformers: in PEFT's files, the shapes of the saved tables say it.
    added_rows: the values of these rows, if an adapter's file gave them; else each is the mean of the base's rows.
    """

    r: int = 16
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: str | bool = True
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    resize_token_embeddings: int | None = None
    added_rows: AddedRows | None = None
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_rank("lora_rank", self.r)
        if self.lora_alpha is not None:
            check_alpha("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        for key, rank in checked_patterns("rank_pattern", self.rank_pattern).items():
            check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in checked_patterns("alpha_pattern", self.alpha_pattern).items():
            check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not any(self.init_lora_weights is value or self.init_lora_weights == value for value in INITIALISATIONS):
            raise UnsupportedError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported; use one of {INITIALISATIONS}, "
                "or let PEFT make the adapter and give adapter="
            )
        object.__setattr__(self, "target_parameters", checked_parameters(self.target_parameters))
        self._check_parameters()
        optional = bool(self.target_parameters)
        object.__setattr__(self, "target_modules", checked_targets(self.target_modules, optional))
        object.__setattr__(self, "exclude_modules", checked_exclusions(self.exclude_modules))
        # PEFT treats an empty list of layers as none, and ignores its pattern.
        pattern = None if self.layers_to_transform in ([], ()) else self.layers_pattern
        object.__setattr__(self, "layers_to_transform", checked_layers(self.layers_to_transform))
        object.__setattr__(self, "layers_pattern", checked_layer_patterns(pattern))
        self._check_layers()
        object.__setattr__(self, "modules_to_save", checked_modules(self.modules_to_save))
        object.__setattr__(self, "trainable_token_indices", checked_tokens(self.trainable_token_indices))
        self._check_beside()
        object.__setattr__(self, "resize_token_embeddings", checked_rows(self.resize_token_embeddings))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))

    def _check_parameters(self) -> None:
        """Refuse options that PEFT's wrapper of a parameter does not have."""
        off = {"lora_dropout": 0, "use_dora": False, "lora_bias": False, "bias": "none"}
        wrong = next((name for name, value in off.items() if getattr(self, name) != value), None)
        if self.target_parameters and wrong is not None:
            raise ConfigError(
                f"{wrong}={getattr(self, wrong)!r} cannot be combined with the parameters "
                f"{', '.join(self.target_parameters)}: PEFT adapts these without dropout, DoRA and biases. Leave out "
                f"{wrong}, or list target_modules other than experts and router"
            )

    def _check_layers(self) -> None:
        """Apply the rules of peft.LoraConfig between these fields."""
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} has no effect with target_modules={self.target_modules!r}, a regular expression; "
                    "write the layers into it, or give target_modules as a list"
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform; give both or neither")

    def _check_beside(self) -> None:
        """Apply the rules of peft.LoraConfig, and of its injection, for weights trained besides the factors."""
        if self.bias not in BIASES:
            raise ConfigError(f"bias must be one of {BIASES}, got {self.bias!r}")
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias=True cannot be combined with use_dora=True, nor can it in PEFT; leave one out")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"lora_bias=True needs init_lora_weights=True, got {self.init_lora_weights!r}")
        both = sorted(set(self.modules_to_save) & set(self.trainable_token_indices))
        if both:
            raise ConfigError(f"modules_to_save trains all of {both[0]}; leave it out of trainable_token_indices")

    def recorded(self) -> dict[str, Any]:
        """Return the fields as plain data; `added_rows` is a digest of the values.

        Without rows for added tokens the two fields about them are left out, and without target_parameters that field:
        earlier runs have not recorded them.
        """
        made = dataclasses.asdict(dataclasses.replace(self, added_rows=None))
        added = {"resize_token_embeddings": made.pop("resize_token_embeddings"), "added_rows": made.pop("added_rows")}
        if not self.target_parameters:
            made.pop("target_parameters")
        if self.added_rows:
            added["added_rows"] = self.added_rows.digest
        return made | added if self.is_resized else made

    @property
    def is_resized(self) -> bool:
        """True if the base gets rows for added tokens."""
        return self.resize_token_embeddings is not None

    @property
    def has_beside(self) -> bool:
        """True if an adapter may hold more than factors; see `beside`."""
        return self.bias != "none" or bool(self.modules_to_save or self.trainable_token_indices)

    @property
    def selects_layers(self) -> bool:
        """True if other fields may leave out modules that `target_modules` names."""
        return self.exclude_modules is not None or self.layers_to_transform is not None

    @property
    def alpha(self) -> float:
        """lora_alpha with its default applied."""
        return self.r if self.lora_alpha is None else self.lora_alpha

    def rank_of(self, module: str) -> int:
        name = self.parameter_of(module) or module
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, name), self.r)

    def alpha_of(self, module: str) -> float:
        name = self.parameter_of(module) or module
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, name), self.alpha)

    def parameter_of(self, module: str) -> str | None:
        """Return the parameter that target_parameters selects: a module's weight, or a given parameter of experts."""
        name = module if is_parameter(module) else f"{module}.weight"
        return name if is_named(self.target_parameters, name) else None

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA: the factor before B @ A."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def matches(self, module: str) -> bool:
        """Decide as peft.tuners.tuners_utils.check_target_module_exists does, and for parameters as its injection."""
        if self.parameter_of(module) is not None or is_parameter(module):
            return self.parameter_of(module) is not None
        if self.exclude_modules is not None and is_named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return is_named(self.target_modules, module)
        chosen = self.layers_to_transform is None or self.layer_of(module) in self.layers_to_transform
        return chosen and is_named(self.target_modules, module)

    def layer_of(self, module: str) -> int | None:
        """Return the number that layers_to_transform refers to: the first in a name, or the first after a pattern."""
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern or ()]
        found = (re.match(expression, module) for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        first = next((match for match in found if match), None)
        return None if first is None else int(first["idx"])

    def to_peft(
        self, base_model_name_or_path: str, found: Iterable[str] | None = None, revision: str | None = None
    ) -> dict[str, Any]:
        """Return the content of adapter_config.json.

        `found` lists the adapted modules. Entries of target_modules that match none of them are left out; None keeps
        all. Fields that PEFT adds by default are written out if other readers (vLLM) look for them.
        """
        targets = self.target_modules
        if not isinstance(targets, str):
            modules = None if found is None else [m for m in found if self.parameter_of(m) is None]
            used = [t for t in targets if modules is None or any(is_named((t,), m) for m in modules)]
            targets = sorted(set(used))
        return {
            "alpha_pattern": {key: _plain(alpha) for key, alpha in self.alpha_pattern.items()},
            "auto_mapping": None,
            "base_model_name_or_path": base_model_name_or_path,
            "bias": self.bias,
            "ensure_weight_tying": self.ensure_weight_tying,
            "exclude_modules": _as_json(self.exclude_modules),
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": self.init_lora_weights,
            "layers_pattern": _as_json(self.layers_pattern),
            "layers_to_transform": _as_json(self.layers_to_transform),
            "lora_alpha": _plain(self.alpha),
            "lora_bias": self.lora_bias,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": list(self.modules_to_save) or None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "revision": revision,
            "target_modules": targets,
            "target_parameters": sorted(set(self.target_parameters)) or None,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": self._tokens_as_json(),
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }

    def _tokens_as_json(self) -> list | dict | None:
        tokens = {name: list(rows) for name, rows in self.trainable_token_indices.items()}
        return tokens[EMBEDDING] if tokens.keys() == {EMBEDDING} else tokens or None

    @classmethod
    def from_peft(cls, peft_config: Mapping[str, Any]) -> "LoraConfig":
        """Read adapter_config.json. Raises UnsupportedError for the first field value that is not supported."""
        if peft_config.get("peft_type") != "LORA":
            raise UnsupportedError(f"peft_type={peft_config.get('peft_type')!r} is not supported; only LORA is")
        if peft_config.get("task_type") not in (None, "CAUSAL_LM"):
            raise UnsupportedError(f"task_type={peft_config['task_type']!r} is not supported; only CAUSAL_LM is")
        for name in sorted(peft_config.keys() - _HONOURED - _NEUTRAL):
            value = peft_config[name]
            if not _is_off(name, value):
                raise UnsupportedError(
                    f"adapter_config.json: {name}={value!r} is not supported; "
                    "merge such an adapter with PEFT, or train without it"
                )
        targets = peft_config.get("target_modules")
        if targets is None and peft_config.get("target_parameters"):
            targets = ()
        if not isinstance(targets, list | tuple | set | frozenset | str):
            raise UnsupportedError(
                f"adapter_config.json: target_modules={targets!r} is not supported; write the module names as a list"
            )
        return cls(
            r=peft_config.get("r", 8),  # PEFT's own defaults for what the file leaves out
            lora_alpha=peft_config.get("lora_alpha", 8),
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets, key=str)),
            lora_dropout=peft_config.get("lora_dropout", 0.0),
            use_rslora=bool(peft_config.get("use_rslora", False)),
            use_dora=bool(peft_config.get("use_dora", False)),
            rank_pattern=peft_config.get("rank_pattern") or {},
            alpha_pattern=peft_config.get("alpha_pattern") or {},
            init_lora_weights=_initialisation(peft_config.get("init_lora_weights", True)),
            **{name: peft_config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")},
            bias=peft_config.get("bias") or "none",
            lora_bias=bool(peft_config.get("lora_bias", False)),
            modules_to_save=peft_config.get("modules_to_save") or (),
            trainable_token_indices=_or_none(peft_config.get("trainable_token_indices")),
            ensure_weight_tying=bool(peft_config.get("ensure_weight_tying", False)),
            target_parameters=peft_config.get("target_parameters") or (),
        )


def is_named(entries: Iterable[str] | str, module: str) -> bool:
    """True if a regular expression matches a module's whole name, or if the name ends with one of several entries."""
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return any(module == entry or module.endswith(f".{entry}") for entry in entries)


def _or_none(value: Any) -> Any:
    """Return None for an empty value, as PEFT treats it."""
    return None if value in ([], {}) else value


def _as_json(value: tuple | str | None) -> list | str | None:
    return list(value) if isinstance(value, tuple) else value


def _initialisation(found: object) -> str | bool:
    """Return the meaning of an adapter's `init_lora_weights` for the saved factors.

    Raises:
        UnsupportedError: the factors do not fit the base itself; the message says how to convert them.
    """
    if found is None or isinstance(found, bool):
        return bool(found)
    name = str(found).lower()
    how = next((how for prefix, how in _CONVERSIONS.items() if name.startswith(prefix)), None)
    if how is not None:
        raise UnsupportedError(f"adapter_config.json: init_lora_weights={found!r} is not supported: {how}")
    # The initialisation no longer matters to saved factors: PEFT loads them the same under the plain name.
    return True if name in _PLAIN else name


def _is_off(name: str, value: object) -> bool:
    """None, False and empty collections switch a PEFT field off; 0 does not (layers_to_transform=0 is a layer)."""
    empty = isinstance(value, dict | list | tuple | set) and not value
    return value is None or value is False or empty or value in _OFF.get(name, ())


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """peft.utils.other.get_pattern_key: the first pattern that matches, else the name itself."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _plain(alpha: float) -> int | float:
    """16.0 -> 16: PEFT declares and vLLM reads lora_alpha as an integer."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)

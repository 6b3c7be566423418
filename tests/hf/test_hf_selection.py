"""Which modules a config selects, against PEFT's own function, and how a selection is written, read and refused."""

import itertools
import json
import random

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from kithara_ray.errors import ConfigError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.merging.combine import combine
from kithara_ray.model.lora.targets import lora_config_of

LEAVES = ("q_proj", "v_proj", "up_proj", "norm", "xq_proj", "q_proj.lora")
PARTS = ("model", "layers", "layers.0", "layers.1", "layers.12", "h.1", "blocks.3.experts.0", "self_attn", "mlp", "x")
TARGETS = (
    ["q_proj"],
    ["q_proj", "up_proj"],
    ["1.self_attn.q_proj", "model.layers.0.mlp.up_proj"],
    ["layers.1.self_attn.q_proj"],
    ["q_proj", "model.layers.12.mlp.up_proj"],
    r".*\.(q|v)_proj",
    r".*layers\.1.*",
)
EXCLUDED = (None, [], "", ["v_proj"], ["layers.1.mlp.up_proj", "q_proj"], r".*\.0\..*", r"q_proj", ["x.q_proj"])
LAYERS = (None, [], 0, 1, [0], [1, 12], [3])
PATTERNS = (None, [], "", "layers", "h", ["h", "layers"], ["experts"], "lay.*", ["blocks", "layers"])


def module_names():
    draw = random.Random(0)
    made = {".".join([*draw.sample(PARTS, draw.randint(0, 4)), draw.choice(LEAVES)]) for _ in range(120)}
    whole = [f"model.layers.{n}.{leaf}" for n in (0, 1, 12) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    return sorted(made) + whole


def test_a_selection_is_peft_s_over_many_names():
    """Combinations that PEFT takes; those that it refuses are refused."""
    modules, seen, refused = module_names(), 0, 0
    every = list(itertools.product(TARGETS, EXCLUDED, LAYERS, PATTERNS))
    for targets, excluded, layers, pattern in random.Random(1).sample(every, len(every) // 6):
        fields = {"exclude_modules": excluded, "layers_to_transform": layers, "layers_pattern": pattern}
        try:
            reference = peft.LoraConfig(target_modules=targets, **fields)
        except ValueError:
            # PEFT refuses some empty values and takes others; here all of them mean "not given".
            given = {"layers_to_transform": 1, "layers_pattern": "x"}
            filled = {name: given.get(name) if value in ([], "") else value for name, value in fields.items()}
            with pytest.raises(ConfigError, match=r"layers_(pattern|to_transform)"):
                LoraConfig(target_modules=targets, **filled)
            refused += 1
            continue
        ours = LoraConfig(target_modules=targets, **fields)
        for module in modules:
            theirs = bool(check_target_module_exists(reference, module))
            assert ours.matches(module) == theirs, (fields, targets, module)
            seen += theirs
        read = LoraConfig.from_peft(json.loads(json.dumps(ours.to_peft("base"))))
        assert [read.matches(module) for module in modules] == [ours.matches(module) for module in modules]
    assert seen > 2_000
    assert refused > 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": -1}, "layers_to_transform must be a layer's number >= 0 or a list of them, got -1"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be a layer's number"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a layer's number"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": 1, "layers_pattern": "("}, r"layers_pattern: '\(' is not a regular expression"),
        ({"layers_to_transform": 1, "layers_pattern": [1]}, "layers_pattern must be the name of a list of blocks"),
        (
            {"layers_to_transform": 1, "target_modules": ".*q_proj"},
            "layers_to_transform has no effect with target_mod",
        ),
        ({"exclude_modules": "("}, r"exclude_modules: '\(' is not a regular expression"),
        ({"exclude_modules": [""]}, "exclude_modules must name at least one module"),
    ],
)
def test_a_wrong_selection_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_an_adapter_is_complete_with_the_selected_modules_alone(base, make_adapter, tmp_path):
    fields = {
        "target_modules": ("k_proj", "q_proj"),
        "layers_to_transform": (0, 2),
        "exclude_modules": ("2.self_attn.k_proj",),
    }
    adapter = make_adapter(base, **fields)
    modules = ["0.self_attn.k_proj", "0.self_attn.q_proj", "2.self_attn.q_proj"]
    assert list(adapter.modules) == [f"model.layers.{module}" for module in modules]
    adapter.write(tmp_path, str(base.directory))
    read = Adapter.read(tmp_path)
    read.validate(base)
    assert read.config == adapter.config
    assert {name for name in adapter.tensors} == set(read.tensors)


def test_a_sum_of_selections_has_the_modules_of_each(base, make_adapter):
    one = make_adapter(base, layers_to_transform=0)
    other = make_adapter(base, exclude_modules=r".*\.[01]\..*", seed=1)
    both = combine([one, other], [1.0, 0.5])
    both.validate(base)
    assert set(both.modules) == {*one.modules, *other.modules}
    assert len(both.modules) == 4


def test_a_checkpoint_s_settings_come_back_from_json():
    """As a manifest holds them, a regular expression among them."""
    for config in (
        LoraConfig(target_modules=r".*\.(q|v)_proj", exclude_modules=("1.self_attn.q_proj",)),
        LoraConfig(layers_to_transform=3, layers_pattern="layers"),
    ):
        assert LoraConfig(**json.loads(json.dumps(vars(config)))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"exclude_modules": ["v_prj"]},
            "exclude_modules: 'v_prj' matches no module of this model; it has down_proj, ",
        ),
        ({"exclude_modules": "vision.*"}, r"exclude_modules: 'vision\.\*' matches no module"),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform: no layer 3; this model has layers 0 to 2"),
        (
            {"layers_to_transform": 0, "layers_pattern": "h"},
            r"no layer 0 with layers_pattern=\['h'\]; this model has no",
        ),
        ({"exclude_modules": ["q_proj", "v_proj"]}, r"exclude_modules=\(.*\): no module is left of target_modules"),
    ],
)
def test_a_selection_of_what_is_not_there_is_refused(base, settings, message):
    given = {"target_modules": ("q_proj", "v_proj"), "init_lora_weights": True}
    given |= {"rank_pattern": None, "alpha_pattern": None}
    with pytest.raises(ConfigError, match=message):
        lora_config_of(4, base, **given, **settings)
    excluded = lora_config_of(4, base, **given, exclude_modules=["lm_head", "v_proj"])
    assert excluded.matches("model.layers.0.self_attn.q_proj")

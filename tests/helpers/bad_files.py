"""Cases of test_bad_input_table.py: files of a tokenizer, a base and an adapter that are wrong."""

import json

from bad_space import CASES, Space, case, setting

# --- tokenizer -------------------------------------------------------------------------------------------------------

setting("a tokenizer that is not there", "no tokenizer at '/nowhere'", "DATA.tokenizer_handle", "/nowhere")


@case("no tokenizer files", "no tokenizer at|encodes 'a' as nothing")
def _(space):
    for path in space.model.glob("*token*"):
        path.unlink()


@case("a tokenizer file cut short", "no tokenizer at")
def _(space):
    path = space.model / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:200])


@case("a tokenizer that ends nothing", "has no EOS token")
def _(space):
    space.json(space.model / "tokenizer_config.json", eos_token=None)
    (space.model / "special_tokens_map.json").unlink(missing_ok=True)


# --- base ------------------------------------------------------------------------------------------------------------

setting("no base", "/nowhere/model", "model.preset_handle", "/nowhere/model")
setting("a bare name", "write hf://org/name", "model.preset_handle", "org/name")
setting("a preset of Keras", "presets hold Keras weights", "model.preset_handle", "kaggle://keras/gemma2")
setting(
    "a hub that is not there", "could not be fetched from the Hugging Face hub", "model.preset_handle", "hf://org/none"
)
setting("half a hub name", "expected hf://org/name", "model.preset_handle", "hf://org")
setting("a store unheard of", "no filesystem for it", "model.preset_handle", "nope://bucket/x")


@case("a base that is a file", "is a file; give the model's directory")
def _(space):
    space.config["model"]["preset_handle"] = str(space.model / "config.json")


@case("no config.json", "config.json is missing")
def _(space):
    (space.model / "config.json").unlink()


@case("config.json is not JSON", "config.json: not JSON")
def _(space):
    (space.model / "config.json").write_text("{")


@case("another family", "model_type='mamba' is not supported")
def _(space):
    space.json(space.model / "config.json", model_type="mamba")


@case("a field that is not computed", "is_causal=False of this llama model")
def _(space):
    space.json(space.model / "config.json", is_causal=False)


@case("weights cut short", "model.safetensors: tensor .* do not lie within")
def _(space):
    path = space.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@case("weights that are none", "model.safetensors: header length .* exceeds the file")
def _(space):
    (space.model / "model.safetensors").write_bytes(b"\xff" * 100)


@case("no weights", "neither model.safetensors nor model.safetensors.index.json")
def _(space):
    (space.model / "model.safetensors").unlink()


@case("pickled weights", "only pickled weights .* pickle is not read")
def _(space):
    (space.model / "model.safetensors").rename(space.model / "pytorch_model.bin")


@case("an index out of its directory", "weight_map names '../x.safetensors'.*do not use this checkpoint")
def _(space):
    (space.model / "model.safetensors").rename(space.root / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
    (space.model / "model.safetensors.index.json").write_text(json.dumps(index))


@case("an index of a file that is not there", "part-9.safetensors is missing")
def _(space):
    (space.model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "part-9.safetensors"}}
    (space.model / "model.safetensors.index.json").write_text(json.dumps(index))


@case("a stale index", "both model.safetensors and model.safetensors.index.json are there")
def _(space):
    (space.model / "model.safetensors.index.json").write_text('{"weight_map": {}}')


# --- adapter ---------------------------------------------------------------------------------------------------------


@case("no adapter", "no directory at /nowhere")
def _(space):
    space.use_adapter()["adapter"] = "/nowhere"


@case("a rank beside an adapter", "lora_rank=2 with adapter=")
def _(space):
    space.config["model"]["adapter"] = str(space.adapter)


def adapter_field(name: str, message: str, **fields) -> None:
    def spoil(space: Space) -> None:
        space.use_adapter()
        space.json(space.adapter / "adapter_config.json", **fields)

    CASES[name] = (spoil, message)


adapter_field("an adapter of another base", "was trained on 'org/other'", base_model_name_or_path="org/other")
adapter_field("an adapter of another kind", "peft_type='IA3' is not supported", peft_type="IA3")
adapter_field("an adapter of another rank", "expected rank 3, found 2", r=3)
adapter_field("an adapter of residuals", "init_lora_weights='pissa' is not supported", init_lora_weights="pissa")
adapter_field("an adapter without its tokens", "trainable_tokens_delta is missing", trainable_token_indices=[1])
adapter_field("an adapter of other targets", "not a target of target_modules", target_modules=["k_proj"])
adapter_field("an adapter that is incomplete", "have no factors", target_modules=["q_proj", "v_proj"])
adapter_field("a pattern that is none of PEFT", "target_modules: .* is not a regular", target_modules="(")


@case("an adapter without a config", "adapter_config.json is missing")
def _(space):
    space.use_adapter()
    (space.adapter / "adapter_config.json").unlink()


@case("an adapter's config that is not JSON", "adapter_config.json: not JSON")
def _(space):
    space.use_adapter()
    (space.adapter / "adapter_config.json").write_text("r = 3")


@case("a pickled adapter", "adapter_model.bin is a pickle, which is not read")
def _(space):
    space.use_adapter()
    (space.adapter / "adapter_model.safetensors").rename(space.adapter / "adapter_model.bin")


@case("an adapter cut short", "adapter_model.safetensors: .*; the file is truncated|adapter_model.safetensors: tensor")
def _(space):
    space.use_adapter()
    path = space.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])

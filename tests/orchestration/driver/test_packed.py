"""All that a submitted job reads is looked for in what is packed for it, before it is sent."""

import json
from types import SimpleNamespace

import pytest

from kithara_ray.errors import ConfigError
from kithara_ray.orchestration import submit

ROW = '{"prompt": "q", "answer": "a"}\n'


@pytest.fixture
def project(tmp_path):
    """A directory with data, a base and an adapter, some of which stays behind."""
    files = {
        ".gitignore": "private/\nen/test.jsonl\n",
        "train.jsonl": ROW,
        "private/train.jsonl": ROW,
        "shards/train-a.jsonl": ROW,
        "shards/test-a.jsonl": ROW,
        "en/train.jsonl": ROW,
        "en/test.jsonl": ROW,
        "base/config.json": "{}",
        "base/model.safetensors": "x",
        "tokenizer/tokenizer.json": "{}",
        "private/template.jinja": "{{ messages }}",
    }
    for name, text in files.items():
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text(text)
    (tmp_path / "elsewhere.jsonl").write_text(ROW)
    return tmp_path / "project"


def config(source="train.jsonl", base="hf://org/name", **more):
    dataset = {"type": "SFTDataset", "source": source, **more.pop("dataset", {})}
    model = {"preset_handle": base, "lora_rank": 4, **more.pop("model", {})}
    return {"model": model, "train_dataloader": {"dataset": dataset, "per_device_batch_size": 1}, **more}


def sent(project, content, overrides=(), name="run.yaml"):
    """The job's command, as a cluster would have got it."""
    path = project / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    jobs = []
    client = SimpleNamespace(submit_job=lambda **job: jobs.append(job) or "id")
    submit.submit(client, path, overrides, project)
    return jobs[0]["entrypoint"]


TAKEN = {
    "a file": config(),
    "files": config(["train.jsonl", "en/train.jsonl"]),
    "rows": config([{"prompt": "q", "answer": "a"}]),
    "a pattern": config("en/tr*.jsonl"),
    "a split": config("shards", dataset={"split": "train"}),
    "a split whose sibling stays behind": config("en", dataset={"split": "train"}),
    "URLs": config("gs://bucket/train.jsonl", "gs://bucket/base"),
    "the head node's": config("/data/train.jsonl", "/models/base"),
    "a tokenizer": config(dataset={"tokenizer_handle": "tokenizer"}),
    "a template": config(dataset={"chat_template": "{{ messages }}"}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_packed_or_elsewhere_is_taken(project, case):
    assert sent(project, TAKEN[case]) == "python -m kithara_ray train run.yaml"


REFUSED = {
    "ignored": (config("private/train.jsonl"), r"train_dataloader\.dataset\.source: .* has no private/train\.jsonl"),
    "one of several": (config(["train.jsonl", "private/train.jsonl"]), r"has no private/train\.jsonl"),
    "missing": (config("nothing.jsonl"), r"train_dataloader\.dataset\.source: .*nothing\.jsonl: no such file"),
    "outside": (config("../elsewhere.jsonl"), r"'\.\./elsewhere\.jsonl' is outside of "),
    "a split that stays behind": (config("en", dataset={"split": "test"}), r"has no en/test\.jsonl"),
    "no split": (config("shards"), r"shards: has several splits, 'test', 'train'; choose one: split='train'"),
    "an extension": (config("base/model.safetensors"), "unknown extension '.safetensors'"),
    "evaluation": (
        config(eval_dataloader={"dataset": {"type": "SFTDataset", "source": "private/train.jsonl"}}),
        r"eval_dataloader\.dataset\.source: .* has no private/train\.jsonl",
    ),
    "a base": (config(base="base"), r"model\.preset_handle: 'base': .* has no base/model\.safetensors"),
    "no base": (config(base="google/gemma"), "there is no directory 'google/gemma'"),
    "an adapter": (config(model={"adapter": "adapter"}), r"model\.adapter: there is no directory 'adapter'"),
    "a tokenizer": (config(dataset={"tokenizer_handle": "nothing"}), r"tokenizer_handle: there is no directory 'noth"),
    "a template": (config(dataset={"chat_template": "private/template.jinja"}), r"has no private/template\.jinja"),
    "a searched base": (
        config(tune={"space": {"model.preset_handle": {"choice": ["hf://o/n", "base"]}}}),
        r"tune\.space\.model\.preset_handle: 'base': .* has no base/model",
    ),
    "datasets of a mixture": (
        config() | {"train_dataloader": {"dataset": {"mix": [{"type": "SFTDataset", "source": "nothing.jsonl"}]}}},
        r"train_dataloader\.dataset\.mix\.0\.source: .*no such file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_job_would_miss_is_named(project, case):
    content, text = REFUSED[case]
    with pytest.raises(ConfigError, match=text):
        sent(project, content)


def test_all_that_is_missing_is_named_at_once(project):
    with pytest.raises(ConfigError) as refused:
        sent(project, config("nothing.jsonl", "base"))
    assert len(str(refused.value).splitlines()) == 2


def test_overrides_count(project):
    assert "--set" in sent(project, config("nothing.jsonl"), ["train_dataloader.dataset.source=train.jsonl"])
    with pytest.raises(ConfigError, match="no such file"):
        sent(project, config(), ["train_dataloader.dataset.source=nothing.jsonl"])


def test_a_configuration_that_is_not_packed(project):
    with pytest.raises(ConfigError, match=r"the job's copy of .* has no runs/run\.yaml: .gitignore, .rayignore and"):
        sent(project, config(), name="runs/run.yaml")
    with pytest.raises(ConfigError, match="is no directory; give the job's with --working-dir"):
        submit.submit(SimpleNamespace(), project / "run.yaml", (), project / "nothing")


def test_a_runs_name_that_ray_would_refuse_later(project):
    sent(project, config(run_config={"name": "my/run 1"}))
    for name, text in (("läuf", "other than printable ASCII"), ("a" * 300, "longer than 255"), ("../up", "leaves")):
        with pytest.raises(ConfigError, match=f"run_config: the name .*{text}"):
            sent(project, config(run_config={"name": name}))


def test_a_path_of_this_machine_inside_of_the_directory_is_said(project, caplog):
    sent(project, config(str(project / "train.jsonl")))
    assert "is a path of this machine" in caplog.text
    assert "'train.jsonl' finds it" in caplog.text

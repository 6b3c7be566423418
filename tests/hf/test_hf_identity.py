"""Which base an adapter was trained on: fingerprint, place, weights, revision, name, in this order, on every path."""

import json
import logging
import shutil

import plain_llama
import pytest

from kithara_ray.cli.app import main
from kithara_ray.errors import AdapterError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.identity import BaseIdentity, check_same_base, identity_of, named

OLD, NEW = "a" * 40, "b" * 40


def compare(trained, directory, handle=None, allow=False):
    base = directory if isinstance(directory, BaseCheckpoint) else BaseCheckpoint.open(directory)
    handle = str(handle or directory)
    check_same_base(trained, base, handle, adapter="lora", allow=allow, override="--force")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub's cache with two revisions of acme/tiny, of other weights; main and v2 are the newer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub/models--acme--tiny"
    for seed, commit in enumerate((OLD, NEW)):
        plain_llama.write(repo / "snapshots" / commit, seed)
    (repo / "refs").mkdir()
    for name in ("main", "v2"):
        (repo / "refs" / name).write_text(NEW)
    return repo / "snapshots"


def test_names_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named("hf://org/name@v1") == named("org/name", "v1") == BaseIdentity("org/name", "v1")
    assert named("org/name", "v1").handle == "hf://org/name@v1"
    (tmp_path / "org/name@v1").mkdir(parents=True)
    (tmp_path / "org/name").mkdir()
    assert named("org/name", "v1").handle == str(tmp_path / "org/name")
    assert named("org/name@v1").handle == str(tmp_path / "org/name@v1")
    assert named("gs://bucket/base/") == BaseIdentity("gs://bucket/base")
    assert named(f"/cache/models--acme--tiny/snapshots/{OLD}") == BaseIdentity("acme/tiny", OLD)
    assert named(None) == BaseIdentity()


def test_the_fingerprint_decides_before_the_name(tmp_path):
    right, other = plain_llama.write(tmp_path / "right"), plain_llama.write(tmp_path / "other", seed=1)
    fingerprint = BaseCheckpoint.open(right).fingerprint()
    shutil.copytree(right, tmp_path / "copy")
    compare(BaseIdentity("org/gone", "v1", fingerprint), tmp_path / "copy")
    with pytest.raises(AdapterError, match=r"lora was trained on '.*right' and not on '.*other': fingerprint sha256:"):
        compare(BaseIdentity(str(right), None, fingerprint), other)
    with pytest.raises(AdapterError, match="fingerprint"):
        compare(BaseIdentity(str(other), None, fingerprint), other)


def test_two_directories_of_one_name_are_told_apart_by_their_weights(tmp_path, caplog):
    right, other = plain_llama.write(tmp_path / "a/base"), plain_llama.write(tmp_path / "b/base", seed=1)
    shutil.copytree(right, tmp_path / "c/base")
    compare(named(str(right)), tmp_path / "c/base")
    with pytest.raises(AdapterError, match="fingerprint"):
        compare(named(str(right)), other)
    shutil.rmtree(right)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        compare(named(str(right)), other)
    assert "without a fingerprint nothing shows" in caplog.text
    with pytest.raises(AdapterError, match="another name, and neither has a fingerprint"):
        compare(named(str(tmp_path / "a/another")), other)
    (tmp_path / "link").symlink_to(other)
    compare(named(str(tmp_path / "link")), other)


def test_revisions_of_the_hub(hub):
    def at(revision, handle):
        compare(BaseIdentity("acme/tiny", revision), BaseCheckpoint.at(handle), handle)

    for revision, handle in [
        (None, "hf://acme/tiny"),
        (OLD, f"hf://acme/tiny@{OLD}"),
        (NEW, "hf://acme/tiny"),
        (NEW[:10], "hf://acme/tiny"),
        ("main", "hf://acme/tiny"),
        ("v2", "hf://acme/tiny"),
        ("v2", f"hf://acme/tiny@{NEW}"),
        (NEW, str(hub / NEW)),
    ]:
        at(revision, handle)
    for revision, handle in [(OLD, "hf://acme/tiny"), (NEW, f"hf://acme/tiny@{OLD}"), (OLD, str(hub / NEW))]:
        with pytest.raises(AdapterError, match=f"'acme/tiny' at revision '{revision}' and not on .*fingerprint"):
            at(revision, handle)
    with pytest.raises(AdapterError, match=f"at revision 'v9' and not on .* this base's revision is {NEW}"):
        at("v9", "hf://acme/tiny")
    assert identity_of(BaseCheckpoint.at("hf://acme/tiny"), "hf://acme/tiny") == BaseIdentity("acme/tiny", NEW)
    shutil.copytree(hub / NEW, hub / ("c" * 40))
    at(NEW, f"hf://acme/tiny@{'c' * 40}")


def test_of_a_base_on_the_hub_that_is_not_here_names_and_revisions_are_compared(tmp_path):
    opened = BaseCheckpoint.open(plain_llama.write(tmp_path / "headers"), source=f"hf://acme/tiny@{NEW}")
    compare(BaseIdentity("Acme/Tiny", NEW, "sha256:0"), opened, "hf://acme/tiny")
    with pytest.raises(AdapterError, match=f"this base's revision is {NEW}"):
        compare(BaseIdentity("acme/tiny", OLD), opened, "hf://acme/tiny")
    with pytest.raises(AdapterError, match="another name"):
        compare(BaseIdentity("acme/other", NEW), opened, "hf://acme/tiny")


def test_an_override_logs_the_difference(tmp_path, caplog):
    other = plain_llama.write(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        compare(BaseIdentity("org/name"), other, allow=True)
    assert "was trained on 'org/name' and not on" in caplog.text
    assert "because of --force" in caplog.text


# --- on the paths ----------------------------------------------------------------------------------------------------


def merge(base, adapter, to, *more, command="merge"):
    what = (
        ["merge", "--base", base, "--adapter", adapter] if command == "merge" else ["export", adapter, "--base", base]
    )
    return main([str(part) for part in (*what, "--to", to, *more)])


@pytest.mark.parametrize("command", ["merge", "export"])
def test_commands_refuse_another_base_unless_forced(command, tmp_path, capsys):
    right, wrong = plain_llama.write(tmp_path / "acme"), plain_llama.write(tmp_path / "acme-chat", seed=5)
    lora = plain_llama.adapter(tmp_path / "lora", right)
    assert merge(wrong, lora, tmp_path / "out", command=command) == 1
    said = capsys.readouterr().err
    assert f"was trained on '{right}' and not on '{wrong}'" in said
    assert not (tmp_path / "out").exists()
    assert merge(wrong, lora, tmp_path / "out", "--force", command=command) == 0
    assert merge(right, lora, tmp_path / "right", command=command) == 0


def test_every_adapter_of_a_sum_is_compared(tmp_path, capsys):
    right = plain_llama.write(tmp_path / "base")
    loras = [plain_llama.adapter(tmp_path / name, base) for name, base in (("one", right), ("two", "org/other"))]
    command = ["merge", "--base", right, "--adapter", f"{loras[0]}:0.5", "--adapter", f"{loras[1]}:0.5"]
    assert main([str(part) for part in (*command, "--to", tmp_path / "out")]) == 1
    assert "two:0.5 was trained on 'org/other'" in capsys.readouterr().err


def test_exports_write_the_fingerprint_and_the_commit(hub, tmp_path, capsys):
    lora = plain_llama.adapter(tmp_path / "lora", "acme/tiny", revision=OLD)
    assert merge(f"hf://acme/tiny@{OLD}", lora, tmp_path / "again", "--format", "adapter") == 0
    assert merge("hf://acme/tiny", tmp_path / "again", tmp_path / "out") == 1
    written = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("acme/tiny", OLD)
    fingerprint = BaseCheckpoint.open(hub / OLD).fingerprint()
    (tmp_path / "again/export_report.json").unlink()
    assert Adapter.read(tmp_path / "again").trained_on == BaseIdentity("acme/tiny", OLD, fingerprint)
    assert merge("hf://acme/tiny", lora, tmp_path / "newest", "--format", "separate", "--force") == 0
    assert Adapter.read(tmp_path / "newest/adapter").trained_on.revision == NEW


def test_adapters_of_before_are_known_by_the_files_beside_them(tmp_path):
    lora = plain_llama.adapter(tmp_path / "lora", "org/name")
    (lora / "export_report.json").write_text(json.dumps({"base": {"fingerprint": "sha256:1"}}))
    assert Adapter.read(lora).trained_on.fingerprint == "sha256:1"
    run = plain_llama.adapter(tmp_path / "run/adapter", "org/name").parent
    (run / "run.json").write_text(json.dumps({"base": {"fingerprint": "sha256:2"}}))
    assert Adapter.read(run / "adapter").trained_on.fingerprint == "sha256:2"
    (run / "run.json").write_text("[]")
    assert Adapter.read(run / "adapter").trained_on.fingerprint is None


def test_a_path_with_a_colon_is_a_path(tmp_path):
    from kithara_ray.hf.merging.combine import read_weighted

    plain_llama.adapter(tmp_path / "lora", "base")
    plain_llama.adapter(tmp_path / "lora:0.5", "base", target="v_proj")

    def read(text):
        adapter, weight = read_weighted(str(tmp_path / text))
        return adapter.config.target_modules, weight

    assert read("lora") == (("q_proj",), 1.0)
    assert read("lora:0.25") == (("q_proj",), 0.25)
    assert read("lora:0.5") == (("v_proj",), 1.0)
    assert read("lora:0.5:2") == (("v_proj",), 2.0)

import fcntl
import multiprocessing
import os
from pathlib import Path

import fsspec
import huggingface_hub
import pytest

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.fetch import fetch, fetched_from_hub, names_at
from kithara_ray.hf.hub_place import hub_place
from kithara_ray.hf.identity import named
from kithara_ray.storage.urls import CACHE_VARIABLE, cache_dir


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _names(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


# --- fetch


def test_fetch_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert fetch("org/name") == tmp_path / "org/name"
    assert fetch(str(tmp_path)) == tmp_path
    assert fetch(f"file://{tmp_path}") == tmp_path
    Path("file").touch()
    with pytest.raises(CheckpointError, match="is a file; give the model's directory"):
        fetch("file")


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        ("google/gemma", CheckpointError, r"no directory at /.*google/gemma .*write hf://google/gemma"),
        ("/nowhere/at/all", CheckpointError, "no directory at /nowhere/at/all"),
        (
            "gemma2_2b_en",
            CheckpointError,
            "KerasHub preset name cannot be used, because exports need Hugging Face",
        ),
        ("kaggle://keras/gemma", UnsupportedError, "exports need Hugging Face files"),
        ("hf://justname", CheckpointError, "expected hf://org/name"),
        ("hf://org/name/../x", CheckpointError, "expected hf://org/name"),
        ("hf://org//sub", CheckpointError, "expected hf://org/name"),
        ("nosuch://x/y", CheckpointError, "no filesystem for it"),
    ],
)
def test_handles_that_cannot_be_fetched(handle, error, message):
    with pytest.raises(error, match=message):
        fetch(handle)


def test_fetch_hub(monkeypatch, tmp_path):
    seen, asked = {}, []

    def download(repo, **given):
        asked.append(given)
        seen.update(given, repo=repo)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("hf://google/gemma-2-2b@v1.0") == tmp_path
    assert (seen["repo"], seen["revision"]) == ("google/gemma-2-2b", "v1.0")
    files = ["config.json", "model.safetensors", "tokenizer.model", "LICENSE", "a.py", "w.bin", "original/params.json"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, "tokenizer.py", "consolidated.safetensors"],
        allow_patterns=seen["allow_patterns"],
        ignore_patterns=seen["ignore_patterns"],
    )
    assert list(kept) == files[:4]
    assert len(asked) == 1  # a directory of no commit: nothing to look for in it

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"hf://a/b: could not be fetched .*no network.*HF_TOKEN"):
        fetch("hf://a/b")


def test_templates_in_a_subdirectory_are_fetched(memory, cache, monkeypatch, tmp_path):
    """From the Hub by a second call, of the same commit; nothing else of subdirectories."""
    commit = tmp_path / "snapshots/0badf00d"
    commit.mkdir(parents=True)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.append(kw) or str(commit))
    assert fetch("hf://org/name") == commit
    assert [given["revision"] for given in asked] == [None, "0badf00d"]
    names = ["additional_chat_templates/tool.jinja", "additional_chat_templates/x.py", "original/a.jinja", "a.jinja"]
    kept = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked[1]["allow_patterns"], ignore_patterns=asked[1]["ignore_patterns"]
    )
    assert list(kept) == names[:1]
    files = {"config.json": b"{}", "model.safetensors": b"w", names[0]: b"tool", names[2]: b"x", names[1]: b""}
    memory.pipe({f"/t/m/{name}": data for name, data in files.items()})
    directory = fetch("memory://t/m")
    assert _names(directory) == {"config.json", "model.safetensors", names[0]}
    assert (directory / names[0]).read_bytes() == b"tool"
    assert set(names_at("memory://t/m")) == set(files)


PLACES = {
    "hf://o/n": ("o/n", None, ""),
    "hf://o/n/": ("o/n", None, ""),
    "hf://o/n@v1.0": ("o/n", "v1.0", ""),
    "hf://o/n@refs/pr/1": ("o/n", "refs/pr/1", ""),
    "hf://o/n/sub/dir": ("o/n", None, "sub/dir"),
    "hf://o/n/sub@v1": ("o/n", "v1", "sub"),
    f"hf://o/n@{'a' * 40}/sub": ("o/n", "a" * 40, "sub"),
    "hf://o/n@main/sub": ("o/n", "main", "sub"),
}


@pytest.mark.parametrize("handle", PLACES)
def test_a_place_on_the_hub(handle):
    assert hub_place(handle) == PLACES[handle]


def test_a_folder_of_a_repository_is_fetched_alone(monkeypatch, tmp_path):
    """Its files and its templates, no others; a folder without model files is told by name."""
    commit = tmp_path / "models--o--n/snapshots" / ("c" * 40)
    (commit / "sub").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **kw: asked.append((repo, kw)) or str(commit)
    )
    assert fetch("hf://o/n/sub@v1") == commit / "sub"
    assert [(repo, given["revision"]) for repo, given in asked] == [("o/n", "v1"), ("o/n", "c" * 40)]
    names = ["config.json", "sub/config.json", "sub/a.py", "sub/deep/config.json", "subs/config.json"]
    names += ["sub/additional_chat_templates/a.jinja", "additional_chat_templates/a.jinja"]
    kept = [
        list(
            huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=given["allow_patterns"], ignore_patterns=given["ignore_patterns"]
            )
        )
        for _, given in asked
    ]
    assert kept == [["sub/config.json"], ["sub/additional_chat_templates/a.jinja"]]
    identity = named(str(commit / "sub"))
    assert (identity.name, identity.revision) == ("o/n/sub", "c" * 40)
    assert named(identity.handle) == identity
    for name in ("config.json", "model.safetensors"):
        (commit / "sub" / name).touch()
    assert fetched_from_hub("hf://o/n/sub") == commit / "sub"
    assert fetched_from_hub("hf://o/n") is None
    with pytest.raises(CheckpointError, match="hf://o/n has no folder 'other' with model files"):
        fetch("hf://o/n/other")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    assert names_at("hf://o/n/sub") == ["a.py", "additional_chat_templates/a.jinja", "config.json", "deep/config.json"]


def test_fetch_remote_once(memory, cache, monkeypatch):
    memory.pipe({
        "/bucket/m/config.json": b"{}", "/bucket/m/model.safetensors": b"weights", "/bucket/m/code.py": b"",
        "/bucket/m/old.bin": b"", "/bucket/m/adapter/adapter_config.json": b"{}",
    })  # fmt: skip
    fetched = []
    original = type(memory).get_file
    monkeypatch.setattr(type(memory), "get_file", lambda s, r, *a, **k: fetched.append(r) or original(s, r, *a, **k))
    directory = fetch("memory://bucket/m")
    assert _names(directory) == {"config.json", "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert fetch("memory://bucket/m/") == directory
    assert len(fetched) == 2
    memory.pipe("/bucket/m/model.safetensors", b"changed")  # the same size
    newer = fetch("memory://bucket/m")
    assert newer != directory
    assert (newer / "model.safetensors").read_bytes() == b"changed"
    with pytest.raises(CheckpointError, match="no model files there"):
        fetch("memory://bucket/empty")


def test_a_torn_download_is_not_kept(memory, cache, monkeypatch):
    memory.pipe({"/b/config.json": b"{}", "/b/model.safetensors": b"weights"})
    original = type(memory).get_file

    def torn(self, remote, local, **kwargs):
        original(self, remote, local, **kwargs)
        if remote.endswith("safetensors"):
            os.truncate(local, 3)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", torn)
        with pytest.raises(CheckpointError, match=r"model.safetensors: 3 of 7 bytes arrived"):
            fetch("memory://b")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    assert (fetch("memory://b") / "model.safetensors").read_bytes() == b"weights"


def _fetch_counting(url: str, counter: str) -> None:
    fs = type(fsspec.filesystem("dir", path="/", fs=fsspec.filesystem("file")).fs)
    original = fs.get_file

    def counted(self, remote, local, **kwargs):
        with open(counter, "a") as stream:
            stream.write("x")
        (lock,) = cache_dir().glob("*.lock")
        with lock.open() as stream, pytest.raises(BlockingIOError):  # nobody else downloads meanwhile
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return original(self, remote, local, **kwargs)

    fs.get_file = counted
    fetch(url)


def test_a_download_tells_how_far_it_is(memory, cache):
    memory.pipe("/m/config.json", b"{}")
    memory.pipe("/m/model.safetensors", b"x" * (12 << 20))
    told = []
    fetch("memory://m", lambda here, total: told.append((here, total)))
    total = (12 << 20) + 2
    assert told[-1] == (total, total)
    assert len(told) > 2
    assert told == sorted(told)
    assert {whole for _, whole in told} == {total}
    told.clear()
    fetch("memory://m", lambda here, total: told.append((here, total)))
    assert not told


def test_two_processes_download_once(tmp_path, cache):
    """local:// is fsspec's local files under a scheme that is not taken as a local path."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x" * 1000)
    counter = tmp_path / "count"
    context = multiprocessing.get_context("fork")
    arguments = (f"local://{tmp_path}/m", str(counter))
    processes = [context.Process(target=_fetch_counting, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counter.read_text() == "xx"

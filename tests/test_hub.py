"""Names of the Hugging Face Hub: found by the real huggingface_hub, in a real cache or on a server that plays the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.hub import MODEL_FILES, Resolved, resolve, split_name
from tests.hub_helpers import COMMIT, OTHER_COMMIT, fill_cache, hub_environment, serving

ROOT = Path(__file__).resolve().parent.parent
NAME = "some-team/tiny.model-1"
pytestmark = (
    pytest.mark.slow
)  # every look-up is a process of its own, because huggingface_hub reads its environment once

LOOK_UP = """
import json, sys
from megatron_tropd.hub import resolve
name, repo_type, flag, *patterns = sys.argv[1:]
try:
    found = resolve(name, repo_type=repo_type, allow_patterns=patterns, flag=flag)
except ValueError as error:
    print(json.dumps({"error": str(error)}))
else:
    files = sorted(str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file())
    print(json.dumps({"path": str(found.path), "repo": found.repo_id, "commit": found.commit, "files": files}))
"""
WANTED = {
    "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE",
}  # fmt: skip
UNWANTED = {
    "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "modeling_x.py", "README.md",
    "consolidated.safetensors", "tf_model.h5", "onnx/model.onnx", "training_args.bin", "adapter_model.safetensors",
}  # fmt: skip


def _start(environment, name, *, repo_type="model", flag="--hf-checkpoint", patterns=MODEL_FILES, cwd=None):
    command = [sys.executable, "-c", LOOK_UP, name, repo_type, flag, *patterns]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output)


def _look_up(environment, name, **options):
    return _finish(_start(environment, name, **options))


@pytest.fixture
def repository(tmp_path):
    """A directory with every kind of file that model repositories have."""
    for name in WANTED | UNWANTED:
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    return tmp_path / "repository"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-1.7B", ("Qwen/Qwen3-1.7B", "")),
        ("gpt2", ("gpt2", "")),
        ("a/b@main", ("a/b", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        (f"a/b@{COMMIT}", ("a/b", COMMIT)),
        ("/a/b", None), ("a/b/c", None), ("./a", None), ("../a", None), ("a/", None), ("a--b/c", None), ("", None),
        ("a/b@", None), ("a/b@../../x", None), ("a/b@/etc", None), ("a/b@x y", None), ("a b", None), ("a\0b", None),
        ("\u540d/b", None), ("a" * 5000, None), ("a/b.git", None), ("a/b@-x", None), ("a/b\n", None),
    ],
)  # fmt: skip
def test_what_can_be_a_name(name, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize("name", ["/nowhere", "a/b/c", "a\0b", "x" * 5000, "./a/b", "\ud800"])
def test_what_is_neither_a_path_nor_a_name_is_left_to_the_caller(name):
    found = resolve(name, repo_type="model", allow_patterns=MODEL_FILES, flag="--hf-checkpoint")
    assert found == Resolved(path=Path(name)) and found.source == ""


def test_a_cached_model_is_found_offline(tmp_path, repository):
    snapshot = fill_cache(tmp_path / "home", NAME, repository)
    environment = hub_environment(tmp_path / "home", offline=True)
    for name in (NAME, f"{NAME}@main", f"{NAME}@{COMMIT}"):
        found = _look_up(environment, name)
        assert (found["path"], found["repo"], found["commit"]) == (str(snapshot), NAME, COMMIT)


def test_an_existing_path_wins_over_the_cache(tmp_path, repository):
    fill_cache(tmp_path / "home", NAME, repository)
    for place in (tmp_path / NAME, tmp_path / f"{NAME}@main"):
        place.mkdir(parents=True)
    environment = hub_environment(tmp_path / "home", offline=True)
    for name in (NAME, f"{NAME}@main"):
        found = _look_up(environment, name, cwd=tmp_path)
        assert (found["path"], found["repo"], found["commit"]) == (name, "", "")


@pytest.mark.parametrize("revision", ["", "@other", f"@{OTHER_COMMIT}"])
def test_a_name_that_is_not_cached_is_one_message(tmp_path, repository, revision):
    fill_cache(tmp_path / "home", NAME if revision else "some/other", repository)
    error = _look_up(hub_environment(tmp_path / "home", offline=True), NAME + revision)["error"]
    assert error.startswith(f"--hf-checkpoint {NAME}{revision}: there is no such local path")
    assert str(tmp_path / "home") in error and "HF_HUB_OFFLINE is 1" in error and "\n" not in error


def test_a_hub_that_cannot_be_reached_is_one_message_and_a_cache_still_serves(tmp_path, repository):
    environment = hub_environment(tmp_path / "home", endpoint="http://127.0.0.1:9")
    error = _look_up(environment, NAME, flag="--teacher-hf-checkpoint")["error"]
    assert error.startswith(f"--teacher-hf-checkpoint {NAME}: there is no such local path")
    assert "http://127.0.0.1:9" in error and "HF_HUB_OFFLINE is not set" in error and "ConnectError" in error
    fill_cache(tmp_path / "home", NAME, repository)
    assert _look_up(environment, NAME)["commit"] == COMMIT


def test_a_download_takes_only_the_files_that_are_needed(tmp_path, repository):
    with serving() as hub:
        hub.add(NAME, repository, commits={"main": COMMIT, "v1": OTHER_COMMIT})
        environment = hub_environment(tmp_path / "home", endpoint=hub.endpoint)
        found = _look_up(environment, NAME)
        assert set(found["files"]) == WANTED == hub.downloads.keys() and found["commit"] == COMMIT
        assert _look_up(environment, f"{NAME}@v1")["commit"] == OTHER_COMMIT
        for name, answer in ((f"{NAME}@v2", "RevisionNotFoundError"), ("some-team/gone", "RepositoryNotFoundError")):
            error = _look_up(environment, name)["error"]
            assert error.startswith(f"--hf-checkpoint {name}: ") and answer in error and hub.endpoint in error
    offline = _look_up(hub_environment(tmp_path / "home", offline=True), NAME)
    assert offline == found, "the download is not found again in the cache"


def test_ranks_of_a_node_download_a_file_once(tmp_path, repository):
    (repository / "model-00001-of-00002.safetensors").write_bytes(bytes(32 << 20))
    with serving() as hub:
        hub.add(NAME, repository)
        ranks = [
            _start(hub_environment(tmp_path / "home", endpoint=hub.endpoint, LOCAL_RANK=str(rank)), NAME)
            for rank in range(4)
        ]
        found = [_finish(rank) for rank in ranks]
    assert found == [found[0]] * 4
    assert set(hub.downloads) == WANTED and set(hub.downloads.values()) == {1}
    assert (Path(found[0]["path"]) / "model-00001-of-00002.safetensors").stat().st_size == 32 << 20


def test_a_data_set_has_a_name_space_of_its_own(tmp_path, repository):
    with serving() as hub:
        hub.add(NAME, repository, repo_type="dataset")
        environment = hub_environment(tmp_path / "home", endpoint=hub.endpoint)
        found = _look_up(environment, NAME, repo_type="dataset", patterns=["*.md"], flag="--prompt-data")
        assert found["files"] == ["README.md"] and "datasets--some-team" in found["path"]
        assert "as a model of the Hugging Face Hub" in _look_up(environment, NAME)["error"]
        nothing = _look_up(environment, NAME, repo_type="dataset", patterns=["*.none"], flag="--prompt-data")
        assert nothing["error"].startswith(f"--prompt-data {NAME}: ") and "none of the files" in nothing["error"]

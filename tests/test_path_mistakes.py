"""Paths that cannot be used are found before anything is built, in one message that names the flag."""

from __future__ import annotations

import os
import re

import pytest

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.config import CheckpointConfig, LoggingConfig, TrainConfig
from megatron_tropd.setup.path_checks import check_directories
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.sglang.settings import load_keys
from tests.tiny_run import flags, make_world

pytestmark = pytest.mark.slow
LONG = "x" * 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, with everything besides that a path can wrongly name."""
    root = make_world(tmp_path_factory.mktemp("world"))
    (root / "file").write_text("x")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    (root / "empty").mkdir()
    return root


def _check(**paths):
    problems = Problems()
    logging = LoggingConfig(run_dir=paths.get("run_dir", ""), tensorboard_dir=paths.get("tensorboard_dir", ""))
    checkpoint = CheckpointConfig(save=paths.get("save", ""), load=paths.get("load", ""))
    check_directories(TrainConfig(logging=logging, checkpoint=checkpoint), problems)
    return problems.errors


@pytest.mark.parametrize("flag", ["run_dir", "save", "load", "tensorboard_dir"])
@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("file", "it is a file, not a directory"),
        ("file/below", "file is a file, not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/below/it", "Too many levels of symbolic links"),
        ("dangling", "No such file or directory"),
        (LONG, "File name too long"),
        (f"new/{LONG}/x", "File name too long"),
    ],
)
def test_directories_that_cannot_be(world, flag, path, fault):
    (error,) = _check(**{flag: str(world / path)})
    assert error.startswith(f"--{flag.replace('_', '-')} {str(world)[:20]}") and error.endswith(fault)


@pytest.mark.parametrize("path", ["empty", "new", "new/below/it", "."])
def test_directories_that_can_be_made(world, path, monkeypatch):
    monkeypatch.chdir(world)
    for place in (path, str(world / path)):
        assert _check(run_dir=place, save=place, load=place, tensorboard_dir=place) == []
    assert not (world / "new").exists(), "nothing is made by the check"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
@pytest.mark.fault(number=30)
def test_a_directory_that_may_not_be_written(world, tmp_path):
    tmp_path.chmod(0o500)
    assert _check(run_dir=str(tmp_path / "new"), load=str(tmp_path / "new")) == [
        f"--run-dir {tmp_path / 'new'}: {tmp_path} may not be written"
    ]


FLAGS = {
    "hf_checkpoint": "--hf-checkpoint", "teacher_hf_checkpoint": "--teacher-hf-checkpoint",
    "pretrained_checkpoint": "--pretrained-checkpoint", "teacher_load": "--teacher-load", "run_dir": "--run-dir",
    "save": "--save", "load": "--load",
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("path", ["file", "loop", "dangling", LONG, "file/below", "a\nb"])
def test_a_run_names_the_flag_of_a_bad_path(world, tmp_path, name, path):
    argv = flags(world, tmp_path / "run", **{name: world / path})
    if path == "a\nb" and name in ("run_dir", "save", "load"):
        assert make_run_spec(parse(argv), 1).config  # an odd name, but one that can be used
        return
    with pytest.raises(ConfigError) as caught:
        make_run_spec(parse(argv), 1)
    assert all(re.search(rf"{FLAGS[name]}\b", error) for error in caught.value.errors), caught.value.errors


@pytest.mark.parametrize("name", FLAGS)
def test_an_empty_path_is_a_mistake(world, tmp_path, name):
    with pytest.raises(ConfigError, match=f"{FLAGS[name]}: the value is empty"):
        parse([*flags(world, tmp_path / "run"), FLAGS[name], ""])


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "No such file"),
        ("empty", "Is a directory"),
        ("loop", "Too many levels"),
        (LONG, "File name too long"),
    ],
)
def test_a_key_file_that_cannot_be_read(world, path, reason):
    if (world / "empty").exists():
        (world / "empty").chmod(0o700)
    with pytest.raises(ValueError, match=f"--sglang-key-file .*{reason}"):
        load_keys({}, world / path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- a\n", "holds a list"),
        ("api-key: a\napi_key: b\n", "api-key: is given twice"),
        ("api-key: [hidden-hidden]\n", "api-key: expected api-key and admin-api-key, a word each"),
        ("other: hidden-hidden\n", "other: expected api-key and admin-api-key"),
        ("api-key: {hidden-hidden: 1}\n", "api-key: has a mapping in line 1"),
        ("api-key: 'hidden-hidden\n", "is not valid YAML"),
        ("api-key: hidden-hidden-hidden\nadmin-api-key:\n", "needs both keys"),
    ],
)
def test_a_key_file_that_is_none_does_not_show_the_keys(tmp_path, content, reason):
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ValueError, match=reason) as caught:
        load_keys({}, file)
    assert "hidden-hidden" not in str(caught.value)


def test_keys_are_read_as_they_are_written(tmp_path):
    """YAML 1.1 reads these as numbers: 0123... as an octal one."""
    file = tmp_path / "keys.yaml"
    file.write_text("api-key: 01234567012345670123\nadmin-api-key: 1_000_000_000_000_000\n")
    file.chmod(0o600)
    keys = load_keys({}, file)
    assert (keys.api, keys.admin) == ("01234567012345670123", "1_000_000_000_000_000")


def test_a_broken_url_is_one_message(world, tmp_path):
    argv = flags(
        world, tmp_path / "run", rollout_engine="sglang", update_weight_transport="planned",
        rollout_engine_urls="http://[::1",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"--rollout-engine-urls http://\[::1: expected http://host:port"):
        make_run_spec(parse(argv), 1)


@pytest.mark.parametrize(
    "path", [".x:y", "a..b:f", "a b:c", ":", "os:", ":f", "os:path", "os:path.join", "\u540d:f", "x" * 500 + ":f"]
)
def test_a_reward_function_that_is_none(world, tmp_path, path):
    argv = flags(world, tmp_path / "run", objective="grpo", reward_function=path)
    with pytest.raises(ConfigError, match="--reward-function"):
        make_run_spec(parse(argv), 1)


@pytest.mark.parametrize(
    "pattern", ["a{99999999999}", "(" * 9999 + ")" * 9999, "(?P<a>x)(?P<a>y)", "(?<=a*)(b)", "[z-a]()"]
)
def test_an_answer_pattern_that_is_none(world, tmp_path, pattern):
    argv = flags(world, tmp_path / "run", answer_pattern=pattern)
    with pytest.raises(ConfigError, match="--answer-pattern") as caught:
        make_run_spec(parse(argv), 1)
    assert len(str(caught.value)) < 400

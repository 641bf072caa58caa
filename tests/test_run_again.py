"""The same command, given again after a launch that left no checkpoint."""

from __future__ import annotations

import json

import pytest

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.setup.run_files import open_files
from tests.tiny_run import flags


def _open(tmp_path, start_step=None, **changes):
    return open_files(parse(flags(tmp_path, tmp_path / "run", **changes)), start_step)


def _logged(tmp_path):
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 3}) + "\n")


def test_the_command_works_again_and_says_where_the_former_log_is(tmp_path):
    files = _open(tmp_path)
    assert files.notes == ()
    _logged(tmp_path)
    files.close()
    files = _open(tmp_path)
    (note,) = files.notes
    assert "ended before its first checkpoint" in note and "now in interrupted_1/" in note
    assert (tmp_path / "run/interrupted_1/metrics.jsonl").is_file() and not (tmp_path / "run/metrics.jsonl").exists()
    files.close()


def test_checkpoints_in_another_place_are_not_forgotten(tmp_path):
    _open(tmp_path, save=tmp_path / "elsewhere").close()
    _logged(tmp_path)
    (tmp_path / "elsewhere/iter_0000002").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"up to step 2, are in {tmp_path / 'elsewhere'}: give --save"):
        _open(tmp_path)
    assert (tmp_path / "run/metrics.jsonl").is_file() and not list(tmp_path.glob("run/interrupted*"))
    files = _open(tmp_path, start_step=2, save=tmp_path / "elsewhere")
    assert files.notes == ()
    files.close()


def test_a_damaged_config_is_no_obstacle(tmp_path):
    _open(tmp_path).close()
    _logged(tmp_path)
    for text in ("", "[1]", "{", "save: [1, 2]", "save: 7"):
        (tmp_path / "run/config.yaml").write_text(text)
        _open(tmp_path).close()

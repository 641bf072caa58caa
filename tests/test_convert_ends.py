"""How a conversion by several ranks ends: one message on the node, whichever rank has the end first."""

from __future__ import annotations

import pytest

from tests.hf_models import save_hf_checkpoint
from tests.torchrun_jobs import environment, output_from_imports_on, output_of, output_with_delay, own_tracebacks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("delayed", [0, 1])
def test_an_error_that_all_ranks_have(tmp_path, delayed):
    """The ranks agree on the error; then one is delayed until the other has ended."""
    source = save_hf_checkpoint(tmp_path / "hf", "qwen3", num_hidden_layers=1)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    argv = ["hf-to-megatron", "--hf-checkpoint", str(source), "--save", str(tmp_path / "there")]
    env = environment(
        COMMAND="checkpoint_convert.__main__", AT="checkpoint_convert.hf_to_megatron:convert", DELAYED_RANK=str(delayed)
    )
    text = output_of(argv, tmp_path, env, "tests.ending_command")
    assert text.count("already holds files; choose another directory or pass --overwrite") == 1, text
    assert own_tracebacks(text) == 0 and "exitcode  : 2" in text


@pytest.mark.parametrize("delayed", [None, 0, 1])
def test_an_error_in_the_flags(tmp_path, delayed):
    text = output_with_delay(delayed, ["--save", "x"], tmp_path, "checkpoint_convert.hf_to_megatron")
    assert text.count("error: the following arguments are required: --hf-checkpoint") == 1, text
    assert text.count("usage: ") == 1 and own_tracebacks(text) == 0 and "exitcode  : 2" in text


def test_help(tmp_path):
    text = output_from_imports_on(["--help"], tmp_path, module="checkpoint_convert.hf_to_megatron")
    assert text.count("usage: ") == 1 and text.endswith("exited with 0"), text

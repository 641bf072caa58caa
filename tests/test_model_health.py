"""A model that scores is checked before a run learns from it: against transformers, against itself, against sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron, megatron_to_megatron
from megatron_tropd.checkpoints.directory import read_metadata
from megatron_tropd.checkpoints.known_logprobs import read_known_logprobs
from megatron_tropd.parallel.groups import release_groups
from tests.damage import edit_json, flip_hf, flip_megatron
from tests.hf_models import read_tensors
from tests.test_same_run import _train
from tests.tiny_run import flags, make_world

LM_HEAD, DOWN = "lm_head.weight", "model.layers.1.mlp.down_proj.weight"


def _convert(convert, *argv):
    release_groups()
    convert([str(word) for word in argv])


@pytest.fixture(scope="module")
def world(tmp_path_factory, ranks):
    """A world whose teacher and student are also converted, with --verify-logits."""
    world = make_world(tmp_path_factory.mktemp("world"))
    for model in ("teacher", "student"):
        argv = ("--hf-checkpoint", world / model, "--save", world / f"megatron_{model}", "--verify-logits")
        ranks(1).run(_convert, hf_to_megatron.convert, *argv)
    return world


@pytest.fixture
def copy(world, tmp_path):
    return Path(shutil.copytree(world, tmp_path / "copy"))


def _start(ranks, world, run, size=1, stop=1, **changes):
    answers = ranks(size).run(_train, flags(world, run, **{"save_interval": 1, **changes}), stop)
    assert len({error for error, _, _ in answers}) == 1, "every rank has the same error"
    return answers[0]


def test_the_converter_records_what_transformers_says(world):
    import transformers

    known = read_known_logprobs(world / "megatron_teacher")
    assert "known_logprobs.json" in read_metadata(world / "megatron_teacher").files
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float64).eval()
    assert len(known.sequences) == 4
    for sequence, logprobs in zip(known.sequences, known.logprobs, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        wanted = log_p.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
        assert logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, {"teacher_tensor_model_parallel_size": 2}), (2, {"teacher_pipeline_model_parallel_size": 2}), (1, {"bf16": True})],
    ids=["TP2", "PP2", "bf16"],
)  # fmt: skip
def test_a_healthy_converted_teacher_passes(ranks, world, tmp_path, size, layout):
    load = {"teacher_hf_checkpoint": None, "teacher_load": world / "megatron_teacher"}
    error, printed, step = _start(ranks, world, tmp_path / "run", size, **load, **layout)
    assert error is None and step == 1 and "known_logprobs" not in printed


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_a_bit_that_flipped_while_it_was_converted_is_refused(ranks, copy, tmp_path, role):
    """In a projection inside the model, where no number of a step would be absurd: losses stay ordinary."""
    source = "teacher" if role == "teacher" else "student"
    row = read_tensors(copy / source)["model.layers.1.self_attn.o_proj.weight"][0]
    flip_megatron(copy / f"megatron_{source}/release", row, bit=24)
    changes = {"teacher_hf_checkpoint": None, "teacher_load": copy / "megatron_teacher"}
    if role == "reference":
        changes |= {"objective": "gopd", "reference_load": copy / "megatron_student"}
    layout = {"teacher_tensor_model_parallel_size": 2}
    error, _, _ = _start(ranks, copy, tmp_path / "run", 2, **changes, **layout)
    assert error.startswith(f"ConfigError: 1 configuration error:\n  - the {role} (--{role}-load ")
    assert "nats on average from those of transformers, above --parity-limit 0.001" in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    error, printed, step = _start(ranks, copy, tmp_path / "run2", 2, **changes, **layout, on_parity="warn")
    assert error is None and step == 1 and f"warning: the {role} (--{role}-load " in printed


def test_a_bit_that_flips_in_the_file_is_refused_by_its_digest(ranks, copy, tmp_path):
    (path,) = (copy / "megatron_teacher/release").glob("*.distcp")
    wanted = read_tensors(copy / "teacher")[LM_HEAD][40].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(wanted) + 3] ^= 1 << 6
    path.write_bytes(data)
    load = {"teacher_hf_checkpoint": None, "teacher_load": copy / "megatron_teacher"}
    error, _, _ = _start(ranks, copy, tmp_path / "run", **load)
    assert "is damaged: its sha256 is" in error


@pytest.mark.parametrize(
    ("role", "weight", "message"),
    [
        ("teacher", LM_HEAD, r"nats per token, more than 10 below the -4.88 of a uniform distribution"),
        ("reference", LM_HEAD, r"nats per token, more than 10 below the -4.88 of a uniform distribution"),
        ("teacher", DOWN, r"gives every token of --prompt-data the probability 1 / 131"),
    ],
)  # fmt: skip
def test_an_hf_model_damaged_before_the_first_start_is_refused(ranks, copy, tmp_path, role, weight, message):
    source = "teacher" if role == "teacher" else "student"
    index = int(read_tensors(copy / source)[weight].abs().flatten().argmin())
    flip_hf(copy / source, weight, index)
    changes = {"objective": "gopd", "reference_hf_checkpoint": copy / "student"} if role == "reference" else {}
    if role == "reference":  # the student is to be healthy
        changes["pretrained_checkpoint"] = copy / "megatron_student"
    error, _, _ = _start(ranks, copy, tmp_path / "run", 2, **changes)
    assert f"the {role} (--{role}-hf-checkpoint {copy / source})" in error and message in error
    assert "--on-spike warn" in error
    error, printed, _ = _start(ranks, copy, tmp_path / "run2", 2, **changes, on_spike="warn", on_parity="warn")
    assert f"warning: the {role} (" in printed and message in printed
    assert (error is None) or "NonFiniteStep" in error


def test_what_a_model_gave_at_the_start_is_compared_at_every_resume(ranks, world, tmp_path):
    run = tmp_path / "run"
    assert _start(ranks, world, run)[0] is None
    folder = run / "checkpoints/iter_0000001"
    known = json.loads((folder / "run.json").read_text())["models"]["teacher"]["known"]
    assert len(known["sequences"]) == 8
    error, printed, _ = _start(ranks, world, run, 2, stop=2, teacher_pipeline_model_parallel_size=2)
    assert error is None and "recorded when the run started" not in printed  # another layout
    kept = json.loads((run / "checkpoints/iter_0000002/run.json").read_text())["models"]["teacher"]["known"]
    assert kept == known, "the numbers of the first start are kept"

    def shift(value):
        logprobs = value["models"]["teacher"]["known"]["logprobs"]
        logprobs[0] = [logprob - 20.0 for logprob in logprobs[0]]

    edit_json(run / "checkpoints/iter_0000002", "run.json", shift)
    error, _, _ = _start(ranks, world, run, 2, stop=3)
    assert "the teacher (--teacher-hf-checkpoint" in error and "recorded when the run started" in error
    error, printed, step = _start(ranks, world, run, 2, stop=3, on_parity="warn")
    assert error is None and step == 3 and "recorded when the run started" in printed


def test_a_copied_checkpoint_keeps_what_is_known_of_it(ranks, world, run_of_a_step, tmp_path):
    for name, source, more in (
        ("weights", world / "megatron_teacher", ("--no-load-optim",)),
        ("run", run_of_a_step / "checkpoints", ()),
    ):
        ranks(1).run(_convert, megatron_to_megatron.convert, "--load", source, "--save", tmp_path / name, *more)
    assert read_known_logprobs(tmp_path / "weights") == read_known_logprobs(world / "megatron_teacher")
    error, _, _ = _start(ranks, world, tmp_path / "other", load=tmp_path / "run", objective="opd")
    assert "--objective: tropd -> opd" in error


@pytest.fixture
def run_of_a_step(ranks, world, tmp_path):
    assert _start(ranks, world, tmp_path / "trained")[0] is None
    return tmp_path / "trained"

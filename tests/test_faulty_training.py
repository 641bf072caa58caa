"""Runs on servers that misbehave: what they train on was written by the weights of the step, or they make no step."""

from __future__ import annotations

import contextlib

import pytest

from tests.faulty_answers import ANOTHER, NOT_JSON, NUMBERS, SHAPES, STALE, WRITTEN
from tests.faulty_server import FaultyServer
from tests.tiny_run import flags, make_world, reports_here

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@contextlib.contextmanager
def _servers(number):
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(FaultyServer(seed, num_hidden_layers=2, num_key_value_heads=2))
            for seed in range(number)
        ]


def _argv(world, run_dir, servers, **changes):
    settings = {
        "rollout_engine": "sglang", "tensor_model_parallel_size": 2, "train_iters": STEPS, "parity_limit": 1e-4,
        "sglang_request_timeout": 60, "sglang_start_timeout": 60, **changes,
    }  # fmt: skip
    return [*flags(world, run_dir, **settings), "--rollout-engine-urls", *(server.url for server in servers)]


@pytest.mark.fault(number=18)
@pytest.mark.fault(number=19)
def test_a_run_whose_every_prompt_is_answered_wrongly_at_first_trains_on_true_tokens_only(ranks, world, tmp_path):
    """Each server spoils its first answer to every prompt, in all ways in turn; one takes half of an update."""
    with _servers(2) as servers:
        for server in servers:
            server.spoils_first = tuple({**NOT_JSON, **SHAPES, **NUMBERS, **ANOTHER, **WRITTEN, **STALE})
        with servers[0].playing("reset at once", "/update_weights_from_tensor", times=1, skip=1):
            reports = ranks(2).run(reports_here, _argv(world, tmp_path / "run", servers))[0]
        spoiled = sum(server.played for server in servers)
    assert [report.weight_version for report in reports] == list(range(1, STEPS + 1))
    for report in reports:
        assert report.metrics["parity/logprob_abs_diff_max"] < 1e-4, "of every token, against the trainer's weights"
    counts = reports[-1].metrics
    assert counts["engine/reissued"] >= STEPS * 4 and spoiled >= STEPS * 4
    assert counts["engine/bad_responses"] + counts["engine/stale_weights"] > 0 and counts["engine/restarts"] >= 1
    assert counts["engine/given_up"] == 0


@pytest.mark.fault(number=21)
def test_a_run_on_a_server_that_has_the_right_version_and_wrong_weights_makes_no_step(ranks, world, tmp_path):
    """It cannot hash its weights, so that the probes alone tell."""
    with _servers(2) as servers:
        honest, liar = servers
        liar.mishandle, honest.checker, liar.checker = "swapped", "absent", "absent"
        with pytest.raises(AssertionError) as failure:
            ranks(2).run(reports_here, _argv(world, tmp_path / "run", servers))
    text = str(failure.value)
    assert f"weight version 0, engine 1 ({liar.url}): the engine's log-probabilities differ" in text, text[-3000:]
    assert "--parity-limit 0.0001" in text and "ParityError" in text
    assert (
        not (tmp_path / "run" / "metrics.jsonl").exists()
        or '"step"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    )

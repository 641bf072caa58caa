"""Runs of the command whose rollouts are written by real SGLang servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace

import pytest

from megatron_tropd.cli import ConfigError, parse, to_flags
from megatron_tropd.setup.engine_checks import check_engine_layout
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.training.parity import ParityAlarm, ParityError, probe_sequences
from megatron_tropd.types import Prompt
from tests.routers import needs_router, routing
from tests.sglang_helpers import KEYS, PYTHON, needs_sglang
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import process, start, wait_for_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _sglang_flags(world, run_dir, **changes):
    settings = {
        "rollout_engine": "sglang", "sglang_python": PYTHON, "tensor_model_parallel_size": 2,
        "sglang_max_total_tokens": 2048, "sglang_max_running_requests": 16, "parity_limit": 1e-4, **changes,
    }  # fmt: skip
    return flags(world, run_dir, **settings)


def _steps_with_a_killed_server(argv, run_dir, tmp_path):
    """(records of all steps, what the job printed); the server is killed after the second step."""
    metrics = run_dir / "metrics.jsonl"
    with start(argv, tmp_path) as job:
        wait_for_steps(metrics, 2, job, timeout=400)
        os.kill(process(job.pid, "server/launch.py"), signal.SIGKILL)
        assert job.wait(timeout=400) == 0, job.output[-4000:]
    return [r for r in map(json.loads, metrics.read_text().splitlines()) if r["kind"] == "step"], job.output


@needs_sglang
@pytest.mark.parametrize(
    "transport",
    [
        pytest.param("auto", marks=pytest.mark.thorough),
        "planned",
        pytest.param("planned-shared", marks=pytest.mark.thorough),
    ],
)
def test_a_run_on_a_server_that_is_killed_in_the_middle(world, tmp_path, transport):
    """The server comes back with the weights of the step; every step is made once, on tokens of its own weights."""
    run_dir, num_steps = tmp_path / "run", 5
    argv = _sglang_flags(
        world, run_dir, train_iters=num_steps, update_weight_transport=transport,
        rollout_release_memory=transport == "planned",  # without a GPU the server frees nothing, but obeys
    )  # fmt: skip
    steps, output = _steps_with_a_killed_server(argv, run_dir, tmp_path)
    assert [step["step"] for step in steps] == list(range(1, num_steps + 1))
    assert [step["weight_version"] for step in steps] == list(range(1, num_steps + 1))
    for step in steps:
        metrics = step["metrics"]
        assert metrics["parity/logprob_abs_diff_max"] <= 1e-4 and metrics["parity/probe_abs_diff_mean"] <= 1e-4
        assert step["tokens"]["on_policy"] > 0
    restarts = [step["metrics"]["engine/restarts"] for step in steps]
    assert restarts[0] == 0 and restarts[-1] == 1, restarts
    logs = sorted(path.name for path in (run_dir / "engines").iterdir())
    assert logs == ["sglang-0-start-1.log", "sglang-0-start-2.log"]
    assert "planned update" not in output, "sent whole tensors instead"


@needs_sglang
@pytest.mark.thorough
def test_a_run_with_lag_on_a_server_that_is_killed_while_it_writes_the_next_batch(world, tmp_path):
    """What was not written yet is written by the weights that the trainer has when it asks for the batch."""
    run_dir, num_steps = tmp_path / "run", 8
    argv = _sglang_flags(world, run_dir, train_iters=num_steps, rollout_lag=1)
    steps, _ = _steps_with_a_killed_server(argv, run_dir, tmp_path)
    assert [step["weight_version"] for step in steps] == list(range(1, num_steps + 1))
    lags = [step["metrics"]["rollout/lag_mean"] for step in steps]
    assert lags[0] == 0 and lags[1] == 1 and all(0 <= lag <= 1 for lag in lags)
    assert steps[-1]["metrics"]["engine/restarts"] >= 1
    gaps = [step["metrics"].get("parity/probe_abs_diff_mean") for step in steps[1:-1]]
    # A server that was given its weights again for what it had not written needs no push before the next batch.
    assert gaps.count(None) <= 1 and all(gap <= 1e-4 for gap in gaps if gap is not None), gaps


def _steps_then_other_weights(argv):
    """On this rank: the metrics of every step, what a push of weights that were not trained comes to, and whether a
    router answered prompts."""
    import torch.distributed as dist

    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    run = assembled.run
    try:
        push_weights(run)
        steps = [train_step(run, step)[0].metrics for step in range(run.config.training.train_iters)]

        def other():
            for name, tensor in run.export():
                yield name, tensor * 1.5 if name == "model.norm.weight" else tensor

        run.student.version += 1
        with pytest.raises(ParityError) as error:
            push_weights(replace(run, export=other))
        fleet = run.engines._fleet  # of rank 0
        routed = fleet is not None and fleet.router is not None and fleet.router.received_bytes > 0
    finally:
        close(assembled)
    return steps, str(error.value), routed


@pytest.mark.parametrize("router", [False, pytest.param(True, marks=needs_router)])
def test_servers_given_by_url_and_weights_that_were_not_trained(ranks, sglang, world, tmp_path, router):
    """Two servers of somebody else, with a router before them or without, weights as bytes.  Whole and hashed as they
    were sent, wrong weights are still found before anything is written by them."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"api-key: {KEYS.api}\nadmin-api-key: {KEYS.admin}\n")
    keys.chmod(0o600)
    argv = flags(
        world, tmp_path / "run", hf_checkpoint=sglang.settings.hf_dir, train_iters=2, tensor_model_parallel_size=2,
        rollout_engine="sglang", sglang_key_file=keys, parity_limit=1e-4,
    )  # fmt: skip
    urls = [engine.server.url for engine in sglang.engines]
    argv += ["--rollout-engine-urls", *urls]
    with routing(urls, tmp_path / "log", key=KEYS.api) if router else contextlib.nullcontext() as before:
        argv += ["--rollout-router-url", before.url] if before else []
        (steps, message, routed), _ = ranks(2).run(_steps_then_other_weights, argv)
    assert all(metrics["parity/logprob_abs_diff_max"] <= 1e-4 for metrics in steps) and routed == router
    assert "weight version 3, engine 0" in message and "above --parity-limit 0.0001" in message


def test_flags_of_sglang_are_handed_through(world, tmp_path):
    (tmp_path / "c.yaml").write_text("sglang-mem-fraction-static: 0.3\nsglang-disable-radix-cache: true\n")
    config = parse(
        [*_sglang_flags(world, tmp_path), "--config", str(tmp_path / "c.yaml"), "--sglang-log-level=warning"]
    )
    assert dict(config.sglang_flags) == {
        "max-total-tokens": ("2048",), "max-running-requests": ("16",), "log-level": ("warning",),
        "mem-fraction-static": ("0.3",), "disable-radix-cache": (),
    }  # fmt: skip
    assert to_flags(config)["sglang-disable-radix-cache"] is True
    assert to_flags(config)["sglang-log-level"] == "warning"


def test_words_after_another_flag_are_not_sglangs():
    with pytest.raises(ConfigError, match="unexpected argument 'b'"):
        parse(["--sglang-lora-paths", "a", "--lr", "1e-5", "b"])
    config = parse(["--sglang-lora-paths", "a", "b", "--lr", "1e-5", "--sglang-ep-size", "2"])
    assert config.sglang_flags == {"lora-paths": ("a", "b"), "ep-size": ("2",)} and config.training.lr == 1e-5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--sglang-key-fil", "did you mean --sglang-key-file"),
        ("--sglang-", "expected the name"),
        ("--sglang-mem_fraction", "joined by '-'"),
    ],
)
def test_a_misspelled_flag_is_not_handed_to_sglang(word, message):
    with pytest.raises(ConfigError, match=message):
        parse([word, "x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sglang_python": "/nowhere/python"}, "--sglang-python /nowhere/python does not exist"),
        ({"sglang_host": "0.0.0.0"}, "can be reached from other machines"),
        ({"sglang_api_key": "secret-secret-secret"}, "--api-key cannot be passed through"),
        ({"distributed_timeout_minutes": 9}, "240 s + --sglang-request-timeout 300 s = 540 s"),
        ({"sglang_start_timeout": 0}, "--sglang-start-timeout 0.0 must be positive"),
        ({"adam_eps": 0}, "--adam-eps 0.0 must be positive"),
        ({"update_weight_transport": "planned", "sglang_tp_size": 3}, "--sglang-tp-size 3 does not divide"),
        ({"update_weight_transport": "planned", "update_weight_buffer_size": 64}, "--update-weight-buffer-size"),
        ({"update_weight_transport": "planned", "rollout_engine_urls": "http://10.0.0.7:30000"}, "choose bytes"),
        ({"rollout_num_engines": 0}, "--rollout-num-engines 0 must be at least 1"),
        ({"rollout_gpu_ids": "x"}, "--rollout-gpu-ids x"),
        ({"rollout_engine": "vllm"}, "is not one of embedded, sglang"),
    ],
)
def test_each_mistake_has_a_message_before_anything_starts(world, tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        make_run_spec(parse(_sglang_flags(world, tmp_path / "run", **{"sglang_python": "/bin/sh", **changes})), 2)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_tied_experts_are_refused(world, tmp_path):
    """SGLang's model of them would keep a head of its own, which nothing is pushed to."""
    argv = _sglang_flags(world, tmp_path / "run", sglang_python="/bin/sh")
    models = make_run_spec(parse(argv), 2).models
    arch = replace(models.student.arch, family="qwen3_moe", num_experts=4, tie_word_embeddings=True)
    found = Problems()
    check_engine_layout(parse(argv), replace(models, student=replace(models.student, arch=arch)), found)
    assert len(found.errors) == 1 and "tie_word_embeddings); use --rollout-engine embedded" in found.errors[0]


def test_what_the_engine_does_not_read_is_a_warning(world, tmp_path):
    changes = {"rollout_engine": "embedded", "rollout_num_engines": 3}
    warnings = make_run_spec(parse(_sglang_flags(world, tmp_path / "run", **changes)), 2).warnings
    for flag in ("--rollout-num-engines", "--sglang-python", "--sglang-max-total-tokens"):
        assert f"--rollout-engine embedded does not use {flag}" in warnings
    assert not any("parity" in warning for warning in warnings)
    urls = {"update_weight_transport": "planned", "rollout_engine_urls": "http://127.0.0.1:30000"}
    (warning,) = make_run_spec(parse(_sglang_flags(world, tmp_path / "run", **urls)), 2).warnings
    assert "--custom-weight-loader megatron_tropd.weights.engine_loader.load" in warning


def test_a_gap_above_the_limit_stops_or_warns():
    assert ParityAlarm(1e-3, "stop").judge(9e-4, "rollouts of step 1") is None
    for gap in (2e-3, float("nan")):
        with pytest.raises(ParityError, match=r"rollouts of step 1: .* above --parity-limit 0\.001"):
            ParityAlarm(1e-3, "stop").judge(gap, "rollouts of step 1")
        assert "--parity-limit" in ParityAlarm(1e-3, "warn").judge(gap, "rollouts of step 1")


def test_probes_are_the_first_prompts_with_two_tokens_or_more():
    prompts = [
        Prompt(uid=1, token_ids=(5,)),
        Prompt(uid=2, token_ids=(5,), teacher_response_ids=(6, 7)),
        Prompt(uid=3, token_ids=tuple(range(3, 100))),
    ]
    short, long = probe_sequences(prompts)
    assert short.token_ids == (5, 6, 7) and len(short.logprobs) == 2
    assert len(long.token_ids) == 64

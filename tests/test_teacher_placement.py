"""Flags of a teacher on servers: what they become, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tropd.cli import ConfigError, parse, to_flags
from megatron_tropd.setup.engine_settings import sglang_settings
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.setup.teacher_servers import teacher_server_settings
from megatron_tropd.sglang.server.command import server_arguments, server_environment
from tests.tiny_run import flags, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _argv(world, run_dir, **changes):
    return flags(world, run_dir, **{"teacher_placement": "server", "sglang_python": "/bin/sh", **changes})


def test_flags_become_the_settings_and_the_command_line_of_a_server(world, tmp_path):
    argv = _argv(world, tmp_path / "run", teacher_num_servers=2, teacher_sglang_tp_size=2, teacher_sglang_ep_size=2)
    argv += [
        "--teacher-gpu-ids",
        "4",
        "5",
        "6",
        "7",
        "--sglang-log-level",
        "error",
        "--teacher-sglang-quantization=fp8",
    ]
    spec = make_run_spec(parse(argv), 2)
    assert dict(spec.config.teacher_sglang_flags) == {"ep-size": ("2",), "quantization": ("fp8",)}
    assert dict(spec.config.sglang_flags) == {"log-level": ("error",)}
    assert to_flags(spec.config)["teacher-sglang-ep-size"] == "2"
    settings = teacher_server_settings(spec.models.teachers[0], spec.gpus.of_teacher("teacher"))
    words = server_arguments(settings, 1, 4000, 128)
    for pair in ("--load-format auto", "--tp-size 2", "--ep-size 2", "--quantization fp8", "--dtype float32"):
        assert pair in " ".join(words), pair
    assert words[words.index("--model-path") + 1] == str(world / "teacher")
    assert "--log-level" not in words and settings.gpus_of(1) == (6, 7)
    assert settings.log_dir == tmp_path / "run" / "teacher"
    assert "TROPD_SGLANG_API_KEY" not in server_environment(settings, 0, {"TROPD_SGLANG_API_KEY": "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "eopd"}, "--objective eopd needs the teacher's entropy at every token, which SGLang does not give: "
         "--teacher-placement server does not work with it, use --teacher-placement colocated or dedicated"),
        ({"objective": "topk_rkl"}, "--objective topk_rkl asks for log-probabilities at ids of each token's own"),
        ({"objective": "full_rkl"}, "--objective full_rkl compares with the teacher's full distribution"),
        ({"gradient_diagnostics_interval": 2}, "--gradient-diagnostics-interval 2 compares with the teacher's full "
         "distribution, which SGLang does not give: leave it at 0 with --teacher-placement server"),
        ({"objective": "sft", "guidance": "none"}, "--objective sft has no teacher: leave out --teacher-placement server"),
        ({"teacher_load": "x"}, "--teacher-load x: --teacher-placement server reads the weights of"),
        ({"teacher_num_servers": 0}, "--teacher-num-servers 0 must be at least 1"),
        ({"teacher_sglang_tp_size": 0}, "--teacher-sglang-tp-size 0 must be at least 1"),
        ({"teacher_gpu_ids": "a"}, "--teacher-gpu-ids a: expected numbers of GPUs"),
        ({"teacher_gpu_ids": "3", "teacher_num_servers": 2}, "1 GPU ids (--teacher-gpu-ids) for 2 teacher servers "
         "(--teacher-num-servers) of 1 GPUs each (--teacher-sglang-tp-size)"),
        ({"teacher_urls": "10.0.0.3:1"}, "--teacher-urls 10.0.0.3:1: expected http://host:port"),
        ({"teacher_router_url": "http://127.0.0.1:3"}, "--teacher-router-url http://127.0.0.1:3 needs --teacher-urls"),
        ({"rollout_engine": "sglang", "rollout_router_url": "http://127.0.0.1:3"},
         "--rollout-router-url http://127.0.0.1:3 needs --rollout-engine-urls"),
        ({"teacher_urls": "http://10.0.0.3:30000"}, "SGLang at 10.0.0.3 can be reached from other machines"),
        ({"teacher_urls": "http://127.0.0.1:3", "rollout_engine_urls": "http://127.0.0.1:3"},
         "--teacher-urls http://127.0.0.1:3: the same servers are in --rollout-engine-urls"),
        ({"sglang_python": "/no/python"}, "or give the URLs of running servers with --teacher-urls"),
        ({"teacher_sglang_load_format": "dummy"}, "--teacher-sglang-load-format: --load-format cannot be passed through "
         "to SGLang: weights are those of --teacher-hf-checkpoint"),
        ({"teacher_sglang_dp_size": "2"}, "use --teacher-num-servers"),
        ({"teacher_sglang_tp_siz": "2"}, "unknown flag --teacher-sglang-tp-siz; did you mean --teacher-sglang-tp-size?"),
        ({"distributed_timeout_minutes": 9}, "must exceed --sglang-start-timeout 240 s"),
    ],
)  # fmt: skip
def test_each_mistake_has_a_message_before_anything_starts(world, tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        make_run_spec(parse(_argv(world, tmp_path / "run", **changes)), 2)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_routers_become_settings(world, tmp_path):
    routers = {"teacher_router_url": "http://127.0.0.1:3", "rollout_router_url": "http://127.0.0.1:4"}
    urls = {"teacher_urls": "http://127.0.0.1:5", "rollout_engine_urls": "http://127.0.0.1:6"}
    spec = make_run_spec(parse(_argv(world, tmp_path / "run", rollout_engine="sglang", **routers, **urls)), 2)
    assert teacher_server_settings(spec.models.teachers[0], ()).router_url == routers["teacher_router_url"]
    assert sglang_settings(spec.config, spec.models.student, ()).router_url == routers["rollout_router_url"]


def test_mistakes_come_in_one_message(world, tmp_path):
    with pytest.raises(ConfigError) as error:
        make_run_spec(parse(_argv(world, tmp_path / "run", objective="eopd", teacher_load="x", lr=-1)), 2)
    assert len(error.value.errors) >= 3


def test_what_a_placement_does_not_read_is_a_warning(world, tmp_path):
    argv = _argv(world, tmp_path / "run", teacher_pipeline_model_parallel_size=2, teacher_offload=True)
    warnings = make_run_spec(parse(argv), 2).warnings
    assert "--teacher-placement server does not use --teacher-pipeline-model-parallel-size" in warnings
    assert "--teacher-placement server does not use --teacher-offload" in warnings
    assert not any("--sglang-python" in warning for warning in warnings), "the teacher's servers use it"
    changes = {"teacher_placement": "colocated", "teacher_num_servers": 3, "teacher_sglang_x": "y"}
    warnings = make_run_spec(parse(_argv(world, tmp_path / "run", **changes)), 2).warnings
    for flag in ("--teacher-num-servers", "--teacher-sglang-x"):
        assert f"--teacher-placement colocated does not use {flag}" in warnings
    assert "--rollout-engine embedded does not use --sglang-python" in warnings


def test_flags_of_both_kinds_of_servers_stand_in_a_file(tmp_path):
    path = Path(tmp_path / "c.yaml")
    path.write_text("sglang-x: 1\nteacher-sglang-x: 2\nteacher-sglang-disable-radix-cache: true\n")
    config = parse(["--config", str(path), "--teacher-sglang-x=3"])
    assert json.loads(json.dumps(config.sglang_flags)) == {"x": ["1"]}
    assert config.teacher_sglang_flags == {"x": ("3",), "disable-radix-cache": ()}

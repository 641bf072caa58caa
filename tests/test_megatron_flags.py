"""Megatron's own settings by their own names: on the command line, in YAML, in Megatron; and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from megatron_tropd.cli import ConfigError, parse, to_flags
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.megatron_flags import find_field, megatron_fields, refusal
from tests.tiny_run import flags, make_world

GIVEN = {
    "overlap-grad-reduce": True, "bucket-size": 2000, "gradient-accumulation-fusion": False, "attention-backend": "fused",
    "moe-router-dtype": "fp64", "init-method-std": 0.5, "decoupled-weight-decay": False,
}  # fmt: skip
WORDS = [
    "--overlap-grad-reduce", "--bucket-size=2000", "--no-gradient-accumulation-fusion", "--attention-backend", "fused",
    "--moe-router-dtype", "fp64", "--init-method-std", "0.5", "--no-decoupled-weight-decay",
]  # fmt: skip


def _errors(argv):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return caught.value.errors


def test_flags_and_yaml_give_the_same_values(tmp_path):
    config = parse([*WORDS, "--lr", "2"])
    assert config.megatron_flags == GIVEN and config.training.lr == 2
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_flags(config)))  # what a run directory holds
    assert parse(["--config", str(path)]) == config
    changed = parse(["--config", str(path), "--no-overlap-grad-reduce", "--bucket-size", "1", "--bucket-size", "3"])
    assert changed.megatron_flags == {**GIVEN, "overlap-grad-reduce": False, "bucket-size": 3}


def test_all_mistakes_come_together(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("overlap-p2p-comms: true\nhidden-size: 3\nbucket-size: many\n")
    argv = [
        "--config", str(path), "--overlap-grad-reduc", "--fp16", "--moe-router-dtype", "fp8", "--align-param-gather",
        "yes", "--bucket-size", "--wgrad-deferral-limit", "1", "2",
    ]  # fmt: skip
    errors = "\n".join(_errors(argv))
    for part in (
        "unknown flag --overlap-grad-reduc; did you mean --overlap-grad-reduce?",
        "overlap-p2p-comms; did you mean overlap-p2p-comm?",
        "hidden-size: cannot be set: it says what the network computes, and is read from the config.json",
        "bucket-size: 'many' is not an integer",
        "--fp16 cannot be set: give --bf16",
        "--moe-router-dtype: 'fp8' is not one of fp32, fp64",
        "--align-param-gather takes no value: give --align-param-gather or --no-align-param-gather alone",
        "--bucket-size is followed by 0 values; expected one",
        "--wgrad-deferral-limit is followed by 2 values; expected one",
    ):
        assert part in errors, errors


@pytest.mark.parametrize(
    ("flag", "ours"),
    [("virtual-pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank"),
     ("num-layers-in-first-pipeline-stage", "--decoder-first-pipeline-num-layers"),
     ("num-layers-in-last-pipeline-stage", "--decoder-last-pipeline-num-layers")],
)  # fmt: skip
def test_a_setting_with_another_name_here_names_it(flag, ours):
    assert ours in _errors([f"--{flag}", "2"])[0] and ours.removeprefix("--") in to_flags(parse([]))


@pytest.mark.skipif(platform.megatron_version() != (0, 16), reason="the list is of 0.16; others have fewer of them")
def test_refused_names_are_fields_of_megatron():
    """A refusal of a name that Megatron does not have would say nothing, and hide that it moved."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from megatron_tropd.parallel import megatron_flags

    classes = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    known = {f.name for cls in classes for f in dataclasses.fields(cls)}
    assert not {*megatron_flags._ELSEWHERE, *megatron_flags._ARCHITECTURE} - known
    assert not {f.replace("-", "_") for f in megatron_fields()} - known
    assert refusal("fp8_recipe") and not refusal("overlap_grad_reduce")
    assert find_field("no-overlap-grad-reduce").name == "overlap_grad_reduce" and find_field("no-bucket-size") is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (2, {"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
        (2, {"overlap_param_gather": True}, "--overlap-param-gather needs --overlap-grad-reduce"),
        (2, {"tp_comm_overlap": True}, "--tp-comm-overlap needs Transformer Engine"),
        (2, {"tp_comm_overlap": True}, "--tp-comm-overlap needs --sequence-parallel"),
        (1, {"gradient_accumulation_fusion": True}, "--gradient-accumulation-fusion needs apex's extension"),
        (1, {"use_precision_aware_optimizer": True}, "refuses --use-precision-aware-optimizer: .* distributed optim"),
        (1, {"recompute_granularity": "selective", "recompute_num_layers": 1}, "core refuses --recompute-num-layers: .*None"),
        (1, {"cpu_offloading": True, "cpu_offloading_num_layers": 9}, "refuses --cpu-offloading.*: .*CPU offloading"),
        (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
         "student: --num-virtual-stages-per-pipeline-rank 2 does not divide the 1 layers of a pipeline stage"),
        (1, {"num_virtual_stages_per_pipeline_rank": 2}, "needs --pipeline-model-parallel-size above 1"),
        (2, {"teacher_decoder_first_pipeline_num_layers": 1},
         "teacher: --teacher-decoder-first-pipeline-num-layers 1: needs --teacher-pipeline-model-parallel-size above 1"),
    ],
)  # fmt: skip
def test_combinations_are_refused_before_anything_starts(world, tmp_path, size, changes, message):
    from megatron_tropd.setup.run_spec import make_run_spec

    with pytest.raises(ConfigError, match=message):
        make_run_spec(parse(flags(world, tmp_path / "run", **changes)), size)


def test_two_virtual_stages_of_two_stages_need_overlapped_messages(tmp_path):
    from megatron_tropd.setup.run_spec import make_run_spec

    deep = make_world(tmp_path, student_layers=4)
    changes = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    argv = [*flags(deep, tmp_path / "run", **changes), "--no-overlap-p2p-comm"]
    with pytest.raises(ConfigError, match="--no-overlap-p2p-comm with virtual stages needs"):
        make_run_spec(parse(argv), 2)


def _trained(argv):
    """Every gradient before its update, the weights after all, and Megatron's configs."""
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), torch.distributed.get_world_size()))
    run, losses, gradients, counts = assembled.run, [], [], []
    student = run.student
    step = student.step
    student.model.chunks[0].register_forward_hook(
        lambda *_: counts.append(student.version) if torch.is_grad_enabled() else None
    )

    def observed():
        if not run.config.parallel.use_distributed_optimizer:  # a rank of that has a part, by buckets
            gradients.append([p.main_grad.clone() for p in student.model.parameters()])
        step()

    student.step = observed
    try:
        push_weights(run)
        for number in range(run.config.training.train_iters):
            report, _ = train_step(run, number)
            losses.append((report.loss, report.grad_norm))
        weights = {name: tensor.clone() for name, tensor in run.export()}
        groups = sum(len(chunk.bucket_groups) for chunk in student.ddp)
        passes = [counts.count(version) for version in range(student.version)]
        return losses, gradients, weights, groups, student.model.config.init_method_std, passes
    finally:
        close(assembled)


@pytest.mark.parametrize(
    ("changes", "overlap"),
    [({}, {"overlap_grad_reduce": True, "bucket_size": 2000}),
     ({"use_distributed_optimizer": True},
      {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000})],
    ids=["gradients", "gradients and weights, distributed optimizer"],
)  # fmt: skip
def test_overlap_changes_no_bit(ranks, world, tmp_path, changes, overlap):
    """DP 2, several micro-batches, several updates of a batch.  Without clipping: the norm is a sum by buckets."""
    common = {
        "train_iters": 3, "num_minibatches": 2, "max_tokens_per_microbatch": 30, "rollout_batch_size": 8, "clip_grad": 0,
        **changes,
    }  # fmt: skip
    plain = ranks(2).run(_trained, flags(world, tmp_path / "plain", **common))
    other = ranks(2).run(_trained, flags(world, tmp_path / "other", **common, **overlap, init_method_std=0.5))
    for (losses, gradients, weights, groups, *_), (losses_o, gradients_o, weights_o, groups_o, std, passes) in zip(
        plain, other, strict=True
    ):
        assert min(passes) < max(passes), "every update has as many micro-batches"
        assert groups == 1 and groups_o > 3 and std == 0.5, "the flags reached Megatron"
        assert [loss for loss, _ in losses_o] == [loss for loss, _ in losses]
        assert [norm for _, norm in losses_o] == pytest.approx([norm for _, norm in losses], rel=1e-6)
        assert len(gradients) == len(gradients_o)
        for mine, theirs in zip(gradients_o, gradients, strict=True):
            assert all(map(torch.equal, mine, theirs))
        assert all(torch.equal(weights_o[name], tensor) for name, tensor in weights.items())

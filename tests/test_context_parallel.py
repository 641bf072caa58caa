"""Context parallelism, whole runs: the same run as on one rank, and the same weights at every context size."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.config import ModelConfig, TrainConfig
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.training.megatron_configs import combination_errors
from tests.one_rank import OneRank, curve_of, difference
from tests.tiny_run import flags, make_world, train_here

STEPS, STOP = 3, 2
CP = {"context_parallel_size": 2}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000, "overlap_param_gather": True}
LAYOUTS = {
    "CP2": (2, CP),
    "CP2 TP2, sequence parallel": (4, {**CP, **TP}),
    "CP2 DP2, distributed optimizer, overlaps; teacher TP2": (
        4, {**CP, **OVERLAP, **DISTRIBUTED, "teacher_tensor_model_parallel_size": 2},
    ),
    "CP2 PP2, two virtual stages; teacher PP2": (
        4, {**CP, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2,
            "teacher_pipeline_model_parallel_size": 2},
    ),
    "CP4, short micro-batches, full recomputation": (
        4, {"context_parallel_size": 4, "max_tokens_per_microbatch": 20, "recompute_granularity": "full"},
    ),
}  # fmt: skip
WHOLE_SAMPLES = {
    "objective": "opd", "importance_correction": "seq_err", "sequence_error_max": 1.05, "rollout_lag": 1,
}  # fmt: skip
"""Masks samples by a mean over their tokens, from an extra pass; with rollouts of older weights some are masked."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), student="qwen3_tied", student_layers=4)


@pytest.fixture(scope="module")
def reference(ranks, world, tmp_path_factory):
    return OneRank(ranks, world, tmp_path_factory.mktemp("one"), STEPS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_samecurve_of(ranks, world, reference, tmp_path, name, measured):
    size, changes = LAYOUTS[name]
    curve = curve_of(ranks, size, flags(world, tmp_path / "run", train_iters=STEPS, **changes))
    worst = difference(curve, reference())
    measured(f"loss and gradient norm of {STEPS} steps equal those of one rank, {name} (relative)", worst, 1e-5)


def test_a_mean_over_a_sample_is_over_all_of_its_parts(ranks, world, reference, tmp_path, measured):
    changes = {**WHOLE_SAMPLES, **CP, **TP}
    curve = curve_of(ranks, 4, flags(world, tmp_path / "run", train_iters=STEPS, **changes))
    expected = reference(**WHOLE_SAMPLES)
    worst = difference(curve, expected)
    measured(f"seq_err, {STEPS} steps at CP2 TP2 equal those of one rank (relative)", worst, 1e-5)
    assert difference(expected, reference(**{**WHOLE_SAMPLES, "sequence_error_max": 1e6})) > 1e-3  # it masks some


def _probe_differences(argv):
    """What a server's probes are compared with; this one says 0 for every token."""
    import torch.distributed as dist

    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.parity import probe_differences

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    run = assembled.run
    try:
        scored = {"server": [[0.0] * (len(probe.token_ids) - 1) for probe in run.probes.sequences]}
        return probe_differences(run.student, run.probes, scored, max_tokens=48)["server"]
    finally:
        close(assembled)


def test_probes_are_scored_whole(ranks, world, tmp_path):
    (expected,) = ranks(1).run(_probe_differences, flags(world, tmp_path / "one"))
    assert expected > 1
    assert ranks(2).run(_probe_differences, flags(world, tmp_path / "two", **CP)) == pytest.approx(
        [expected] * 2, rel=1e-6
    )


def _train_in_another_order(argv):
    """Train with contiguous halves of sequences, which attention does not know of."""
    from unittest.mock import patch

    from megatron_tropd.models import context

    def halves(bounds, num_tokens, *, cp, rank):
        starts, sizes = bounds[:-1].tolist(), (bounds.diff() // cp).tolist()
        return torch.cat([torch.arange(s + rank * n, s + (rank + 1) * n) for s, n in zip(starts, sizes, strict=True)])

    with patch.object(context, "held_tokens", halves):
        return train_here(argv)


def test_another_order_of_chunks_gives_anothercurve_of(ranks, world, reference, tmp_path):
    """Negative control: the comparisons above can fail."""
    curve = ranks(2).run(
        _train_in_another_order, flags(world, tmp_path / "run", train_iters=1, on_parity="warn", **CP)
    )[0]
    assert curve[0] != pytest.approx(reference()[0], rel=1e-3)


def _weights(argv):
    """The weights that a run goes on with, by HF name."""
    import torch.distributed as dist

    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    try:
        return {name: tensor.clone() for name, tensor in assembled.run.export()}
    finally:
        close(assembled)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((2, {**CP, **DISTRIBUTED}), (1, DISTRIBUTED)), ((1, {}), (4, {**CP, **TP}))],
    ids=["CP2 to one rank", "one rank to CP2 TP2"],
)
def test_a_checkpoint_goes_on_at_another_context_size(ranks, world, reference, tmp_path, saved, loaded, measured):
    common = {"train_iters": STEPS, "save_interval": STOP}
    argv = {part[0]: flags(world, tmp_path / "run", **common, **part[1]) for part in (saved, loaded)}
    curve_of(ranks, saved[0], argv[saved[0]], STOP)
    before, after = (ranks(size).run(_weights, argv[size])[0] for size in (saved[0], loaded[0]))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    worst = difference(curve_of(ranks, loaded[0], argv[loaded[0]]), reference()[STOP:])
    measured("resume at another context size (relative)", worst, 1e-5)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"context_parallel_size": 3}, 4, "--context-parallel-size 3 does not divide the 4 ranks"),
        ({"context_parallel_size": 4, "tensor_model_parallel_size": 2}, 4, "--context-parallel-size 4 does not divide the 2"),
        ({"context_parallel_size": 0}, 1, "--context-parallel-size 0 must be at least 1"),
        ({"cp_comm_type": "a2a"}, 1, "--cp-comm-type cannot be set: .*--context-parallel-size"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_before_anything_starts(world, tmp_path, changes, size, message):
    from megatron_tropd.setup.run_spec import make_run_spec

    with pytest.raises(ConfigError, match=message):
        make_run_spec(parse(flags(world, tmp_path / "run", **changes)), size)


@pytest.mark.parametrize(
    ("te", "bf16", "refused"), [(True, True, False), (False, True, True), (True, False, True)],
    ids=["TE, bf16", "no TE", "fp32"],
)  # fmt: skip
def test_a_gpu_needs_transformer_engines_attention(monkeypatch, te, bf16, refused):
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: te)
    config = TrainConfig(model=ModelConfig(bf16=bf16))
    errors = combination_errors(config, ParallelLayout(cp=2))
    assert ["--context-parallel-size 2 needs Transformer Engine" in error for error in errors] == [True] * refused
    assert combination_errors(config, ParallelLayout()) == []

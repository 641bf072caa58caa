"""A run that goes on with other flags obeys them: the checkpoint holds state, the launch holds settings."""

from __future__ import annotations

import pytest

from tests.tiny_run import flags, make_world, train_here


def _train(argv, stop_after=None):
    return train_here(argv, stop_after)


def _groups_after_resume(argv):
    """(lr, weight decay, betas, eps) of the decayed parameter group, as the next update would use them."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    close(assembled)
    groups = assembled.run.student.optimizer.param_groups
    (group,) = [group for group in groups if group["wd_mult"]]
    return group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]


@pytest.mark.parametrize("distributed", [False, True])
def test_optimizer_flags_of_the_new_launch_count(ranks, tmp_path, distributed):
    world = make_world(tmp_path)
    common = {"save_interval": 2, "lr_decay_style": "linear", "use_distributed_optimizer": distributed}
    ranks(1).run(_train, flags(world, tmp_path / "run", train_iters=4, **common), 2)
    changed = {"train_iters": 8, "lr": 1e-4, "min_lr": 2e-5, "weight_decay": 0.3, "adam_beta1": 0.5, "adam_eps": 1e-6}
    argv = flags(world, tmp_path / "run", **common, **changed)
    lr, weight_decay, betas, eps = ranks(1).run(_groups_after_resume, argv)[0]
    assert lr == pytest.approx(2e-5 + 8e-5 * (1 - 2 / 8))  # two of eight steps of the new decay are done
    assert (weight_decay, betas, eps) == (0.3, (0.5, 0.999), 1e-6)

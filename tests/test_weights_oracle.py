"""Our boxes against megatron-core's own resharder, which plans from the attributes of real modules.

It moves weights between two GPTModels of different layouts and shares nothing with the boxes.  It refuses layouts
whose padded vocabularies differ, and it knows no engines; within that it is an oracle.
"""

from __future__ import annotations

import pytest

from tests.weight_cases import arch

PAIRS = {
    "qwen3: TP2 PP2 to TP4": ("qwen3", False, {"tp": 2, "pp": 2}, {"tp": 4}),
    "qwen2: TP4 to PP2 DP2": ("qwen2", False, {"tp": 4}, {"pp": 2, "dp": 2}),
    "llama: PP4 to TP2 DP2": ("llama", False, {"pp": 4}, {"tp": 2, "dp": 2}),
    "qwen3 tied: TP2 PP2 to TP4": ("qwen3", True, {"tp": 2, "pp": 2}, {"tp": 4}),
}


def _reshard(family, tied, source_sizes, target_sizes):
    """Body: fill one model by boxes, let Megatron move it to the other, and compare that with its boxes."""
    from dataclasses import replace

    import torch
    import torch.distributed as dist
    from megatron.core.resharding.copy_services.base import CopyService
    from megatron.core.resharding.execution import execute_reshard_plan
    from megatron.core.resharding.planner import build_centralized_reshard_plan

    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups, teacher_groups
    from megatron_tropd.parallel.layout import ParallelLayout
    from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
    from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
    from megatron_tropd.weights.coordinates.parameters import local_parameters, match_parameters

    class Exchange(CopyService):
        """Point to point over gloo; Megatron's own gloo service needs CUDA.  Every copy has a number, which
        megatron-core 0.16 and 0.19 give in different ways."""

        def __init__(self):
            self.sends, self.receives = {}, {}

        def submit_send(self, tensor, rank, *, task_id):
            self.sends[task_id] = (tensor, rank)

        def submit_recv(self, tensor, rank, *, task_id):
            self.receives[task_id] = (tensor, rank)

        def submit_send_with_id(self, number, tensor, rank):
            self.submit_send(tensor, rank, task_id=number)

        def submit_recv_with_id(self, number, tensor, rank):
            self.submit_recv(tensor, rank, task_id=number)

        def run(self):
            me, works = dist.get_rank(), []
            for number, (tensor, rank) in self.receives.items():
                if rank == me:
                    tensor.copy_(self.sends[number][0])
                else:
                    works.append(dist.irecv(tensor, src=rank, tag=number))
            works += [dist.isend(t, dst=r, tag=n) for n, (t, r) in self.sends.items() if r != me]
            for work in works:
                work.wait()

    model = replace(arch(family, tied=tied, layers=4), vocab_size=128)  # no padding: Megatron refuses it
    draw = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in hf_shapes(model).items()}
    rank, layouts = dist.get_rank(), (ParallelLayout(**source_sizes), ParallelLayout(**target_sizes))
    source = build_gpt_model(model, student_groups(layouts[0]))
    target = build_gpt_model(model, teacher_groups(layouts[1]))
    with torch.no_grad():
        for parameter, wanted in match_parameters(local_parameters(source), rank_boxes(model, layouts[0], rank)):
            for box in wanted.boxes:
                parameter[box.local_slices].copy_(tensors[box.hf_name][box.hf_slices])
        for parameter in target.parameters():
            parameter.fill_(float("nan"))
    plan = build_centralized_reshard_plan(source, target)
    execute_reshard_plan(plan, source, target, Exchange())
    same = 0
    for parameter, wanted in match_parameters(local_parameters(target), rank_boxes(model, layouts[1], rank)):
        for box in wanted.boxes:
            assert torch.equal(parameter[box.local_slices], tensors[box.hf_name][box.hf_slices]), wanted.names
        same += 1
    return same, len(plan.recv_ops)


@pytest.mark.parametrize("name", PAIRS)
def test_megatrons_resharder_moves_every_parameter_to_our_boxes(ranks, name):
    results = ranks(4).run(_reshard, *PAIRS[name])
    assert all(parameters > 10 and copies >= parameters for parameters, copies in results)

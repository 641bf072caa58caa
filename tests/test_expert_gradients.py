"""Gradients of a model with experts, reduced by Megatron's DDP and ``finalize_model_grads``, against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.setup.model_specs import training_errors
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from tests.hf_models import VOCAB_SIZE, make_hf_model, save_hf_checkpoint

LENGTHS = (11, 5, 20, 8)
LAYOUTS = [
    ParallelLayout(dp=2),
    ParallelLayout(tp=2),
    ParallelLayout(dp=2, ep=2),
    ParallelLayout(tp=2, ep=2, etp=1),
    ParallelLayout(tp=2, dp=2, ep=4, etp=1),
    ParallelLayout(tp=2, dp=2, ep=2, etp=1),
    ParallelLayout(dp=2, pp=2, ep=2),
]


def _sequences():
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]


def _gradients(directory, layout):
    """Of the mean NLL over all sequences, which data-parallel ranks share, by HF name; the same on every rank."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_tropd.data.packing import pack
    from megatron_tropd.models.build import build_gpt_model, forward_hidden
    from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.training.student import break_cycles
    from megatron_tropd.types import Rollout
    from megatron_tropd.weights.coordinates.parameters import local_parameters
    from megatron_tropd.weights.files.load import load_hf_into
    from megatron_tropd.weights.transport.hf_export import export_hf

    checkpoint = HfCheckpoint.open(directory)
    arch, groups = checkpoint.arch, student_groups(layout)
    sp = layout.tp > 1  # Megatron refuses to train experts with tensor parallelism alone
    overrides = {"sequence_parallel": sp, "calculate_per_token_loss": True}
    model = build_gpt_model(arch, groups, config_overrides=overrides)
    load_hf_into(model, checkpoint, arch, layout, dist.get_rank())
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    group = groups.pg_collection.tp
    shard = VocabShard(vocab_size=VOCAB_SIZE, rows_per_rank=model.vocab_size // layout.tp, group=group)

    mine = _sequences()[groups.coords.dp :: layout.dp]
    size = -(-max(sum(map(len, _sequences()[d :: layout.dp])) for d in range(layout.dp)) // layout.tp) * layout.tp
    rollouts = [
        Rollout(prompt_uid=i, sample_index=0, token_ids=tuple(ids.tolist()), prompt_len=len(ids), guidance_len=0,
                logprobs=(), weight_version=(0, 0), finish="length")
        for i, ids in enumerate(mine)
    ]  # fmt: skip
    batch = pack(rollouts, None, num_tokens=size)
    labels = torch.cat([F.pad(ids[1:], (0, 1), value=-1) for ids in mine])
    labels = F.pad(labels, (0, size - len(labels)), value=-1)

    def loss(hidden):
        hidden = gather_hidden(hidden, shard, sequence_parallel=sp)
        logits = hidden @ model.lm_head_weight().t()
        logits[..., shard.num_valid :] = -1e9
        nll = vocab_parallel_cross_entropy(logits, labels.clamp(min=0)[:, None])[:, 0]
        wanted = labels >= 0
        return nll[wanted].sum(), wanted.sum().int(), {}

    ddp.zero_grad_buffer()
    get_forward_backward_func(layout.pp, None)(
        forward_step_func=lambda batches, m: (forward_hidden(m, next(batches)), loss), data_iterator=iter([batch]),
        model=[ddp], num_microbatches=1, seq_length=size, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    break_cycles(model)
    grads = {name: parameter.main_grad for name, parameter in local_parameters(ddp).items()}
    return {name: tensor.clone() for name, tensor in export_hf(grads, arch, layout, dist.group.WORLD)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_hf_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3_moe")


@pytest.fixture(scope="module")
def oracle():
    """Gradients by transformers, its stacked experts taken apart."""
    model = make_hf_model("qwen3_moe")
    sequences = _sequences()
    total = sum(
        F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") for ids in sequences
    )  # fmt: skip
    (total / sum(len(ids) - 1 for ids in sequences)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, grad in enumerate(parameter.grad):
                gate, up = grad.chunk(2)
                found[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                found[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            found |= {f"{prefix}.experts.{expert}.down_proj.weight": grad for expert, grad in enumerate(parameter.grad)}
        else:
            found[name] = parameter.grad
    return found


def _worst(found, oracle):
    """Largest error of any tensor, relative to its largest gradient."""
    assert found.keys() == oracle.keys()
    return max(((found[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in oracle.items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"tp{x.tp}-pp{x.pp}-dp{x.dp}-ep{x.ep}-etp{x.expert_tp}")
def test_gradients_equal_transformers(ranks, directory, oracle, layout, measured):
    found = ranks(layout.world_size).run(_gradients, directory, layout)[0]
    where = f"TP {layout.tp}, PP {layout.pp}, DP {layout.dp}, EP {layout.ep}, ETP {layout.expert_tp}"
    claim = f"gradients of qwen3_moe equal transformers, {where} (relative to each tensor's largest)"
    measured(claim, _worst(found, oracle), 1e-4)


def test_what_cannot_be_trained_is_refused(ranks, directory, oracle):
    """Whole experts on every tensor-parallel rank, without expert parallelism, are refused exactly where Megatron-core
    takes their gradients for those of dense layers and never adds the ranks."""
    arch = HfCheckpoint.open(directory).arch
    assert not [error for layout in LAYOUTS for error in training_errors(arch, layout, sequence_parallel=True)]
    (error,) = training_errors(arch, ParallelLayout(tp=2), sequence_parallel=False)
    assert "--sequence-parallel" in error
    refused = training_errors(arch, ParallelLayout(tp=2, etp=1), sequence_parallel=True)
    found = ranks(2).run(_gradients, directory, ParallelLayout(tp=2, etp=1))[0]
    if platform.adds_gradients_of_whole_experts():
        assert not refused
        assert _worst(found, oracle) <= 1e-4
    else:
        assert "--expert-tensor-parallel-size 1" in refused[0] and "--expert-model-parallel-size" in refused[0]
        assert _worst(found, oracle) > 0.1

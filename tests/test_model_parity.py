"""GPTModel against transformers, fp32: logits of packed sequences, every family, TP 1/2/4 x PP 1/2."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from tests.hf_models import VARIANTS, VOCAB_SIZE, make_hf_model, save_hf_checkpoint

LENGTHS = (11, 1, 20, 7)
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


def _sequences():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]


def _batch(padding):
    from megatron_tropd.data.packing import pack
    from megatron_tropd.types import Rollout

    rollouts = [
        Rollout(prompt_uid=i, sample_index=0, token_ids=tuple(ids.tolist()), prompt_len=len(ids), guidance_len=0,
                logprobs=(), weight_version=(0, 0), finish="length")
        for i, ids in enumerate(_sequences())
    ]  # fmt: skip
    return pack(rollouts, None, num_tokens=sum(LENGTHS) + padding)


def _logits(directory, tp, pp, sequence_parallel):
    """Full logits of the packed batch, through Megatron's own schedule; {} before the last stage."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_tropd.models.architecture import architecture_from_hf_config, load_hf_config
    from megatron_tropd.models.build import build_gpt_model, forward_hidden
    from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.weights.files import HfCheckpoint
    from megatron_tropd.weights.load import load_hf_into

    arch = architecture_from_hf_config(load_hf_config(directory))
    groups = student_groups(ParallelLayout(tp=tp, pp=pp))
    model = build_gpt_model(arch, groups, config_overrides={"sequence_parallel": sequence_parallel}).eval()
    load_hf_into(model, HfCheckpoint.open(directory, arch), arch, groups.layout, dist.get_rank())
    shard = VocabShard(vocab_size=arch.vocab_size, rows_per_rank=model.vocab_size // tp, group=groups.pg_collection.tp)
    batch = _batch(padding=-sum(LENGTHS) % 4)

    def head(hidden, non_loss_data=True):
        hidden = gather_hidden(hidden, shard, sequence_parallel=sequence_parallel)[:, 0]
        mine = hidden @ model.lm_head_weight().t()
        parts = [torch.empty_like(mine) for _ in range(tp)]
        dist.all_gather(parts, mine.contiguous(), group=groups.pg_collection.tp)
        return torch.cat(parts, 1)[:, : arch.vocab_size]

    with torch.no_grad():
        outputs = get_forward_backward_func(pp, None)(
            forward_step_func=lambda batches, m: (forward_hidden(m, next(batches)), head),
            data_iterator=iter([batch]), model=[model], num_microbatches=1, seq_length=len(batch.token_T),
            micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    return outputs[0] if outputs else None


def _all_logits(directories, tp, pp):
    return {
        (name, sp): _logits(directory, tp, pp, sp)
        for name, directory in directories.items()
        for sp in ([False, True] if tp == 2 else [False])
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {name: save_hf_checkpoint(root / name, name) for name in VARIANTS}


@pytest.fixture(scope="module")
def oracle():
    with torch.no_grad():
        return {
            name: torch.cat([make_hf_model(name)(ids[None]).logits[0] for ids in _sequences()]) for name in VARIANTS
        }


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_logits_equal_transformers(ranks, checkpoints, oracle, tp, pp, measured):
    by_rank = ranks(tp * pp).run(_all_logits, checkpoints, tp, pp)
    for results in by_rank[-tp:]:  # the last stage
        for (name, sequence_parallel), logits in results.items():
            error = (logits[: sum(LENGTHS)] - oracle[name]).abs().max().item()
            where = f"TP {tp}, PP {pp}" + (", sequence parallel" if sequence_parallel else "")
            measured(f"logits of {name.split('_')[0]} equal transformers, {where} (max abs, fp32)", error, 1e-4)


def test_the_oracle_notices_a_wrong_rope_base(ranks, oracle, tmp_path):
    """Negative control: the comparison above can fail."""
    from tests.hf_models import edit_config

    directory = save_hf_checkpoint(tmp_path / "m", "qwen3")
    edit_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    (logits,) = ranks(1).run(_logits, directory, 1, 1, False)
    assert (logits[: sum(LENGTHS)] - oracle["qwen3"]).abs().max() > 1e-3

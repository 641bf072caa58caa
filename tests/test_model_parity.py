"""GPTModel against transformers, fp32: logits of packed sequences, every family, TP 1/2/4 x PP 1/2, and experts
cut every way."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from tests.hf_models import VARIANTS, VOCAB_SIZE, family_of, make_hf_model, save_hf_checkpoint

LENGTHS = (11, 1, 20, 7)
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
EXPERT_LAYOUTS = [  # beside these, LAYOUTS cut experts as they cut attention
    ParallelLayout(dp=2, ep=2),
    ParallelLayout(tp=2, etp=1),
    ParallelLayout(tp=2, ep=2, etp=1),
    ParallelLayout(dp=4, ep=4),
    ParallelLayout(tp=2, dp=2, ep=4, etp=1),
    ParallelLayout(dp=2, pp=2, ep=2),
    ParallelLayout(tp=2, pp=2, ep=2, etp=1),
]


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


def _logits(directory, layout, sequence_parallel, *, frozen=False):
    """Full logits of the packed batch, through Megatron's own schedule; None before the last stage.

    A frozen model is built beside a student of another layout, as a teacher is.
    """
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_tropd.models.build import build_gpt_model, forward_hidden
    from megatron_tropd.models.hf_config import load_architecture
    from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden
    from megatron_tropd.parallel.groups import student_groups, teacher_groups
    from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
    from megatron_tropd.weights.files.load import load_hf_into

    arch = load_architecture(directory)
    groups = student_groups(ParallelLayout(dp=layout.world_size) if frozen else layout)
    if frozen:
        groups = teacher_groups(layout)
    tp, collection = layout.tp, groups.pg_collection
    model = build_gpt_model(arch, groups, config_overrides={"sequence_parallel": sequence_parallel}).eval()
    load_hf_into(model, HfCheckpoint.open(directory, arch), arch, layout, dist.get_rank())
    shard = VocabShard(vocab_size=arch.vocab_size, rows_per_rank=model.vocab_size // tp, group=collection.tp)
    batch = _batch(padding=-sum(LENGTHS) % 4)

    def head(hidden, non_loss_data=True):
        hidden = gather_hidden(hidden, shard, sequence_parallel=sequence_parallel)[:, 0]
        mine = hidden @ model.lm_head_weight().t()
        parts = [torch.empty_like(mine) for _ in range(tp)]
        dist.all_gather(parts, mine.contiguous(), group=collection.tp)
        return torch.cat(parts, 1)[:, : arch.vocab_size]

    own = {}
    if frozen:
        own = {"p2p_communicator": P2PCommunicator(pp_group=collection.pp, config=model.config),
               "pg_collection": collection}  # fmt: skip
    with torch.no_grad():
        outputs = get_forward_backward_func(layout.pp, None)(
            forward_step_func=lambda batches, m: (forward_hidden(m, next(batches)), head),
            data_iterator=iter([batch]), model=[model], num_microbatches=1, seq_length=len(batch.token_T),
            micro_batch_size=1, forward_only=True, collect_non_loss_data=True, **own,
        )  # fmt: skip
    return outputs[0] if outputs else None


def _all_logits(directories, layout):
    return {
        (name, sp): _logits(directory, layout, sp)
        for name, directory in directories.items()
        for sp in ([False, True] if layout.tp == 2 else [False])
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
    by_rank = ranks(tp * pp).run(_all_logits, checkpoints, ParallelLayout(tp=tp, pp=pp))
    for results in by_rank[-tp:]:  # the last stage
        for (name, sequence_parallel), logits in results.items():
            error = (logits[: sum(LENGTHS)] - oracle[name]).abs().max().item()
            where = f"TP {tp}, PP {pp}" + (", sequence parallel" if sequence_parallel else "")
            measured(f"logits of {family_of(name)} equal transformers, {where} (max abs, fp32)", error, 1e-4)


def _name(layout):
    sizes = {"TP": layout.tp, "PP": layout.pp, "DP": layout.dp, "EP": layout.ep, "ETP": layout.expert_tp}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "EP")


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=_name)
def test_logits_of_experts_equal_transformers(ranks, checkpoints, oracle, layout, measured):
    sparse = {name: path for name, path in checkpoints.items() if "moe" in name}
    by_rank = ranks(layout.world_size).run(_all_logits, sparse, layout)
    for results in by_rank[-layout.stage_size :]:
        for (name, sequence_parallel), logits in results.items():
            error = (logits[: sum(LENGTHS)] - oracle[name]).abs().max().item()
            where = _name(layout) + (", sequence parallel" if sequence_parallel else "")
            measured(f"logits of qwen3_moe equal transformers, {where} (max abs, fp32)", error, 1e-4)


@pytest.mark.parametrize("layout", [EXPERT_LAYOUTS[2], EXPERT_LAYOUTS[4], EXPERT_LAYOUTS[6]], ids=_name)
def test_logits_of_a_frozen_model_with_groups_of_its_own(ranks, checkpoints, oracle, layout, measured):
    """Beside a student that is data parallel; nothing may leak from the student's groups."""
    by_rank = ranks(layout.world_size).run(_logits, checkpoints["qwen3_moe"], layout, False, frozen=True)
    for logits in by_rank[-layout.stage_size :]:
        error = (logits[: sum(LENGTHS)] - oracle["qwen3_moe"]).abs().max().item()
        measured(f"logits of a frozen qwen3_moe equal transformers, {_name(layout)} (max abs, fp32)", error, 1e-4)


YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {  # every kind that is read beside "default"; RoPE of the two tests' variants is of another kind each
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic": ("qwen2", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": ("mistral", {**VARIANTS["llama_tied"]["rope_parameters"], "original_max_position_embeddings": 32}),
    "yarn": ("qwen3_moe", YARN),
    "yarn with mscale": ("llama", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.5}),
    "yarn without factor": ("qwen2", {**YARN, "factor": None}),
    "yarn rounded": ("mistral", {**YARN, "beta_fast": 4, "beta_slow": 2, "truncate": True}),
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope_equals_transformers(ranks, tmp_path, kind, measured):
    variant, rope = ROPES[kind]
    directory = save_hf_checkpoint(tmp_path / "m", variant, rope_parameters=rope)
    with torch.no_grad():
        model = make_hf_model(variant, rope_parameters=rope)
        wanted = torch.cat([model(ids[None]).logits[0] for ids in _sequences()])
    for tp in (1, 2):
        for logits in ranks(tp).run(_logits, directory, ParallelLayout(tp=tp), False):
            error = (logits[: sum(LENGTHS)] - wanted).abs().max().item()
            measured(f"logits with RoPE {kind} equal transformers, TP {tp} (max abs, fp32)", error, 1e-4)


@pytest.mark.parametrize(("key", "value"), [("attention_factor", 1.0), ("beta_fast", 32.0), ("truncate", True)])
def test_the_oracle_notices_each_number_of_yarn(ranks, oracle, tmp_path, key, value):
    """Negative control: the comparison of qwen3_yarn above sees every number."""
    from tests.hf_models import edit_config

    directory = save_hf_checkpoint(tmp_path / "m", "qwen3_yarn")
    edit_config(directory, rope_parameters={**VARIANTS["qwen3_yarn"]["rope_parameters"], key: value})
    (logits,) = ranks(1).run(_logits, directory, ParallelLayout(), False)
    assert (logits[: sum(LENGTHS)] - oracle["qwen3_yarn"]).abs().max() > 1e-3


def test_a_window_below_the_longest_sequence_changes_the_logits(oracle):
    """Negative control: 20 is the least sliding_window with which mistral attends to all of 20 tokens."""
    with torch.no_grad():
        model = make_hf_model("mistral", sliding_window=19)
        found = torch.cat([model(ids[None]).logits[0] for ids in _sequences()])
    assert (found - oracle["mistral"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_tied"])
def test_the_oracle_notices_wrong_router_weights(ranks, oracle, tmp_path, name):
    """Negative control: ``norm_topk_prob`` the other way round."""
    from tests.hf_models import edit_config

    directory = save_hf_checkpoint(tmp_path / "m", name)
    edit_config(directory, norm_topk_prob=name == "qwen3_moe_tied")
    (logits,) = ranks(1).run(_logits, directory, ParallelLayout(), False)
    assert (logits[: sum(LENGTHS)] - oracle[name]).abs().max() > 1e-3


def test_the_oracle_notices_a_wrong_rope_base(ranks, oracle, tmp_path):
    """Negative control: the comparison above can fail."""
    from tests.hf_models import edit_config

    directory = save_hf_checkpoint(tmp_path / "m", "qwen3")
    edit_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    (logits,) = ranks(1).run(_logits, directory, ParallelLayout(), False)
    assert (logits[: sum(LENGTHS)] - oracle["qwen3"]).abs().max() > 1e-3

"""Pairs of layouts between which weights must travel: each is a way of getting it wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout

VOCAB = 131  # prime: every padding rule leaves rows over


@dataclass(frozen=True)
class Case:
    arch: Architecture
    layout: ParallelLayout
    engines: tuple[EngineLayout, ...]

    @property
    def processes(self) -> int:
        return self.layout.world_size + sum(engine.tp for engine in self.engines)


def arch(family: str = "qwen3", *, kv: int = 4, tied: bool = False, layers: int = 2, scale: int = 1) -> Architecture:
    experts = {"num_experts": 4, "moe_intermediate_size": 12 * scale, "num_experts_per_tok": 2}
    return Architecture(
        family=family, vocab_size=VOCAB * scale, hidden_size=16, ffn_hidden_size=24 * scale, num_layers=layers,
        num_attention_heads=8, num_query_groups=kv, head_dim=4, norm_epsilon=1e-6, max_position_embeddings=64,
        tie_word_embeddings=tied, rope_theta=1e4, **(experts if family == "qwen3_moe" else {}),
    )  # fmt: skip


def _case(model: Architecture, layout: dict, *engines: tuple[int, ...], divisor: int = 16) -> Case:
    cuts = tuple(EngineLayout(tp=cut[0], ep=cut[1] if len(cut) > 1 else 1) for cut in engines)
    return Case(arch=model, layout=ParallelLayout(**layout, make_vocab_size_divisible_by=divisor), engines=cuts)


CASES = {
    "tied, pipeline, two engines": _case(arch(tied=True), {"tp": 2, "pp": 2}, (2,), (2,)),
    "one to one": _case(arch("llama"), {}, (1,)),
    "narrower engines": _case(arch("llama"), {"tp": 4}, (2,), (2,)),
    "biased, pipeline, replicas": _case(arch("qwen2"), {"pp": 2, "dp": 2}, (4,)),
    "biased, tied, wider engine": _case(arch("qwen2", tied=True), {"tp": 2, "dp": 2}, (4,)),
    "key/value heads repeated": _case(arch(kv=2), {"tp": 2, "pp": 2}, (4,)),
    "fewer key/value heads than ranks on both sides": _case(arch(kv=2), {"tp": 4}, (4,)),
    "one key/value head, biased": _case(arch("qwen2", kv=1), {"tp": 4}, (2,), (1,), (1,)),
    "context shards are replicas": _case(arch("llama"), {"tp": 2, "cp": 2}, (2,), (2,)),
    "virtual pipeline": _case(arch(tied=True, layers=4), {"pp": 2, "vpp": 2}, (2,), (1,)),
    "virtual pipeline, tensor": _case(arch(layers=8), {"tp": 2, "pp": 2, "vpp": 4}, (4,)),
    "uneven stages": _case(arch(tied=True, layers=4), {"pp": 2, "first_layers": 1}, (2,)),
    "uneven stages of chunks": _case(arch(layers=6), {"pp": 2, "vpp": 2, "first_layers": 4, "last_layers": 2}, (1,)),
    "replicas share the work": _case(arch(), {"dp": 4}, (1,), (1,), (1,), (1,)),
    "engines of several widths": _case(arch("qwen2"), {"tp": 2}, (1,), (2,), (3 - 2,)),
    "experts on every rank": _case(arch("qwen3_moe"), {"tp": 2, "dp": 2, "ep": 4, "etp": 1}, (2, 2), (2, 1)),
    "experts, pipeline": _case(arch("qwen3_moe"), {"pp": 2, "dp": 2, "ep": 2}, (2, 1)),
    "experts in parts": _case(arch("qwen3_moe", kv=2), {"tp": 2, "dp": 2, "ep": 2, "etp": 2}, (4, 2)),
    "experts in parts of a dense model whole": _case(arch("qwen3_moe"), {"dp": 4, "ep": 2, "etp": 2}, (4, 4)),
    "padding everywhere": _case(arch(), {"tp": 4}, (2,), (2,), divisor=1024),
    "feed-forward padded on a CPU": replace(_case(arch(), {"tp": 2}), engines=(EngineLayout(tp=2, cpu=True),)),
    "experts padded on a CPU": replace(
        _case(arch("qwen3_moe"), {"dp": 2, "ep": 2}),
        engines=(EngineLayout(tp=2, ep=2, cpu=True), EngineLayout(cpu=True)),
    ),
}
BIG_CASES = {  # more ranks than a test starts processes for
    "nothing but padding on a rank": _case(arch(kv=2), {"tp": 8, "pp": 2}, (8,), divisor=128),
    "experts, both pipelines": _case(
        arch("qwen3_moe", layers=8), {"tp": 2, "cp": 2, "dp": 2, "pp": 2, "vpp": 2, "ep": 4, "etp": 2}, (4, 2), (8, 4)
    ),
}

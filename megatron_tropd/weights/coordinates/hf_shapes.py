"""Names and shapes of the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.weight_table import EMBEDDING_RULE, FINAL_NORM_RULE, OUTPUT_RULE, WeightRule

LM_HEAD = "lm_head.weight"
EMBED_TOKENS = "model.embed_tokens.weight"

Index = tuple[int, ...]


def hf_shape(arch: Architecture, hf_name: str) -> Index:
    """Return the shape of one HF tensor, found by the end of its name.

    Raises:
        KeyError: the module in the name is none of those listed here.
    """
    hidden = arch.hidden_size
    ffn = arch.moe_intermediate_size if ".experts." in hf_name else arch.ffn_hidden_size
    q_rows, kv_rows = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    module, kind = hf_name.split(".")[-2:]
    rows_cols: dict[str, tuple[int, int]] = {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "q_proj": (q_rows, hidden),
        "k_proj": (kv_rows, hidden),
        "v_proj": (kv_rows, hidden),
        "o_proj": (hidden, q_rows),
        "gate": (arch.num_experts, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    if module in rows_cols:
        return rows_cols[module] if kind == "weight" else rows_cols[module][:1]
    if module in ("q_norm", "k_norm"):
        return (arch.head_dim,)
    if module in ("input_layernorm", "post_attention_layernorm", "norm"):
        return (hidden,)
    raise KeyError(f"no shape is known for the HF tensor {hf_name}; add it to weights/coordinates/hf_shapes.py")


def _model_rules(arch: Architecture) -> Iterator[tuple[WeightRule, int, int]]:
    """Yield (rule, layer, expert) for the whole model in HF order; 0 where a rule has no layer or expert."""
    yield EMBEDDING_RULE, 0, 0
    for layer in range(arch.num_layers):
        for rule in arch.layer_rules():
            yield rule, layer, 0
        for expert in range(arch.num_experts):
            for rule in arch.expert_rules():
                yield rule, layer, expert
    yield FINAL_NORM_RULE, 0, 0
    if not arch.tie_word_embeddings:
        yield OUTPUT_RULE, 0, 0


def hf_shapes(arch: Architecture) -> dict[str, Index]:
    """Return name and shape of every tensor of the HF checkpoint, without ``lm_head.weight`` when it is tied."""
    return {
        name: hf_shape(arch, name)
        for rule, layer, expert in _model_rules(arch)
        for name in (template.format(layer=layer, expert=expert) for template in rule.hf)
    }

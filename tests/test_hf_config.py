"""What is read from a config.json is what transformers builds from it: every number of the model, for many configs."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_tropd.models.architecture import FAMILIES, UnsupportedArchitecture
from megatron_tropd.models.build import _softmax_scale
from megatron_tropd.models.hf_config import ModelShape, load_architecture
from megatron_tropd.models.rope import inverse_frequencies
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes

SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DROP = object()

EVERY_FAMILY = {
    "as it is": {},
    "no norm epsilon": {"rms_norm_eps": DROP},
    "no length": {"max_position_embeddings": DROP},
    "no key/value heads": {"num_key_value_heads": DROP, "num_attention_heads": 32, "hidden_size": 64},
    "no head size": {"head_dim": DROP},
    "no activation": {"hidden_act": DROP},
    "no tying": {"tie_word_embeddings": DROP},
    "no vocabulary": {"vocab_size": DROP},
    "no feed-forward size": {"intermediate_size": DROP},
    "no layers": {"num_hidden_layers": DROP},
    "tied": {"tie_word_embeddings": True},
    "swish": {"hidden_act": "swish"},
    "partial rotary null": {"partial_rotary_factor": None},
    "theta of transformers 4": {"rope_theta": 5e5, "rope_scaling": None},
    "theta of transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta in both places": {"rope_theta": 7e3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "both dialects, the same": {"rope_theta": 7e3, "rope_parameters": {**YARN, "rope_theta": 7e3}, "rope_scaling": YARN},
    "linear, old key": {"rope_scaling": {"type": "linear", "factor": 2}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.5}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "llama3, length left to its default": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "llama3, length at top level": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5},
                                    "original_max_position_embeddings": 64},
    "yarn": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn, length at both levels": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "yarn of DeepSeek-R1-0528-Qwen3-8B": {"rope_theta": 1e6, "rope_scaling": {**YARN, "attn_factor": 0.8782488562869419}},
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.0, "beta_fast": 16, "beta_slow": 2}},
    "yarn, not rounded": {"rope_scaling": {**YARN, "truncate": False, "beta_fast": None}},
    "yarn, one mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "yarn, both mscales": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn, no factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, factor below 1": {"rope_scaling": {**YARN, "factor": 0.5}},
    "stray keys": {"sliding_window": None, "model_max_length": 7, "qkv_bias": True, "transformers_version": "4.40.0"},
}  # fmt: skip
OF_A_FAMILY = {
    ("qwen2", "window not used"): {"use_sliding_window": False, "sliding_window": 8},
    ("qwen2", "window in no layer"): {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ("qwen2", "window in the last layer"): {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ("qwen2", "window, layers left to the default"): {"use_sliding_window": True, "sliding_window": 8},
    ("qwen2", "no window"): {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ("qwen3", "layer types, all full"): {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
    ("qwen3", "layer types"): {"use_sliding_window": True, "sliding_window": 9,
                               "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ("qwen3", "key/value heads null"): {"num_key_value_heads": None},
    ("llama", "a window that llama has not"): {"sliding_window": 8, "use_sliding_window": True},
    ("llama", "head size null"): {"head_dim": None},
    ("mistral", "window left to its default"): {"sliding_window": DROP},
    ("mistral", "window"): {"sliding_window": 8, "use_sliding_window": False},
    ("mistral", "no window"): {"sliding_window": None},
    ("qwen3_moe", "window not used"): {"use_sliding_window": False, "sliding_window": 8},
    ("qwen3_moe", "window in every layer"): {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ("qwen3_moe", "experts of transformers 5"): {"num_experts": DROP, "num_local_experts": 4},
    ("qwen3_moe", "experts in both spellings"): {"num_local_experts": 4},
    ("qwen3_moe", "defaults of experts"): {"norm_topk_prob": DROP, "mlp_only_layers": None, "decoder_sparse_step": 1},
    ("qwen3_moe", "experts left to their defaults"): {"num_experts": DROP, "num_experts_per_tok": DROP},
}  # fmt: skip
CASES = [(family, name, changes) for family in FAMILIES for name, changes in EVERY_FAMILY.items()]
CASES += [(family, name, changes) for (family, name), changes in OF_A_FAMILY.items()]


def write_config(directory, family, changes):
    config = {"model_type": family, **SIZES, **(EXPERTS if family == "qwen3_moe" else {}), **changes}
    config = {key: value for key, value in config.items() if value is not DROP}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _window(model, family):
    if family in ("mistral", "qwen3_moe"):
        return model.config.sliding_window
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers}
    return max((window for window in windows if window is not None), default=None)


def test_there_are_many_configs():
    assert len(CASES) >= 80 and set(FAMILIES) == {family for family, _, _ in CASES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "name", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_read_is_what_transformers_builds(tmp_path, family, name, changes):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from megatron_tropd.rollout.embedded.engine import _by_file_name

    arch = load_architecture(write_config(tmp_path, family, changes))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    rope, attention = model.model.rotary_emb, model.model.layers[0].self_attn
    shapes = {key: tuple(tensor.shape) for key, tensor in _by_file_name(model.state_dict()).items()}
    if arch.tie_word_embeddings:
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del shapes["lm_head.weight"]
    assert hf_shapes(arch) == shapes
    assert (arch.family, arch.num_layers) == (family, len(model.model.layers))
    assert arch.num_attention_heads == arch.num_query_groups * attention.num_key_value_groups
    assert (arch.head_dim, arch.vocab_size) == (attention.head_dim, model.model.embed_tokens.num_embeddings)
    assert arch.norm_epsilon == model.model.norm.variance_epsilon
    assert arch.max_position_embeddings == model.config.max_position_embeddings
    assert arch.attention_window == _window(model, family)
    plain = 1.0 / (arch.rope_theta ** (torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim))
    assert torch.equal(inverse_frequencies(plain, arch), rope.inv_freq)
    scale = _softmax_scale(arch) or arch.head_dim**-0.5
    assert scale == pytest.approx(attention.scaling * rope.attention_scaling**2, rel=1e-12)
    if arch.num_experts:
        router = model.model.layers[-1].mlp.gate
        assert (arch.num_experts_per_tok, arch.norm_topk_prob) == (router.top_k, router.norm_topk_prob)


REFUSED = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": YARN}, "rope_scaling .* beside rope_parameters"),
    ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN}, "rope_scaling .* beside rope_parameters"),
    ("qwen2", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling .* beside rope_parameters"),
    ("llama", {"rope_parameters": {**YARN, "type": "linear"}}, "rope_type 'yarn' and type 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters .*factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "RoPE factor '2'"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "low_freq_factor"),
    ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": 64.0}}, "original_max_position_embeddings"),
    ("llama", {"rope_scaling": {**YARN, "truncate": None}}, "truncate"),
    ("qwen2", {"rope_scaling": {"rope_type": "longrope", "factor": 2, "short_factor": [1] * 4, "long_factor": [2] * 4}},
     "longrope.*longest sequence of a batch"),
    ("llama", {"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "mrope"),
    ("qwen3", {"layer_types": ["full_attention"] * 3, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
     r"rope_type None \(RoPE by layer type\) in rope_parameters"),
    ("llama", {"rope_theta": None}, "rope_theta None"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"hidden_size": None}, "hidden_size None"),
    ("llama", {"hidden_size": -24}, "hidden_size -24"),
    ("qwen2", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers 2147483647; expected a positive integer up to 10000"),
    ("llama", {"rope_parameters": {"rope_type": "x"}, "eos_token_id": "x"}, "eos_token_id 'x'; expected a token id"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads 0"),
    ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads 3; expected a divisor of num_attention_heads 4"),
    ("qwen2", {"head_dim": 7}, "head_dim 7"),
    ("qwen2", {"head_dim": None}, "head_dim None"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
    ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings None"),
    ("llama", {"attention_bias": True}, "attention_bias True"),
    ("llama", {"mlp_bias": True}, "mlp_bias True"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen3", {"is_causal": False}, "is_causal False"),
    ("qwen3", {"per_layer_config": [{}]}, "per_layer_config"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention in layer_types"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window None"),
    ("mistral", {"sliding_window": 0}, "sliding_window 0"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("qwen3_moe", {"num_local_experts": 6}, "num_experts 4 beside num_local_experts 6"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok 5; expected at most num_experts 4"),
    ("qwen2_vl", {}, "model_type 'qwen2_vl'; supported are llama, mistral"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'.*dequantize.*delete quantization_config"),
    ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config"),
    ("llama", {"torch_dtype": "nonsense"}, "torch_dtype 'nonsense'; expected the name of a dtype"),
    ("llama", {"to_dict": 5}, "to_dict 5, which transformers refuses: to_dict is a part of LlamaConfig"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "changes", "pattern"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_built_is_refused_with_the_file_and_the_key(tmp_path, family, changes, pattern):
    write_config(tmp_path, family, changes)
    with pytest.raises(UnsupportedArchitecture, match=f"{tmp_path}/config.json (has|is) .*{pattern}"):
        load_architecture(tmp_path)


def test_a_lora_adapter_is_refused_with_the_remedy(tmp_path):
    write_config(tmp_path, "llama", {})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json is .* LoRA adapter.*merge_and_unload"):
        load_architecture(tmp_path)


SHAPES = {
    "at the top": ({"model_type": "llama", "max_position_embeddings": 256, "vocab_size": 97}, 256, 97),
    "in the text model": (
        {"model_type": "x", "text_config": {"max_position_embeddings": 64, "vocab_size": 7}, "vocab_size": 1}, 64, 7,
    ),
    "left to transformers": ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 131072, 262208),
    "left to transformers at both levels": ({"model_type": "gemma3", "text_config": {"vocab_size": 9}}, 131072, 9),
}  # fmt: skip


@pytest.mark.parametrize("config, positions, rows", SHAPES.values(), ids=SHAPES)
def test_the_shape_of_a_model_of_any_family(config, positions, rows):
    shape = ModelShape.of_config(config, "here")
    assert (shape.model_type, shape.max_positions, shape.vocab_size) == (config["model_type"], positions, rows)


def test_a_model_without_a_known_shape_is_refused():
    with pytest.raises(ValueError, match=r"^here: config\.json names no max_position_embeddings"):
        ModelShape.of_config({"model_type": "unknown", "vocab_size": 7}, "here")

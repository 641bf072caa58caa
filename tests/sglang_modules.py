"""Run by SGLang's own Python: real model modules of every rank, loaded by their own ``load_weights``, against our boxes.

    .venv-sglang/bin/python -m tests.sglang_modules '{"family": "qwen3", "tp": 4}' ...

A rank is made without processes: SGLang cuts its modules by the rank and the widths it was told.  Prints one JSON line
a case: how many parameters of all ranks were compared.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", SGLANG_USE_CPU_ENGINE="1")

CLASSES = {
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "vocab_size": 131,
    "tie_word_embeddings": False, "rope_theta": 1e4, "torch_dtype": "float32", "hidden_act": "silu",
    "num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def module_of(config: dict, tp: int, ep: int, rank: int):
    """The model of one rank, as a server's worker would make it."""
    import importlib

    import torch
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish, reset_context
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    reset_context()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        arguments = ServerArgs(model_path=folder, device="cpu", tp_size=tp, ep_size=ep, skip_tokenizer_init=True)
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
        hf_config = AutoConfig.from_pretrained(folder)
    room, name = CLASSES[config["model_type"]]
    model_class = getattr(importlib.import_module(f"sglang.srt.models.{room}"), name)
    parallel = get_parallel()
    # Groups are only looked at for their size and this rank, which SGLang worked out itself.
    groups = {"pp_group": SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)}
    for name in ("tp", "attn_tp", "moe_tp", "moe_ep"):
        size, at = getattr(parallel, f"{name}_size"), getattr(parallel, f"{name}_rank")
        groups[f"{name}_group"] = SimpleNamespace(world_size=size, rank_in_group=at, cpu_group=None)
    with parallel.override(**groups):
        model = model_class(hf_config)
        for parameter in model.parameters():
            parameter.data = torch.full(parameter.shape, -1.0, dtype=torch.float32)
        return model


def padded_by_sglang(config: dict, tp: int) -> dict:
    """What a server without a GPU makes of a config before it makes its modules."""
    from sglang.srt.configs.update_config import get_moe_padding_size, update_intermediate_size

    names = ("intermediate_size", "moe_intermediate_size")
    sizes = SimpleNamespace(**{name: config[name] for name in names})
    for name in names:
        update_intermediate_size(sizes, name, tp * get_moe_padding_size(None))
    return {**config, **{name: getattr(sizes, name) for name in names}}


def compare(case: dict) -> int:
    """Every parameter of every rank after ``load_weights`` against its boxes; the number of parameters."""
    import torch

    from megatron_tropd.models.hf_config import architecture_from_hf_config
    from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout, engine_boxes, parameter_names
    from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes

    changes = {key: value for key, value in case.items() if key not in ("family", "tp", "ep", "cpu")}
    config = {**SIZES, **changes, "model_type": case["family"], "architectures": [CLASSES[case["family"]][1]]}
    arch = architecture_from_hf_config(config)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=draw) for name, shape in hf_shapes(arch).items()}
    engine = EngineLayout(tp=case["tp"], ep=case.get("ep", 1), cpu=case.get("cpu", False))
    if engine.cpu:
        config = padded_by_sglang(config, engine.tp)
    compared = 0
    for rank in range(engine.tp):
        model = module_of(config, engine.tp, engine.ep, rank)
        model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
        held = dict(model.named_parameters())
        boxes = engine_boxes(arch, engine, rank)
        assert held.keys() == parameter_names(arch, tensors), "what a pushed server is expected to hold"
        assert held.keys() == {p.names[0] for p in boxes}, held.keys() ^ {p.names[0] for p in boxes}
        for param in boxes:
            mine = held[param.names[0]]
            assert tuple(mine.shape) == param.shape, (rank, param.names[0], tuple(mine.shape), param.shape)
            painted = torch.zeros(param.shape, dtype=torch.bool)
            for box in param.boxes:
                expected = tensors[box.hf_name][box.hf_slices]
                assert torch.equal(mine[box.local_slices], expected), (rank, param.names[0], box)
                painted[box.local_slices] = True
            assert (mine[~painted] <= 0).all(), (rank, param.names[0], "SGLang wrote where no box is")
            compared += 1
    return compared


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print(json.dumps({"case": json.loads(text), "compared": compare(json.loads(text))}), flush=True)

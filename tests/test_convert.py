"""HF -> Megatron -> HF: every file byte for byte, whatever the layout on the way."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint_convert import common, hf_to_megatron, inspect, megatron_to_hf
from megatron_tropd.parallel.groups import release_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from tests.hf_models import VARIANTS, read_tensors, save_hf_checkpoint, write_tensors

ROOT = Path(__file__).parents[1]
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]

# Run on every rank -------------------------------------------------------------------------------


def _flags(tp, pp):
    return ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]


def _to_megatron(source, save, tp=1, pp=1, *more):
    release_groups()
    hf_to_megatron.convert(["--hf-checkpoint", str(source), "--save", str(save), *_flags(tp, pp), *more])


def _to_hf(load, save, tp=1, pp=1, *more):
    release_groups()
    megatron_to_hf.convert(["--load", str(load), "--save", str(save), *_flags(tp, pp), *more])


def _error(function, *args):
    with pytest.raises(ValueError) as caught:
        function(*args)
    return str(caught.value)


def _train_and_save(hf, save_dir, tp, pp):
    """A step of Megatron's distributed optimizer on made-up gradients; the HF tensors it should give."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megatron_tropd.checkpoints.save import save_checkpoint
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.weights.coordinates.parameters import local_parameters
    from megatron_tropd.weights.files.load import load_hf_into
    from megatron_tropd.weights.transport.hf_export import export_hf

    release_groups()
    checkpoint, layout = HfCheckpoint.open(hf), ParallelLayout(tp=tp, pp=pp)
    groups = student_groups(layout)
    model = build_gpt_model(checkpoint.arch, groups, params_dtype=torch.bfloat16)
    load_hf_into(model, checkpoint, checkpoint.arch, layout, dist.get_rank())
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        Float16Module(model.config, model),
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        ),
        [ddp],
    )  # fmt: skip
    for parameter in ddp.parameters():
        parameter.main_grad.fill_(0.5)
    optimizer.step()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.pg_collection.dp_cp}
    model_state = model.sharded_state_dict(metadata=metadata)
    state = {"model": model_state, "optimizer": optimizer.sharded_state_dict(model_state, metadata=metadata)}
    save_checkpoint(save_dir, 7, state, {"cursor": 3}, arch=checkpoint.arch, hf_sidecar=hf)
    return {
        name: tensor.clone()
        for name, tensor in export_hf(local_parameters(ddp), checkpoint.arch, layout, dist.group.WORLD)
    }


def _save_swapped_keys_and_values(hf, save_dir):
    from megatron_tropd.checkpoints.directory import RELEASE
    from megatron_tropd.checkpoints.save import save_checkpoint
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.weights.files.hf_manifest import HfManifest
    from megatron_tropd.weights.files.load import load_hf_into

    release_groups()
    checkpoint = HfCheckpoint.open(hf)
    arch = checkpoint.arch
    model = build_gpt_model(arch, student_groups(ParallelLayout()), params_dtype=torch.float32)
    load_hf_into(model, checkpoint, arch, ParallelLayout(), 0)
    with torch.no_grad():
        weight = model.decoder.layers[2].self_attention.linear_qkv.weight
        groups = weight.view(arch.num_query_groups, -1, arch.head_dim, arch.hidden_size)
        groups[:, -2:] = groups[:, -2:].flip(1).clone()
    manifest = HfManifest.of(checkpoint, sha256={name: checkpoint.sha256(name) for name in checkpoint.tensors})
    save_checkpoint(
        save_dir, RELEASE, {"model": model.sharded_state_dict()}, {}, arch=arch, hf_sidecar=hf, manifest=manifest
    )


# Tests -------------------------------------------------------------------------------------------


def same_files(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    same, different, broken = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (sorted(same), different, broken) == (names, [], [])
    return True


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Every variant; qwen2 in bf16, qwen3 in shards, llama of mixed dtypes, llama_tied with a stored head."""
    root = tmp_path_factory.mktemp("hf")
    made = {}
    for variant in VARIANTS:
        dtype = torch.bfloat16 if variant == "qwen2" else torch.float32
        shards = "40KB" if variant == "qwen3" else "5GB"
        made[variant] = save_hf_checkpoint(root / variant, variant, dtype=dtype, max_shard_size=shards)
    (made["qwen2"] / "chat_template.jinja").write_text("{{ messages }}\r\n")
    mixed = read_tensors(made["llama"])
    write_tensors(made["llama"], {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in mixed.items()})
    tied = read_tensors(made["llama_tied"])
    write_tensors(made["llama_tied"], tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()})
    return made


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(ranks, sources, tmp_path, variant, tp, pp):
    """In at TP x PP on that many ranks; out at the same, and out of one process."""
    pool = ranks(tp * pp)
    pool.run(_to_megatron, sources[variant], tmp_path / "megatron", tp, pp)
    pool.run(_to_hf, tmp_path / "megatron", tmp_path / "hf", tp, pp)
    assert same_files(sources[variant], tmp_path / "hf")
    ranks(1).run(_to_hf, tmp_path / "megatron", tmp_path / "one", 2, 2)
    assert same_files(sources[variant], tmp_path / "one")


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_any_layout_in_any_layout_out(ranks, sources, tmp_path, tp, pp):
    """qwen2, tied: the embedding is on two stages, the bias is interleaved."""
    ranks(tp * pp).run(_to_megatron, sources["qwen2_tied"], tmp_path / "megatron", tp, pp)
    for out_tp, out_pp in [*GRIDS, (4, 1), (1, 4)]:
        out = tmp_path / f"hf{out_tp}{out_pp}"
        ranks(out_tp * out_pp).run(_to_hf, tmp_path / "megatron", out, out_tp, out_pp)
        assert same_files(sources["qwen2_tied"], out)


@pytest.mark.parametrize("divisor", ["1", "64", "131"])
def test_any_vocabulary_padding(ranks, sources, tmp_path, divisor):
    ranks(2).run(_to_megatron, sources["qwen3"], tmp_path / "megatron", 2, 1, "--make-vocab-size-divisible-by", divisor)
    ranks(2).run(_to_hf, tmp_path / "megatron", tmp_path / "hf", 1, 2)
    assert same_files(sources["qwen3"], tmp_path / "hf")


def test_a_trained_checkpoint(ranks, sources, tmp_path):
    """Saved with a distributed optimizer at TP 2; the HF files keep the layout of the source, not its numbers."""
    expected = ranks(2).run(_train_and_save, sources["qwen2"], tmp_path / "run", 2, 1)[0]
    ranks(1).run(_to_hf, tmp_path / "run", tmp_path / "hf", 1, 1, "--iteration", "7")
    found = read_tensors(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    before = read_tensors(sources["qwen2"])
    assert not torch.equal(found["model.norm.weight"], before["model.norm.weight"])
    old, new = (HfCheckpoint.open(d).headers["model.safetensors"].text for d in (sources["qwen2"], tmp_path / "hf"))
    assert old == new
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_changed_weights_are_not_passed_off_as_the_source(ranks, sources, tmp_path):
    """Keys and values swapped inside Megatron: right shapes, wrong model."""
    ranks(1).run(_save_swapped_keys_and_values, sources["qwen3_tied"], tmp_path / "run")
    for size, tp in ((1, 1), (2, 2)):
        errors = ranks(size).run(_error, _to_hf, tmp_path / "run", tmp_path / "hf", tp)
        assert len(set(errors)) == 1
        assert "layers.2.self_attn.k_proj.weight does not have the bytes it was converted from" in errors[0]
        assert not list((tmp_path / "hf").glob("*.safetensors*"))


def test_wrong_sources_are_refused_on_every_rank(ranks, sources, tmp_path):
    broken = Path(shutil.copytree(sources["qwen2"], tmp_path / "broken"))
    tensors = read_tensors(broken)
    write_tensors(broken, {n: t for n, t in tensors.items() if n != "model.layers.3.self_attn.v_proj.bias"})
    errors = ranks(2).run(_error, _to_megatron, broken, tmp_path / "out", 2)
    assert len(set(errors)) == 1
    assert "missing tensors: model.layers.3.self_attn.v_proj.bias" in errors[0]
    write_tensors(broken, tensors | {"model.layers.4.mlp.up_proj.weight": tensors["model.layers.3.mlp.up_proj.weight"]})
    assert "unknown tensors: model.layers.4.mlp.up_proj.weight" in ranks(1).run(
        _error, _to_megatron, broken, tmp_path / "out"
    )[0]  # fmt: skip
    head = Path(shutil.copytree(sources["llama_tied"], tmp_path / "head"))
    tensors = read_tensors(head)
    write_tensors(head, tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2})
    errors = ranks(2).run(_error, _to_megatron, head, tmp_path / "out", 1, 2)
    assert len(set(errors)) == 1
    assert "set tie_word_embeddings to false" in errors[0]
    assert not (tmp_path / "out").exists()


def test_flags_are_checked_against_the_model_and_the_world(ranks, sources, tmp_path):
    hf, out = sources["qwen2"], tmp_path / "out"
    one = ranks(1)
    assert "--tensor-model-parallel-size 3 does not divide" in one.run(_error, _to_megatron, hf, out, 3)[0]
    assert "--pipeline-model-parallel-size 3 does not divide" in one.run(_error, _to_megatron, hf, out, 1, 3)[0]
    assert "must both be at least 1" in one.run(_error, _to_megatron, hf, out, 0, 1)[0]
    expert = ("--expert-model-parallel-size", "3")
    assert "qwen2 has no experts" in one.run(_error, _to_megatron, hf, out, 1, 1, *expert)[0]
    assert "does not divide the model's 4 experts" in one.run(
        _error, _to_megatron, sources["qwen3_moe"], out, 1, 1, *expert
    )[0]  # fmt: skip
    assert "must both be at least 1" in one.run(_error, _to_megatron, hf, out, 1, 1, expert[0], "0")[0]
    nested = one.run(_error, _to_megatron, hf, hf / "megatron")[0]
    assert "overlap; give --save a directory of its own" in nested
    assert not out.exists()


def test_existing_output_is_kept_without_overwrite(ranks, sources, tmp_path):
    one = ranks(1)
    one.run(_to_megatron, sources["qwen3"], tmp_path / "megatron")
    assert "--overwrite" in one.run(_error, _to_megatron, sources["qwen2"], tmp_path / "megatron")[0]
    one.run(_to_hf, tmp_path / "megatron", tmp_path / "hf")
    assert "--overwrite" in one.run(_error, _to_hf, tmp_path / "megatron", tmp_path / "hf")[0]
    one.run(_to_megatron, sources["qwen3_tied"], tmp_path / "megatron", 1, 1, "--overwrite")
    one.run(_to_hf, tmp_path / "megatron", tmp_path / "hf", 1, 1, "--overwrite")
    assert same_files(sources["qwen3_tied"], tmp_path / "hf")  # the old shards and index are gone


@pytest.mark.slow
def test_commands_as_a_user_runs_them(sources, tmp_path):
    """Files and modules, one process and torchrun, exit codes; no traceback for a user's error."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}

    def call(*command, cwd=ROOT):
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)

    folder = ROOT / "checkpoint_convert"
    out = ("--hf-checkpoint", sources["qwen3"], "--save", tmp_path / "megatron")
    done = call(sys.executable, "hf_to_megatron.py", *out, cwd=folder)  # beside inspect.py, the worst place
    assert (done.returncode, done.stderr) == (0, "")
    assert "47 tensors, float32, vocabulary 131 padded to 256" in done.stdout
    done = call(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        folder / "megatron_to_hf.py", "--load", tmp_path / "megatron", "--save", tmp_path / "hf",
        "--tensor-model-parallel-size", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "identical to the source" in done.stdout
    assert same_files(sources["qwen3"], tmp_path / "hf")
    done = call(sys.executable, "-m", "checkpoint_convert.hf_to_megatron", *out)
    assert done.returncode == common.USAGE_ERROR
    assert done.stderr.startswith("error: --save") and done.stderr.count("\n") == 1


def test_inspect(ranks, sources, tmp_path, capsys):
    ranks(2).run(_to_megatron, sources["qwen2"], tmp_path / "megatron", 2)
    inspect.inspect([str(tmp_path / "megatron"), "--all"])
    text = capsys.readouterr().out
    for line in ("iteration release", "qwen2, 4 layers of 32", "8 heads of 4, 4 key/value heads", "131, separate",
                 "bfloat16", "output_layer.weight"):  # fmt: skip
        assert line in text
    inspect.inspect([str(sources["qwen3"])])
    text = capsys.readouterr().out
    assert "Hugging Face, 13 safetensors file(s)" in text
    assert "47 (47 float32), 404.10 kB" in text
    assert "35 more (--all)" in text
    with pytest.raises(ValueError, match=r"has neither config\.json"):
        inspect.inspect([str(tmp_path)])

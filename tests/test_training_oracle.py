"""Whole steps against transformers and autograd in float64, which share no code with the trainer."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tropd import rng
from tests.tiny_run import flags, make_world

SEED, VOCAB = 7, 131
LAYOUTS = {
    "one rank": (1, {}),
    "TP2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2, "teacher_tensor_model_parallel_size": 2}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True, "teacher_pipeline_model_parallel_size": 2}),
}


def _first_step(argv):
    """(report, rollouts) of one step."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    try:
        push_weights(assembled.run)
        report, trained = train_step(assembled.run, 0)
        return report, trained.rollouts
    finally:
        close(assembled)


def _model(directory):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    model.get_input_embeddings().padding_idx = (
        None  # transformers gives the padding token no gradient; it may be written
    )
    return model


def _logprobs(model, rollout):
    """[R, V] of the response tokens, float64, carrying gradients."""
    logits = model(torch.tensor([rollout.token_ids])).logits[0, rollout.prompt_len - 1 : -1, :VOCAB]
    return logits.log_softmax(-1)


def _gradient(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module", params=["qwen3", "qwen3_tied"])
def world(request, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), student=request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_diagnostics_equal_autograd(ranks, world, tmp_path, layout, measured):
    """OPD with a teacher prefix: norms and cosines of all four regions, and the norm of the exact reverse KL."""
    size, changes = LAYOUTS[layout]
    argv = flags(world, tmp_path / "run", objective="opd", guidance="ratio", guidance_steps=3, train_iters=1,
                 gradient_diagnostics_interval=1, guidance_schedule="linear", seed=SEED, **changes)  # fmt: skip
    argv += ["--n-samples-per-prompt", "2", "--rollout-batch-size", "12"]
    report, rollouts = ranks(size).run(_first_step, argv)[0]
    student, teacher = _model(world / "student"), _model(world / "teacher")
    coins = rng.key(SEED, rng.Stream.GATE, 0)
    losses = dict.fromkeys(("trusted_positive", "trusted_negative", "rejected", "guidance"), 0.0)
    exact, count = 0.0, 0
    for rollout in rollouts:
        log_p = _logprobs(student, rollout)
        with torch.no_grad():
            log_q = _logprobs(teacher, rollout)
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])
        own = log_p.gather(1, labels[:, None])[:, 0]
        reward = log_q.gather(1, labels[:, None])[:, 0] - own.detach()
        uid = torch.tensor(rng.sample_uid(rollout.prompt_uid, rollout.sample_index))
        uniform = rng.uniform(coins, uid, torch.arange(len(labels)) + rollout.prompt_len)
        written = torch.arange(len(labels)) >= rollout.guidance_len
        trusted = written & (uniform < reward.exp().clamp(max=1))
        losses["trusted_positive"] += (-reward * own)[trusted & (reward > 0)].sum()
        losses["trusted_negative"] += (-reward * own)[trusted & (reward <= 0)].sum()
        losses["rejected"] += (-reward * own)[written & ~trusted].sum()
        exact += (log_p.exp() * (log_p - log_q)).sum(1)[written].sum()
        count += int(written.sum())
        if rollout.sample_index == 0:
            losses["guidance"] += 0.5 * -own[~written].sum()  # --guidance-beta
            count += int((~written).sum())
    reference = _gradient(student, exact / count)
    metrics = report.metrics
    errors = [abs(metrics["gradient/norm_reverse_kl"] / float(reference.norm()) - 1)]
    assert report.tokens["guidance"] + report.tokens["on_policy"] == count
    total = torch.zeros_like(reference)
    for name, loss in losses.items():
        gradient = _gradient(student, loss / count)
        total += gradient
        if not gradient.any():
            assert metrics[f"gradient/norm_{name}"] == 0 and f"gradient/cosine_{name}" not in metrics
            continue
        errors.append(abs(metrics[f"gradient/norm_{name}"] / float(gradient.norm()) - 1))
        cosine = float(gradient @ reference / (gradient.norm() * reference.norm()))
        errors.append(abs(metrics[f"gradient/cosine_{name}"] - cosine))
    errors.append(abs(report.grad_norm / float(total.norm()) - 1))
    measured("gradient norms and cosines by region equal float64 autograd of transformers", max(errors), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_supervised_finetuning_equals_cross_entropy(ranks, world, tmp_path, layout, measured):
    size, changes = LAYOUTS[layout]
    argv = flags(world, tmp_path / "run", objective="sft", train_iters=1, teacher_hf_checkpoint=None,
                 **{k: v for k, v in changes.items() if "teacher" not in k})  # fmt: skip
    report, rollouts = ranks(size).run(_first_step, argv)[0]
    student = _model(world / "student")
    loss, count = 0.0, 0
    for rollout in rollouts:
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])
        assert rollout.guidance_len == len(labels) and labels[-1] == 2, "whole responses, stop token included"
        loss = loss - _logprobs(student, rollout).gather(1, labels[:, None]).sum()
        count += len(labels)
    loss = loss / count
    norm = float(_gradient(student, loss).norm())
    errors = [abs(report.loss - float(loss.detach())), abs(report.grad_norm / norm - 1)]
    measured("supervised finetuning: loss and gradient norm equal transformers", max(errors), 1e-5)
    assert report.tokens == {"guidance": count, "on_policy": 0}


@pytest.mark.parametrize("reference", ["the student as it starts", "another model"])
def test_gopd_reads_the_reference(ranks, world, tmp_path, reference, measured):
    """A = l (log q - log ref) - (log p - log ref); with the student as reference its second half is zero."""
    other = {} if reference == "the student as it starts" else {"reference_hf_checkpoint": world / "teacher"}
    argv = flags(world, tmp_path / "run", objective="gopd", gopd_lambda=3.0, train_iters=1,
                 teacher_tensor_model_parallel_size=2, **other)  # fmt: skip
    report, rollouts = ranks(2).run(_first_step, argv)[0]
    student, teacher = _model(world / "student"), _model(world / "teacher")
    third = teacher if other else student
    loss, count = 0.0, 0
    for rollout in rollouts:
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])[:, None]
        own = _logprobs(student, rollout).gather(1, labels)[:, 0]
        with torch.no_grad():
            log_q, log_r = (_logprobs(m, rollout).gather(1, labels)[:, 0] for m in (teacher, third))
        advantage = 3 * (log_q - log_r) - (own.detach() - log_r)
        loss -= (advantage * (own - own.detach()).exp()).sum()
        count += len(labels)
    norm = float(_gradient(student, loss / count).norm())
    errors = [abs(report.loss / float(loss.detach() / count) - 1), abs(report.grad_norm / norm - 1)]
    measured("G-OPD with a reference: loss and gradient norm equal transformers", max(errors), 1e-5)


def test_the_entropy_threshold_is_the_exact_quantile(ranks, world, tmp_path):
    """A share of 0.25 keeps ceil(n / 4) tokens of the whole batch, those with the highest entropy."""
    argv = flags(world, tmp_path / "run", objective="entropy_opd", entropy_share=0.25, train_iters=1)
    report, rollouts = ranks(2).run(_first_step, argv)[0]
    student = _model(world / "student")
    entropies, terms = [], []
    teacher = _model(world / "teacher")
    for rollout in rollouts:
        with torch.no_grad():
            log_p, log_q = _logprobs(student, rollout), _logprobs(teacher, rollout)
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])[:, None]
        entropies.append(-(log_p.exp() * log_p).sum(1))
        terms.append((log_p - log_q).gather(1, labels)[:, 0])
    entropy, term = torch.cat(entropies), torch.cat(terms)
    keep = math.ceil(len(entropy) / 4)
    kept = entropy.topk(keep).indices
    assert report.metrics["tropd/selected_frac"] == keep / len(entropy)
    assert report.loss == pytest.approx(float(term[kept].sum() / len(entropy)), rel=1e-5)
    assert report.metrics["student/entropy_threshold"] == pytest.approx(float(entropy[kept].min()), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_distillation_on_the_data_equals_transformers(ranks, world, tmp_path, layout, measured):
    """kd: sum over the teacher's 5 most probable tokens of q log(q / p), on every token of the responses of the data."""
    size, changes = LAYOUTS[layout]
    report, rollouts = ranks(size).run(
        _first_step, flags(world, tmp_path / "run", objective="kd", train_iters=1, **changes)
    )[0]
    student, teacher = _model(world / "student"), _model(world / "teacher")
    loss, count = 0.0, 0
    for rollout in rollouts:
        assert rollout.token_ids[-1] == 2 and rollout.guidance_len == 0, "whole responses, stop token included"
        with torch.no_grad():
            log_q, ids = _logprobs(teacher, rollout).topk(5)
        loss = loss + (log_q.exp() * (log_q - _logprobs(student, rollout).gather(1, ids))).sum()
        count += len(ids)
    loss = loss / count
    norm = float(_gradient(student, loss).norm())
    errors = [abs(report.loss / float(loss.detach()) - 1), abs(report.grad_norm / norm - 1)]
    measured("distillation on the data (kd): loss and gradient norm equal transformers", max(errors), 1e-5)
    assert report.tokens == {"guidance": 0, "on_policy": count}
    assert not [name for name in report.metrics if name.startswith(("rollout/", "importance/", "parity/"))]

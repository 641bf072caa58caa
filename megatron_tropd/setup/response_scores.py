"""A teacher scores the responses of --prompt-data once, into files that runs read (``--teacher-placement file``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.cli import ConfigError
from megatron_tropd.parallel.exchange import exchange
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.parallel.groups import student_groups
from megatron_tropd.setup.model_digests import model_digests
from megatron_tropd.setup.models import make_frozen
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.setup.stored_scores import key_of_rollout, response_parts
from megatron_tropd.teacher.megatron import Located
from megatron_tropd.teacher.routing import flatten, payloads, unflatten
from megatron_tropd.teacher.stored.files import MANIFEST, Manifest, shard_keys, shard_path, write_shard
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the scoring of the data has come."""

    done: int
    total: int
    skipped: int
    """Of ``done``, those that an earlier launch had scored."""


def score_responses(spec: RunSpec, directory: Path, say: Callable[[Progress], None]) -> None:
    """Score every response of --prompt-data and write shards, but those that are there already.  Collective over the
    world, which the teacher's layout fills.

    Raises:
        ConfigError: on every rank: the directory holds the scores of another teacher, or of other numbers.
        ValueError: on every rank: a shard is damaged, or the teacher gives NaN.
    """
    config, models = spec.config, spec.models
    teacher = models.teachers[0]
    want = spec.objective.needs.score
    digest = model_digests(models)["teacher"]
    manifest = Manifest(
        teacher=digest, top_k=want.top_k, vocab_size=spec.tokens.common_vocab_size, entropy=want.entropy
    )
    on_rank_zero(lambda: _begin(directory, manifest), lambda reason: ConfigError([reason]))
    timeout_s = config.parallel.distributed_timeout_s
    groups = student_groups(teacher.layout, seed=config.training.seed, timeout_s=timeout_s)
    model = make_frozen(spec, teacher.model, groups, "teacher", offload=config.teacher.teacher_offload)
    done = skipped = 0
    for number, rollouts in enumerate(response_parts(spec.data.prompts)):
        path, keys = shard_path(directory, number), [key_of_rollout(rollout) for rollout in rollouts]
        if on_rank_zero(lambda path=path: shard_keys(path)) == keys:  # type: ignore[misc]
            skipped += len(keys)
        else:
            by_index = dict(enumerate(rollouts))
            scored = _on_rank_zero(model.score_here(by_index, want), by_index, want)
            on_rank_zero(lambda path=path, scored=scored, keys=keys: _write(path, keys, scored))  # type: ignore[misc]
        done += len(keys)
        say(Progress(done=done, total=len(spec.data.prompts), skipped=skipped))


def _begin(directory: Path, manifest: Manifest) -> None:
    if (directory / MANIFEST).exists():
        found = Manifest.read(directory)
        if found != manifest:
            raise ValueError(
                f"--teacher-scores {directory} holds other scores ({_differences(found, manifest)}): name another "
                "directory, or delete it"
            )
    manifest.write(directory)


def _differences(found: Manifest, wanted: Manifest) -> str:
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in Manifest.__dataclass_fields__}
    return ", ".join(f"{name} {str(a)[:12]}, not {str(b)[:12]}" for name, (a, b) in pairs.items() if a != b)


def _on_rank_zero(located: Located, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> dict[int, TeacherScores]:
    """Send all scores to rank 0; {} elsewhere."""
    specs = payloads(rollouts, want, None, {})
    by_rank: dict[int, list[int]] = {}
    for index, source in sorted(located.sources.items()):
        by_rank.setdefault(source, []).append(index)
    rank = dist.get_rank()
    send = {0: flatten(located.scores, by_rank[rank], specs)} if rank in by_rank else {}
    receive = {peer: [s for i in indices for s in specs[i].values()] for peer, indices in by_rank.items()}
    arrived = exchange(send, receive if rank == 0 else {})
    return {i: scores for peer in arrived for i, scores in unflatten(arrived[peer], by_rank[peer], specs).items()}


def _write(path: Path, keys: Sequence[bytes], scored: dict[int, TeacherScores]) -> None:
    write_shard(path, [(key, scored[index]) for index, key in enumerate(keys)])

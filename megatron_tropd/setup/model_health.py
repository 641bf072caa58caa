"""Check that a teacher or reference computes what it should, before a run learns from it.

Three checks, with one forward pass over a few short sequences:

- a converted checkpoint with ``known_logprobs.json``: the log-probabilities are those of transformers' model;
- a resumed run: they are those that were recorded when the run started (the digests show that the files did not
  change; this shows that what is computed from them did not);
- always: the text of the run's own data is not absurd to the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from megatron_tropd.checkpoints.known_logprobs import KnownLogprobs, read_known_logprobs
from megatron_tropd.checkpoints.run_record import RunRecord
from megatron_tropd.cli import ConfigError
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.setup.model_specs import ModelSpec
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.setup.same_run import Origin
from megatron_tropd.teacher.scorer import Scorer
from megatron_tropd.training.parity import probe_sequences

NUM_TEXTS = 8
WORSE_THAN_UNIFORM = 10.0
"""Nats per token by which real text may be less probable than under the uniform distribution.  A trained model gives it
several nats more than uniform, the random models of the tests 3.6 less; a damaged weight takes off 1e3 to 1e38."""
UNIFORM = 1e-3
"""Nats.  Closer to uniform at every token is no model: its activations overflow, and the last norm makes them 0."""
_DAMAGED = "its weights are damaged, or it is not a model of this text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The result of the checks of all models."""

    record: RunRecord
    """The record of the launch, with the log-probabilities of its models."""
    warnings: tuple[str, ...]


def check_scorers(spec: RunSpec, scorers: Mapping[str, Scorer], origin: Origin) -> Health:
    """Check the models that score, by role.  Collective over the world.

    Raises:
        ConfigError: on every rank: a model is damaged (unless --on-parity or --on-spike say otherwise).
    """
    errors: list[str] = []
    warnings: list[str] = []
    models = dict(origin.record.models)
    stored = [teacher.role for teacher in spec.models.teachers if teacher.placement == "file"]
    for role, scorer in scorers.items():
        source = spec.models.by_role[role]
        if role in stored:
            continue  # no model runs; its scores were made by one with the same digest
        found = _score(role, source, scorer, spec, _recorded(role, origin))
        config = spec.config
        parity, absurd = found.differences(config.parity_limit), found.absurdities()
        (errors if config.engine.on_parity == "stop" else warnings).extend(parity)
        (errors if config.training.on_spike == "stop" else warnings).extend(absurd)
        if not parity and not absurd:
            warnings.extend(found.doubts())
        models[role] = replace(models[role], known=found.before or found.of_text)
    if errors:
        raise ConfigError(errors)
    return Health(record=replace(origin.record, models=models), warnings=tuple(f"warning: {text}" for text in warnings))


def _recorded(role: str, origin: Origin) -> KnownLogprobs | None:
    """Return what the same model gave when the run started; None for another model."""
    old = origin.before.models.get(role) if origin.before else None
    return old.known if old and old.digest == origin.record.models[role].digest else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """What a model gives the sequences, beside what is known."""

    who: str
    """The model with its flag, for messages."""
    vocab_size: int
    converted: KnownLogprobs | None
    of_converted: Sequence[Sequence[float]]
    before: KnownLogprobs | None
    of_text: KnownLogprobs | None
    """Of text from --prompt-data; None where all prompts are single tokens."""

    def differences(self, limit: float) -> list[str]:
        """Return complaints about log-probabilities that differ from the known ones."""
        told = []
        if self.converted and not (gap := self.converted.mean_difference(self.of_converted)) <= limit:
            told.append(
                f"{self.who} gives the sequences of known_logprobs.json log-probabilities that differ by {gap:.3g} "
                f"nats on average from those of transformers, above --parity-limit {limit:g}: its stored weights are "
                "damaged or are read wrongly in this layout; convert the model again with --verify-logits, or pass "
                "--on-parity warn"
            )
        if self.before and self.of_text and not (gap := self.before.mean_difference(self.of_text.logprobs)) <= limit:
            told.append(
                f"{self.who} gives the sequences that were recorded when the run started log-probabilities that "
                f"differ by {gap:.3g} nats on average from those of then, above --parity-limit {limit:g}: its files "
                "are the same, so this code, layout or machine computes something else; go back to those of the "
                "run's start, or pass --on-parity warn"
            )
        return told

    @property
    def _text_logprobs(self) -> list[float]:
        return list(chain.from_iterable(self.of_text.logprobs)) if self.of_text else []

    def absurdities(self) -> list[str]:
        """Return complaints about numbers that no model gives to text."""
        logprobs, uniform = self._text_logprobs, -math.log(self.vocab_size)
        advice = f"{_DAMAGED}; compare its files with their source, or pass --on-spike warn"
        if logprobs and all(abs(logprob - uniform) < UNIFORM for logprob in logprobs):
            return [f"{self.who} gives every token of --prompt-data the probability 1 / {self.vocab_size}: {advice}"]
        if logprobs and not _mean(logprobs) >= uniform - WORSE_THAN_UNIFORM:
            return [
                f"{self.who} gives the text of --prompt-data a log-probability of {_mean(logprobs):.4g} nats per "
                f"token, more than {WORSE_THAN_UNIFORM:g} below the {uniform:.3g} of a uniform distribution: {advice}"
            ]
        return []

    def doubts(self) -> list[str]:
        """Return warnings about numbers that only an untrained model gives to text."""
        logprobs, uniform = self._text_logprobs, -math.log(self.vocab_size)
        if not logprobs or _mean(logprobs) > uniform:
            return []
        return [
            f"{self.who} gives the text of --prompt-data a log-probability of {_mean(logprobs):.4g} nats per token, "
            f"not more than the {uniform:.3g} of a uniform distribution: is it the right model, and trained?"
        ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else -math.inf


def _score(role: str, source: ModelSpec, scorer: Scorer, spec: RunSpec, before: KnownLogprobs | None) -> _Scored:
    """Score the known sequences and text of the run's prompts, or the text recorded ``before``, in one pass."""
    flag = "reference" if role == "reference" else "teacher"
    who = f"the {role} (--{flag}-hf-checkpoint {source.hf_dir})"
    converted = None
    if (megatron_dir := source.megatron_dir) is not None:
        who = f"the {role} (--{flag}-load {megatron_dir})"
        converted = on_rank_zero(lambda: read_known_logprobs(megatron_dir), lambda reason: ConfigError([reason]))
    texts = before.sequences if before else _texts(spec)
    known = converted.sequences if converted else ()
    found: list[list[float]] = []
    if known or texts:
        try:
            found = scorer.logprobs_of([*known, *texts], vocab_size=source.arch.vocab_size)
        except ValueError as error:  # the same on every rank
            text = (
                f"{who} gives short sequences NaN or infinite logits: {_DAMAGED}; compare its files with their source"
            )
            raise ConfigError([text]) from error
    of_text = tuple(map(tuple, found[len(known) :]))
    return _Scored(
        who=who,
        vocab_size=source.arch.vocab_size,
        converted=converted,
        of_converted=found[: len(known)],
        before=before,
        of_text=KnownLogprobs(sequences=tuple(texts), logprobs=of_text) if texts else None,
    )


def _texts(spec: RunSpec) -> tuple[tuple[int, ...], ...]:
    return tuple(probe.token_ids for probe in probe_sequences(spec.data.prompts, NUM_TEXTS))

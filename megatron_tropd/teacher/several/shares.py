"""Which of several teachers scores a prompt, and with what weight.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron_tropd.teacher_config import NamedTeacher


class Shares:
    """The teachers of every domain.

    A prompt is scored by the teachers that name its domain.  Those that name none score the prompts of all other
    domains.  Where several score a prompt, the mixture of their distributions does, with weights that sum to 1.

    Example:
        >>> # code.yaml: domains [code]; large.yaml and small.yaml: no domains, weights 3 and 1
        >>> shares.of("code"), shares.of("math")
        ({'code': 1.0}, {'large': 0.75, 'small': 0.25})
    """

    def __init__(self, teachers: Sequence[NamedTeacher]) -> None:
        self._named = {
            domain: _normalized([teacher for teacher in teachers if domain in teacher.domains])
            for domain in {domain for teacher in teachers for domain in teacher.domains}
        }
        self._others = _normalized([teacher for teacher in teachers if not teacher.domains])

    def of(self, domain: str) -> Mapping[str, float]:
        """Return the weight of each teacher, by its name, for the prompts of ``domain``; {} where none scores them."""
        return self._named.get(domain, self._others)

    @property
    def named(self) -> Collection[str]:
        """Domains that a teacher names."""
        return self._named.keys()

    @property
    def mixed(self) -> frozenset[str]:
        """Names of the teachers that score some domain together with others."""
        return frozenset(
            name for weights in (*self._named.values(), self._others) if len(weights) > 1 for name in weights
        )


def _normalized(teachers: Sequence[NamedTeacher]) -> dict[str, float]:
    total = sum(teacher.weight for teacher in teachers)
    return {teacher.name: teacher.weight / total for teacher in teachers}

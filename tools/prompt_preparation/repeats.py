"""Prompts that come again, with the same answer or with another one."""

from __future__ import annotations

from tools.prompt_preparation.texts import normalised, short_hash

_KEPT = 1
_NO_ANSWER = 0


class Repeats:
    """Which prompts were seen, which of them were kept, and which came with several answers.

    About 150 bytes a prompt: a dictionary from the prompt's key to one integer, twice the hash of its first answer plus
    whether it was kept.  Answers are compared as normalised text.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self.conflicts: set[int] = set()
        """Keys of the prompts that came with different answers, whatever became of the rows."""

    def see(self, key: int, answer: str | None) -> None:
        """Note a row with a prompt and an answer."""
        state = self._seen.get(key, 0)
        found = _NO_ANSWER if answer is None else (short_hash(normalised(answer)) | 1)
        known = state >> 1
        if known == _NO_ANSWER:
            self._seen[key] = found << 1 | (state & _KEPT)
        elif found not in (_NO_ANSWER, known):
            self.conflicts.add(key)

    def was_kept(self, key: int) -> bool:
        """Return whether a row with this prompt was kept."""
        return bool(self._seen.get(key, 0) & _KEPT)

    def keep(self, key: int) -> None:
        """Note that a row with this prompt is kept."""
        self._seen[key] = self._seen.get(key, 0) | _KEPT

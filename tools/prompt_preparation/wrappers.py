"""Fixed sentences around the question of a prompt: taken off, or added."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.prompt_preparation.drafts import Message


def strip(text: str, prefixes: Sequence[str], suffixes: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return ``text`` without the first prefix and the first suffix that it has, and those that were taken off.

    Whitespace that is left at that end goes too.  A text that would be blank stays as it is.
    """
    found = []
    for affixes, has, without in (
        (prefixes, str.startswith, lambda whole, part: whole[len(part) :].lstrip()),
        (suffixes, str.endswith, lambda whole, part: whole[: -len(part)].rstrip()),
    ):
        affix = next((affix for affix in affixes if has(text, affix) and without(text, affix).strip()), None)
        if affix is not None:
            text = without(text, affix)
            found.append(affix)
    return text, tuple(found)


def last_user_changed(messages: Sequence[Message], change: Callable[[str], str]) -> tuple[Message, ...]:
    """Return the conversation with the content of its last message by the user changed."""
    places = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        return tuple(messages)
    last = places[-1]
    changed = {**messages[last], "content": change(messages[last]["content"])}
    return (*messages[:last], changed, *messages[last + 1 :])

"""Whether a teacher's response continues the thinking that the prompt opened.

Chat templates of reasoning models may end with the tag that opens the thinking, and responses in data sets may begin
with it.  With both, the student would continue from a doubled tag; with neither but a closing tag, from a missing one.
Both train without any error, on text that the model never sees otherwise.
"""

from __future__ import annotations

from megatron_tropd.data.encoding.row_format import Fault

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SHOWN = 40


def check_thinking(prompt: str, response: str) -> None:
    """Check the seam between a rendered prompt and the teacher's response to it.

    Raises:
        Fault: a thinking tag is doubled or missing there; the text around the seam is shown.
    """
    for opening, closing in TAGS:
        problem = _problem(prompt.rstrip(), response, opening, closing)
        if problem:
            seam = ascii(prompt[-_SHOWN:]) + " + " + ascii(response[:_SHOWN])
            raise Fault(
                f"{problem} (rendered: {seam})",
                "a response that continues the prompt: change the responses, or the chat template",
                "--response-key",
            )


def _problem(prompt: str, response: str, opening: str, closing: str) -> str:
    """Return what is wrong with one kind of tag at the seam; "" for nothing."""
    opened, closed = prompt.endswith(opening), prompt.endswith(closing)
    begins = response.lstrip().startswith(opening)
    before, found, _ = response.partition(closing)
    ends_unopened = bool(found) and opening not in before
    if opened and begins:
        return f"{opening} twice: the prompt ends with it and the response begins with it"
    if closed and begins:
        return f"{opening} after {closing}: the prompt ends with a finished thought and the response begins one"
    if closed and ends_unopened:
        return f"{closing} twice: the prompt ends with it, and the response has it without {opening} before it"
    if ends_unopened and not opened:
        return f"{closing} without {opening}: neither the end of the prompt nor the response opens the thought"
    return ""

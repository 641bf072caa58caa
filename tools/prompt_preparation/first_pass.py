"""Every row read once: kept in the spool, or left out with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tropd.data.encoding.fields import plain_value
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.readers import read_span
from megatron_tropd.data.reading.rows import BadRow, PromptError, Row, show
from megatron_tropd.data.reading.spans import Span
from tools.prompt_preparation.benchmarks import Benchmarks
from tools.prompt_preparation.drafts import Draft, LeftOut, Message, Reference
from tools.prompt_preparation.layouts.conversations import required, text_or_none
from tools.prompt_preparation.layouts.layout import Layout
from tools.prompt_preparation.layouts.references import check_reference
from tools.prompt_preparation.lengths import Measure, Sizes
from tools.prompt_preparation.repeats import Repeats
from tools.prompt_preparation.settings import Settings
from tools.prompt_preparation.sources import FoundFile
from tools.prompt_preparation.tally import Tally
from tools.prompt_preparation.texts import key_of, uid_of
from tools.prompt_preparation.wrappers import last_user_changed, strip
from tools.prompt_preparation.writing import Record, Spool, schema_of

_BATCH = 256
"""Rows that are tokenized at one time."""
_OUR_FLAGS = {"--domain-key", "--uid-key", "--grader", "--prompt-form", "--responses", "--where"}
_FLAGS_OF_ROWS = {"--prompt-key", "--response-key", "--answer-key", "--grader-key"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A row that is judged by its prompt."""

    row: Row
    place: str
    draft: Draft
    """With the wrappers of the prompt taken off, and with the domain and grader that are written."""
    key: int
    prompt: str | tuple[Message, ...]
    """As it is written."""


class FirstPass:
    """Reads files into a spool.  Its state is the prompts that were seen, and the form of the prompts."""

    def __init__(
        self, *, settings: Settings, layout: Layout, measure: Measure, benchmarks: Benchmarks, tally: Tally,
        spool_path: Path, say: Callable[[int], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        self._settings, self._layout, self._measure = settings, layout, measure
        self._benchmarks, self._tally, self._say = benchmarks, tally, say
        self._spool_path = spool_path
        self.repeats = Repeats()
        self._copies: Counter[int] = Counter()
        self._form = settings.prompt_form
        if self._form == "auto" and layout.name != "rows":
            self._form = "messages"
        self.spool: Spool | None = None
        """None until a row is kept."""

    def read(self, files: Sequence[FoundFile]) -> None:
        """Read all files.

        Raises:
            PromptError: a file cannot be read or has no rows; or rows cannot be used, with --on-bad-row error.
            OSError: the spool cannot be written.
        """
        try:
            for file in files:
                self._read_file(file)
        finally:
            if self.spool is not None:
                self.spool.close()
        if self._tally.bad_rows and self._settings.on_bad_row == "error":
            raise PromptError(self._tally.bad_rows, self._tally.left_out["bad_row"])

    def _columns(self) -> frozenset[str]:
        settings = self._settings
        keys = (settings.domain_key, settings.uid_key, *(key for key, _ in settings.where))
        named = {name for key in keys if key for name in (key, key.partition(".")[0])}
        return self._layout.columns | named

    def _read_file(self, file: FoundFile) -> None:
        before = self._tally.read
        waiting: list[Candidate] = []
        for item in read_span(Span(file=file.file), self._columns()):
            if isinstance(item, BadRow) and not item.line:
                raise PromptError([item])
            self._tally.read += 1
            place = f"{file.name}:{item.line}"
            if isinstance(item, BadRow):
                self._bad(item, place)
                continue
            waiting += self._judged(item, place)
            if len(waiting) >= _BATCH:
                self._settle(waiting)
                waiting = []
                self._say(self._tally.read)
        self._settle(waiting)
        if self._tally.read == before:
            raise PromptError(
                [BadRow(path=file.file.path, line=0, found="no rows", expected="at least one", flag="--prompt-data")]
            )

    def _judged(self, row: Row, place: str) -> Iterator[Candidate]:
        """Yield the row as a candidate, or leave it out."""
        try:
            candidate = self._candidate(row, place)
        except Fault as fault:
            self._fault(row, place, fault)
            return
        except LeftOut as left:
            self._tally.leave_out(left.reason, place, None, left.detail)
            return
        if self._settings.require_answer and candidate.draft.reference.answer is None:
            detail = candidate.draft.reference.left_out
            self._tally.leave_out("no_answer", place, uid_of(candidate.key), detail)
            return
        self.repeats.see(candidate.key, candidate.draft.reference.answer)
        if not self._repeated(candidate):
            yield candidate

    def _repeated(self, candidate: Candidate) -> bool:
        """Return whether the prompt was kept before, and leave it out if it was."""
        if self._settings.duplicates == "keep" or not self.repeats.was_kept(candidate.key):
            return False
        self._tally.leave_out("duplicate", candidate.place, uid_of(candidate.key))
        return True

    def _candidate(self, row: Row, place: str) -> Candidate:
        """Return what the row gives.

        Raises:
            Fault: it cannot be used.
            LeftOut: it is not wanted.
        """
        settings = self._settings
        for key, wanted in settings.where:
            found = _as_text(required(row, key, "--where"))
            if found != wanted:
                raise LeftOut("where", f"{key} is {show(found, 80)}")
        draft = self._layout.read(row, settings)
        domain = self._domain(row, draft)
        if settings.domains and domain not in settings.domains:
            raise LeftOut("domain", domain)
        reference = self._reference(draft.reference)
        uid = draft.uid if settings.uid_key is None else text_or_none(required(row, settings.uid_key), "uid")
        messages = draft.messages
        if settings.strip_prefix or settings.strip_suffix:
            messages = last_user_changed(messages, self._stripped)
        draft = replace(draft, messages=messages, domain=domain, reference=reference, uid=uid)
        prompt = self._prompt(draft)
        return Candidate(row=row, place=place, draft=draft, key=key_of(messages), prompt=prompt)

    def _domain(self, row: Row, draft: Draft) -> str:
        settings, domain = self._settings, draft.domain
        if settings.domain is not None:
            domain = settings.domain
        elif settings.domain_key is not None:
            value = required(row, settings.domain_key, "--domain-key")
            domain = plain_value(value, "domain", "--domain-key") or ""
        renamed = dict(settings.domain_map)
        if domain in renamed:
            self._tally.mapped_domains.add(domain)
        return renamed.get(domain, domain)

    def _reference(self, reference: Reference) -> Reference:
        if reference.left_out:
            self._tally.answers_left_out[reference.left_out] += 1
        if self._settings.grader != "auto" and reference.answer is not None:
            reference = replace(reference, grader=self._settings.grader)
        check_reference(reference)
        return reference

    def _stripped(self, text: str) -> str:
        stripped, found = strip(text, self._settings.strip_prefix, self._settings.strip_suffix)
        self._tally.stripped.update(found)
        return stripped

    def _prompt(self, draft: Draft) -> str | tuple[Message, ...]:
        """Return the prompt in the form of all prompts; the first row decides it where no flag does."""
        if self._form == "auto":
            self._form = "text" if draft.is_text else "messages"
        elif self._settings.prompt_form == "auto" and self._layout.name == "rows":
            form = "text" if draft.is_text else "messages"
            if form != self._form:
                raise Fault(f"a prompt that is {form}", f"{self._form}, like the first row's", "--prompt-form")
        suffix = self._settings.prompt_suffix
        messages = draft.messages
        if suffix is not None:
            messages = last_user_changed(messages, lambda text: f"{text}\n{suffix}")
        if self._form == "messages":
            return messages
        if len(messages) > 1:
            roles = ", ".join(message["role"] for message in messages)
            raise Fault(f"messages by {roles}", "one message by the user, which a text can hold", "--prompt-form")
        return messages[0]["content"]

    def _settle(self, candidates: Sequence[Candidate]) -> None:
        """Keep or leave out candidates by their lengths, by the benchmarks, and by the candidates before them."""
        if not candidates:
            return
        if self.spool is None:
            self._measure.check_form(self._form)
        rows = [replace(c.row, value={"prompt": _written(c.prompt), "response": c.draft.response}) for c in candidates]
        for candidate, sizes in zip(candidates, self._measure.sizes(rows), strict=True):
            uid = uid_of(candidate.key)
            if isinstance(sizes, Fault):
                self._fault(candidate.row, candidate.place, sizes, uid)
            elif not self._repeated(candidate):
                try:
                    self._check(candidate, sizes)
                except LeftOut as left:
                    self._tally.leave_out(left.reason, candidate.place, uid, left.detail)
                else:
                    self._keep(candidate, sizes)

    def _check(self, candidate: Candidate, sizes: Sizes) -> None:
        """Raise LeftOut if the row is too long, or holds a question of a benchmark."""
        settings, unit = self._settings, self._measure.unit
        if settings.max_prompt_length is not None and sizes.prompt > settings.max_prompt_length:
            raise LeftOut("long_prompt", f"{sizes.prompt} {unit}")
        long_responses_go = settings.max_response_length is not None and settings.on_long_response != "keep"
        if long_responses_go and (sizes.response or 0) > (settings.max_response_length or 0):
            raise LeftOut("long_response", f"{sizes.response} {unit}")
        collision = self._benchmarks.collision(candidate.draft.messages)
        if collision is not None:
            question = self._benchmarks.questions[collision.number]
            self._tally.collide(collision.number, uid_of(candidate.key))
            raise LeftOut("contaminated", f"{question.place}: {show(collision.words, 200)}")

    def _keep(self, candidate: Candidate, sizes: Sizes) -> None:
        self.repeats.keep(candidate.key)
        draft = candidate.draft
        record: Record = {
            "prompt": _written(candidate.prompt), "response": draft.response, "answer": draft.reference.answer,
            "grader": draft.reference.grader, "domain": draft.domain,
            "uid": self._uid(candidate.key), "source_uid": draft.uid,
            "row": candidate.place, "prompt_length": sizes.prompt, "response_length": sizes.response,
        }  # fmt: skip
        if self.spool is None:
            self.spool = Spool(self._spool_path, schema_of(self._form, self._settings.responses))
        self.spool.write(record)

    def _uid(self, key: int) -> str:
        """Return the uid of a row that is kept: that of its prompt, with a number after the first copy."""
        if self._settings.duplicates == "drop":
            return uid_of(key)
        self._copies[key] += 1
        return f"{uid_of(key)}-{self._copies[key]}" if self._copies[key] > 1 else uid_of(key)

    def _fault(self, row: Row, place: str, fault: Fault, uid: str | None = None) -> None:
        ours = _OUR_FLAGS | (_FLAGS_OF_ROWS if self._layout.name == "rows" else set())
        flag = fault.flag if fault.flag in ours else ""
        bad = BadRow(path=row.path, line=row.line, found=fault.found, expected=fault.expected, flag=flag)
        self._bad(bad, place, uid)

    def _bad(self, row: BadRow, place: str, uid: str | None = None) -> None:
        self._tally.bad(row)
        self._tally.leave_out("bad_row", place, uid, f"{row.found}; expected {row.expected}")


def _written(prompt: str | tuple[Message, ...]) -> object:
    return prompt if isinstance(prompt, str) else list(prompt)


def _as_text(value: object) -> str:
    """Return a value as --where writes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)

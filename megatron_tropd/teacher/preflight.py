"""Checks, from files alone, that student and teacher use the same token ids.

The teacher scores the student's token IDS.  If an id stands for another piece on the teacher's side,
every score is wrong and nothing crashes; so this check runs before any model is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tropd.data.tokenizer import eos_token_ids, load_tokenizer
from megatron_tropd.json_files import shown
from megatron_tropd.models.hf_config import load_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STUDENT_FLAG = "--hf-checkpoint"
_SHOWN = 5


class PreflightError(ValueError):
    """Student and teacher cannot be trained together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialId:
    """One special token on both sides; None where a side has none."""

    name: str
    student: int | None
    teacher: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReport:
    """Tokens that both sides share.  It exists only if the check succeeded."""

    num_tokens: int
    """Ids the tokenizers define, the same pieces on both sides."""
    student_vocab_size: int
    teacher_vocab_size: int
    """Rows of the embeddings, padding rows included."""
    common_vocab_size: int
    """The smaller of both: ids from here on must never be sampled, scored or be in a top-k."""
    special_ids: tuple[SpecialId, ...]
    student_stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end a rollout: the student's, then those that only the teacher has."""
        return tuple(dict.fromkeys(self.student_stop_ids + self.teacher_stop_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    flag: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    pieces: Mapping[int, str]
    vocab_size: int
    stop_ids: tuple[int, ...]


def _load(flag: str, directory: str | Path) -> _Side:
    path = Path(directory)
    try:
        rows = load_hf_config(path).get("vocab_size")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(f"{path}/config.json has vocab_size {shown(rows)}; expected a positive integer")
        tokenizer = load_tokenizer(path)
        stop_ids = eos_token_ids(path, tokenizer)
    except (OSError, ValueError) as error:
        raise PreflightError(f"{flag} {path}: {error}") from error
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    return _Side(flag=flag, directory=path, tokenizer=tokenizer, pieces=pieces, vocab_size=rows, stop_ids=stop_ids)


def _show(side: _Side, index: int) -> str:
    return ascii(side.pieces[index]) if index in side.pieces else "(no piece)"


def _piece_errors(student: _Side, teacher: _Side) -> list[str]:
    if student.pieces == teacher.pieces:
        return []
    ids = student.pieces.keys() | teacher.pieces.keys()
    differing = sorted(index for index in ids if student.pieces.get(index) != teacher.pieces.get(index))
    lines = [
        f"  id {index}: student {_show(student, index)}, teacher {_show(teacher, index)}"
        for index in differing[:_SHOWN]
    ]
    if len(differing) > _SHOWN:
        lines.append(f"  ... and {len(differing) - _SHOWN} more")
    return [
        f"{len(differing)} of {len(ids)} token ids mean different pieces "
        f"(student has {len(student.pieces)} tokens, teacher {len(teacher.pieces)}):\n" + "\n".join(lines)
    ]


def _row_errors(side: _Side) -> list[str]:
    last = max(side.pieces, default=-1)
    beyond = [index for index in side.stop_ids if not 0 <= index < side.vocab_size]
    errors = []
    if last >= side.vocab_size:
        errors.append(
            f"the tokenizer of {side.flag} goes up to id {last} ({_show(side, last)}), but its config.json has "
            f"vocab_size {side.vocab_size}: the last tokens have no embedding row"
        )
    if beyond:
        errors.append(f"stop token ids {beyond} of {side.flag} are outside its vocab_size {side.vocab_size}")
    return errors


def _special_ids(student: _Side, teacher: _Side) -> tuple[SpecialId, ...]:
    return tuple(
        SpecialId(
            name=name,
            student=getattr(student.tokenizer, f"{name}_token_id"),
            teacher=getattr(teacher.tokenizer, f"{name}_token_id"),
        )
        for name in ("bos", "eos", "pad")
    )


def _warnings(student: _Side, teacher: _Side, special_ids: tuple[SpecialId, ...]) -> tuple[str, ...]:
    warnings = [
        f"{special.name} token differs: student {special.student}, teacher {special.teacher}"
        for special in special_ids
        if special.student != special.teacher
    ]
    if set(student.stop_ids) != set(teacher.stop_ids):
        warnings.append(
            f"stop tokens differ: student {_named(student)}, teacher {_named(teacher)}; rollouts stop on any of "
            "them, but a teacher that never writes the student's stop token scores every ending as an outlier: "
            "watch the response length"
        )
    if student.tokenizer.chat_template != teacher.tokenizer.chat_template:
        warnings.append(
            "chat templates differ: prompts are rendered with the student's, so the teacher may read prompts in a "
            "form it was not trained on"
        )
    return tuple(warnings)


def _named(side: _Side) -> str:
    return ", ".join(f"{index} {_show(side, index)}" for index in side.stop_ids)


def student_tokens(student_dir: str | Path) -> TokenizerReport:
    """The report of a run without a teacher: the student alone, its stop tokens and its rows.

    Raises:
        PreflightError: the tokenizer does not fit the embedding rows.
    """
    student = _load(STUDENT_FLAG, student_dir)
    if errors := _row_errors(student):
        raise PreflightError("; ".join(errors))
    return _report(student, student)


def check_same_tokens(student_dir: str | Path, teacher_dir: str | Path, who: str = "teacher") -> TokenizerReport:
    """Compare tokenizers, special ids, embedding rows and stop tokens of two local HF directories.

    Equal are required: the piece of every id.  May differ, and then is a warning: bos, eos and pad, stop
    tokens, the chat template.  May differ silently: ``vocab_size``, as long as both cover every id of the
    tokenizer (the rest are padding rows).  ``who`` is the name of the second model in messages.

    Raises:
        PreflightError: all differences in one message, with the flags to change.
    """
    teacher_flag = f"--{who}-hf-checkpoint"
    student, teacher = _load(STUDENT_FLAG, student_dir), _load(teacher_flag, teacher_dir)
    errors = [*_piece_errors(student, teacher), *_row_errors(student), *_row_errors(teacher)]
    common = min(student.vocab_size, teacher.vocab_size)
    if not errors and (beyond := sorted(i for i in (*student.stop_ids, *teacher.stop_ids) if i >= common)):
        errors.append(f"stop token ids {beyond} are outside the {common} rows that both models have")
    if errors:
        raise PreflightError(
            f"{STUDENT_FLAG} {student.directory} and {teacher_flag} {teacher.directory} do not have the same "
            f"tokens; choose a {who} with the student's tokenizer:\n" + "\n".join(errors)
        )
    return _report(student, teacher)


def join_reports(reports: Sequence[TokenizerReport]) -> TokenizerReport:
    """Return the report of one student with several teachers from those with each, of which there is at least one: the
    ids that all share, and the stop ids of any."""
    return replace(
        reports[0],
        common_vocab_size=min(report.common_vocab_size for report in reports),
        teacher_stop_ids=tuple(dict.fromkeys(stop for report in reports for stop in report.teacher_stop_ids)),
        warnings=tuple(dict.fromkeys(warning for report in reports for warning in report.warnings)),
    )


def _report(student: _Side, teacher: _Side) -> TokenizerReport:
    special_ids = _special_ids(student, teacher)
    return TokenizerReport(
        num_tokens=len(student.pieces),
        student_vocab_size=student.vocab_size,
        teacher_vocab_size=teacher.vocab_size,
        common_vocab_size=min(student.vocab_size, teacher.vocab_size),
        special_ids=special_ids,
        student_stop_ids=student.stop_ids,
        teacher_stop_ids=teacher.stop_ids,
        warnings=_warnings(student, teacher, special_ids),
    )

"""One run, from settings to report.

The first pass reads every row once and keeps the good ones in a spool beside the output; the second writes those that
are chosen.  In memory are the prompts that were seen, as hashes, and the rows that are tokenized at one time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.prompt_preparation import report
from tools.prompt_preparation.benchmarks import read_benchmarks
from tools.prompt_preparation.first_pass import FirstPass
from tools.prompt_preparation.layouts.choose import choose_layout
from tools.prompt_preparation.lengths import load_measure
from tools.prompt_preparation.selection import CODES, KEPT, select
from tools.prompt_preparation.settings import Settings
from tools.prompt_preparation.sources import find_files
from tools.prompt_preparation.tally import Tally
from tools.prompt_preparation.writing import (
    CARD,
    DROPPED,
    REPORT,
    Record,
    Spool,
    check_free,
    publish,
    staging,
    write_rows,
    write_text,
)


class NothingLeft(Exception):
    """No row is left to be written; the message is the table."""


def prepare(
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Tally, dict[str, Any]]:
    """Prepare the data that ``settings`` name; returns the counts and the report.

    Args:
        settings: the flags.
        say: called with a line of what was found out.
        progress: called with the number of rows read.

    Raises:
        UsageError: the settings and the files do not fit together.
        PromptError: rows or files cannot be used.
        NothingLeft: every row was left out.
        OSError: the output cannot be written; nothing is left of it.
    """
    check_free(settings)
    files = [file for given in settings.prompt_data for file in find_files(given, "--prompt-data")]
    layout = choose_layout(settings, files)
    if settings.format == "auto":
        say(f"--format {layout.name}, by the columns of the files")
    measure = load_measure(settings.tokenizer)
    benchmarks, benchmark_files = read_benchmarks(settings)
    with staging(settings) as directory, contextlib.ExitStack() as stack:
        out = directory / "out"
        dropped = None
        if settings.write_dropped:
            dropped = stack.enter_context((out / DROPPED).open("w", encoding="utf-8", newline="\n"))
        tally = Tally(dropped)
        first = FirstPass(
            settings=settings, layout=layout, measure=measure, benchmarks=benchmarks, tally=tally,
            spool_path=directory / "spool.parquet", say=progress,
        )  # fmt: skip
        first.read(files)
        if first.spool is not None:
            _write(first.spool, first.repeats.conflicts, settings, tally, out)
        content = report.document(settings, layout.name, measure.unit, tally, benchmarks, files, benchmark_files)
        if not tally.written:
            raise NothingLeft(report.table(tally, content))
        write_text(out / REPORT, report.as_json(content))
        if not settings.is_file:
            write_text(out / CARD, report.CARD)
        stack.close()
        publish(directory, settings)
    return tally, content


def _write(spool: Spool, conflicts: set[int], settings: Settings, tally: Tally, out: Path) -> None:
    """Write the chosen rows of the spool."""
    codes, tally.available = select(spool, conflicts, settings)
    write_rows(out, settings, spool.schema, _chosen(spool, codes, tally), int(np.count_nonzero(codes == KEPT)))


def _chosen(spool: Spool, codes: np.ndarray, tally: Tally) -> Iterator[Record]:
    """Yield the rows that are written, and leave out the others."""
    number = 0
    for batch in spool.batches():
        for record in batch.to_pylist():
            code = int(codes[number])
            number += 1
            if code == KEPT:
                answered = record["answer"] is not None
                lengths = record["prompt_length"], record["response_length"]
                tally.write(record["domain"], record["grader"], answered, *lengths)
                yield record
            else:
                tally.leave_out(CODES[code], record["row"], record["uid"], record["domain"])

"""Evaluate a Hugging Face checkpoint: ``python -m megatron_tropd.evaluate --hf-checkpoint DIR --eval-data FILE``.

Runs in one process on the embedded engine.  An error that the user can fix gives a message and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from megatron_tropd.atomic_files import writing
from megatron_tropd.config import EvaluationConfig
from megatron_tropd.data.prompts import PromptFormat, load_prompts
from megatron_tropd.data.tokenizer import eos_token_ids, load_tokenizer
from megatron_tropd.errors import EngineError
from megatron_tropd.evaluation import DECODINGS, check_prompts, evaluate
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.grading.grader import Grader, make_grader
from megatron_tropd.grading.workers import GradingError
from megatron_tropd.hub import MODEL_CONFIG_FILES, MODEL_FILES, resolve
from megatron_tropd.reports import Accuracy, EvalReport
from megatron_tropd.rollout.embedded.load import DTYPES, check_device, load_engine
from megatron_tropd.standard_streams import open_closed, print_result, tell
from megatron_tropd.types import GraderKind


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser of this command."""
    flags = FlagParser(
        prog="python -m megatron_tropd.evaluate", description="Accuracy of a Hugging Face checkpoint on prompts."
    )
    flags.add_argument(
        "--hf-checkpoint", required=True, help="directory with config, tokenizer, weights; or a name of the Hub"
    )
    flags.add_argument("--eval-data", required=True, nargs="+", help="prompts and answers; docs/data.md")
    flags.add_argument("--prompt-key", default="prompt")
    flags.add_argument("--answer-key", default="answer")
    flags.add_argument("--grader-key", default="grader", help="column that names the grader of a row; optional")
    flags.add_argument("--domain-key", default="domain", help="column of the domain; optional")
    flags.add_argument("--apply-chat-template", action="store_true")
    flags.add_argument(
        "--answer-pattern",
        default=EvaluationConfig().answer_pattern,
        help="regular expression; group 1 of its last match is the answer (default: the last \\boxed{...})",
    )
    flags.add_argument(
        "--grader", choices=get_args(GraderKind), default=EvaluationConfig().grader,
        help="how rows are graded that name no grader; docs/grading.md (default: %(default)s)",
    )  # fmt: skip
    flags.add_argument(
        "--lenient-grading", action="store_true", help="of choices and constraints; docs/grading.md says what it allows"
    )
    flags.add_argument("--max-prompt-length", type=int, default=2048, help="tokens; a longer prompt is an error")
    flags.add_argument("--max-response-length", type=int, default=1024, help="tokens; a longer response is wrong")
    flags.add_argument("--decodings", nargs="+", choices=list(DECODINGS), default=list(DECODINGS))
    flags.add_argument("--num-samples", type=int, default=1, help="responses per prompt where tokens are drawn")
    flags.add_argument("--num-prompts", type=int, help="only the first N prompts")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--teacher-hf-checkpoint", help="stop on this model's stop tokens too, as training")
    flags.add_argument("--max-batch-size", type=int, default=256, help="sequences decoded at once")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, the checkpoint's elsewhere")
    flags.add_argument("--output", type=Path, help="write the reports here as JSON")
    return flags


def _checked(args: argparse.Namespace) -> Grader:
    """Check the flags themselves, and return the grader that they ask for.

    Raises:
        ValueError: the message says everything that is wrong with the flags.
    """
    problems = [
        f"--{name} {value}: expected at least 1"
        for name in ("max-prompt-length", "max-response-length", "num-samples", "num-prompts", "max-batch-size")
        if (value := getattr(args, name.replace("-", "_"))) is not None and value < 1
    ]
    if args.output is not None and not args.output.parent.is_dir():
        problems.append(f"--output {args.output}: {args.output.parent} is not a directory")
    try:
        check_device(args.device)
    except ValueError as error:
        problems.append(str(error))
    try:
        grader = make_grader(args.grader, args.answer_pattern, lenient=args.lenient_grading)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return grader


def _find(name: str, flag: str, patterns: Sequence[str]) -> Path:
    """Return the directory of a model, and say which commit it is if it is one of the Hub."""
    model = resolve(name, repo_type="model", allow_patterns=patterns, flag=flag)
    if model.source:
        tell(f"{flag} {model.source}")
    return model.path


def run(args: argparse.Namespace) -> list[EvalReport]:
    """Load the checkpoint, answer the prompts and return one report per decoding.

    Raises:
        OSError, ValueError, EngineError, GradingError: a flag or a file cannot be used, or engine or grader failed.
    """
    grader = _checked(args)
    fmt = PromptFormat(
        prompt_key=args.prompt_key,
        response_key="",  # responses in the file are not used, so they are not checked
        answer_key=args.answer_key,
        grader_key=args.grader_key,
        domain_key=args.domain_key,
        chat_template=args.apply_chat_template,
        max_prompt_length=args.max_prompt_length,
        max_response_length=args.max_response_length,
    )
    directory = _find(args.hf_checkpoint, "--hf-checkpoint", MODEL_FILES)
    teacher = args.teacher_hf_checkpoint
    teacher = _find(teacher, "--teacher-hf-checkpoint", MODEL_CONFIG_FILES) if teacher else None
    tokenizer = load_tokenizer(directory)
    prompts = load_prompts(args.eval_data, tokenizer, fmt, flag="--eval-data")[: args.num_prompts]
    check_prompts(prompts, grader)
    stop_ids = itertools.chain.from_iterable(eos_token_ids(path) for path in (directory, teacher) if path)
    engine = load_engine(
        directory, stop_token_ids=set(stop_ids), device=args.device, dtype=args.dtype,
        max_batch_size=args.max_batch_size,
    )  # fmt: skip
    return evaluate(
        engine.generate,
        prompts,
        tokenizer,
        [DECODINGS[name] for name in args.decodings],
        grader=grader,
        max_response_length=args.max_response_length,
        seed=args.seed,
        step=0,
        num_samples=args.num_samples,
    )


def _numbers(measured: EvalReport | Accuracy) -> str:
    return f"{measured.accuracy:>10.2%}{measured.std_error:>8.2%}{measured.num_prompts:>9}"


def table(reports: Sequence[EvalReport]) -> str:
    """Return the reports as a text table; below each its domains, and +- is one standard error over prompts."""
    head = f"{'accuracy':>10}{'+-':>8}{'prompts':>9}"
    lines = [f"{'decoding':<16}{head}{'samples':>9}{'finished':>10}{'mean length':>13}"]
    for report in reports:
        lines.append(
            f"{report.decoding:<16}{_numbers(report)}{report.num_samples:>9}{report.finished:>10.2%}"
            f"{report.mean_response_len:>13.1f}"
        )
        lines += [f"  {domain:<14}{_numbers(accuracy)}" for domain, accuracy in report.domains.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    open_closed()
    args = parser().parse_args(argv)
    try:
        reports = run(args)
        document = json.dumps([dataclasses.asdict(report) for report in reports], indent=2)
        if args.output is not None:  # first: standard output may have lost its reader
            with writing(args.output):
                args.output.write_text(document + "\n", encoding="utf-8")
        print_result(f"{table(reports)}\n{document}")
    except (OSError, ValueError, EngineError, GradingError) as error:
        tell(f"error: {error}")
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())

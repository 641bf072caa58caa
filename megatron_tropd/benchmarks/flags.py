"""The flags of the command, and what they say, checked."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tropd.benchmarks.paper_results import PAPER
from megatron_tropd.benchmarks.protocol import BENCHMARKS, CHOICE_TEMPLATE, MATH_TEMPLATE, PROFILES, Protocol
from megatron_tropd.cli import sglang_errors
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.sglang.server_flags import BENCHMARK_FLAGS

_DEFAULTS = Protocol()


def parser() -> argparse.ArgumentParser:
    """Return the parser of a run; ``--sglang-X`` flags are left over."""
    flags = FlagParser(
        prog="python -m megatron_tropd.benchmark", description=(
            "Run the paper's benchmarks on a model.  Also: `compare DIR_A DIR_B` and `table DIR...` of finished runs "
            "(each has a --help)."
        ),
    )  # fmt: skip
    _add_model(flags.add_argument_group("model (one of the first three, or servers that run)"))
    _add_benchmarks(flags.add_argument_group("benchmarks"))
    _add_protocol(flags.add_argument_group("protocol"))
    _add_servers(flags.add_argument_group("servers"))
    return flags


def _add_model(group: Any) -> None:
    group.add_argument("--hf-checkpoint", metavar="DIR|NAME", help="HF directory, or a name of the Hub")
    group.add_argument("--load", type=Path, metavar="DIR", help="Megatron checkpoints; converted to HF first")
    group.add_argument("--iteration", metavar="N", help="of --load: a number or 'release' (default: the latest)")
    group.add_argument(
        "--save-hf",
        type=Path,
        metavar="DIR",
        help="of --load: keep the converted model here (default: removed at the end)",
    )
    group.add_argument("--run-dir", type=Path, metavar="RUN", help="a training run; its hf_export is evaluated")
    group.add_argument("--model-name", help="for tables (default: from the model's path)")


def _add_benchmarks(group: Any) -> None:
    group.add_argument("--benchmarks", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME",
                       help=f"(default: all of {' '.join(BENCHMARKS)})")  # fmt: skip
    group.add_argument("--data-dir", type=Path, required=True, help="local copies, DATA_DIR/NAME/; docs/benchmarks.md")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="results; a killed run goes on there")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each benchmark")
    group.add_argument("--paper-setting", nargs="*", choices=list(PAPER), default=[],
                       help="print the paper's rows for these models too")  # fmt: skip


def _add_protocol(group: Any) -> None:
    group.add_argument("--sampling-profile", choices=list(PROFILES), default="paper", help=(
        "paper: T 1.0, top-p 0.7; r1-card: 0.6, 0.95; qwen3: 0.6, 0.95, top-k 20 (default: %(default)s)"))  # fmt: skip
    group.add_argument("--temperature", type=float, help="(default: the profile's)")
    group.add_argument("--top-p", type=float, help="(default: the profile's)")
    group.add_argument("--top-k", type=int, help="-1: all tokens (default: the profile's)")
    group.add_argument(
        "--max-tokens", type=int, default=_DEFAULTS.sampling.max_tokens, help="of a response (%(default)s)"
    )
    group.add_argument("--samples", nargs="+", default=[], metavar="NAME=N",
                       help="responses to a question (default: math 32, gpqa_diamond 4, others 1)")  # fmt: skip
    group.add_argument("--truncated", choices=["wrong", "graded"], default=_DEFAULTS.truncated,
                       help="what a response is that --max-tokens cut off (default: %(default)s)")  # fmt: skip
    group.add_argument("--math-template", default=MATH_TEMPLATE, help="with {question}")
    group.add_argument("--choice-template", default=CHOICE_TEMPLATE, help="with {question}, {choices}, {letters}")
    group.add_argument("--choice-seed", type=int, default=_DEFAULTS.choice_seed, help="of the order of GPQA's options")
    group.add_argument("--mmlu-redux-rows", choices=["ok", "all"], default=_DEFAULTS.mmlu_redux_rows,
                       help="those with error_type ok, or all with corrected answers (%(default)s)")  # fmt: skip
    group.add_argument("--code-timeout", type=float, default=_DEFAULTS.code_timeout_s, metavar="S",
                       help="CPU seconds of one test of a generated program (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--code-memory", type=int, default=_DEFAULTS.code_memory_mib, metavar="MIB", help="(%(default)s)"
    )
    group.add_argument("--chat-template-arguments", default="{}", metavar="JSON",
                       help="""for the model's chat template, as '{"enable_thinking": false}'""")  # fmt: skip


def _add_servers(group: Any) -> None:
    group.add_argument("--num-servers", type=int, default=1, help="SGLang servers to start (default: %(default)s)")
    group.add_argument("--server-urls", nargs="+", default=[], metavar="URL", help="servers that run already, instead")
    group.add_argument("--served-model", help="what they call the model (default: what they say)")
    group.add_argument("--sglang-python", type=Path, help="interpreter of SGLang's environment (default: this one)")
    group.add_argument("--sglang-host", default="127.0.0.1")
    group.add_argument("--sglang-key-file", type=Path, help="docs/sglang.md")
    group.add_argument("--sglang-tp-size", type=int, default=1, help="GPUs of one server")
    group.add_argument("--sglang-start-timeout", type=float, default=600.0, metavar="S")
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 on a GPU, float32 elsewhere)"
    )
    group.add_argument("--evalscope-python", type=Path, default=Path(".venv-benchmark/bin/python"),
                       help="interpreter of evalscope's environment (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--concurrency", type=int, default=64, help="requests in flight at one server (default: %(default)s)"
    )
    group.add_argument("--response-timeout", type=float, default=7200.0, metavar="S",
                       help="of one response; then its server counts as dead (default: %(default)s)")  # fmt: skip
    group.add_argument("--code-at-once", type=int, default=os.cpu_count() or 1,
                       help="generated programs that run at one time (default: the cores)")  # fmt: skip


def split_server_flags(rest: Sequence[str]) -> tuple[str, ...]:
    """Return ``--sglang-X VALUE...`` as ``--X VALUE...`` for SGLang.

    Raises:
        ValueError: a flag that is neither ours nor SGLang's, or looks like a misspelled one of ours.
    """
    prefix, ours = BENCHMARK_FLAGS.prefix, [word for action in parser()._actions for word in action.option_strings]
    words: list[str] = []
    for word in rest:
        flag = word.partition("=")[0]
        if word.startswith(prefix):
            if errors := sglang_errors({flag.removeprefix("--"): ()}, [own.removeprefix("--") for own in ours]):
                raise ValueError(errors[0])
        elif word.startswith("--"):
            close = difflib.get_close_matches(flag, ours, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see --help ({prefix}X is SGLang's --X)"
            raise ValueError(f"{flag}: there is no such flag; {hint}")
        if not words and not word.startswith("--"):
            raise ValueError(f"{word}: expected a flag; see --help")
        words.append(f"--{word.removeprefix(prefix)}" if word.startswith("--") else word)
    return tuple(words)


def protocol_of(args: argparse.Namespace) -> Protocol:
    """Return the protocol that the flags ask for.

    Raises:
        ValueError: the message says everything that is wrong with them.
    """
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    sampling = replace(
        PROFILES[args.sampling_profile], max_tokens=args.max_tokens, **{k: v for k, v in given.items() if v is not None}
    )
    problems = [
        f"--{name.replace('_', '-')} {value}: expected {expected}"
        for name, value, good, expected in (
            ("temperature", sampling.temperature, sampling.temperature >= 0, "a number from 0 on"),
            ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", sampling.top_k, sampling.top_k == -1 or sampling.top_k > 0, "-1 or a number above 0"),
            *(
                (name, getattr(args, name), getattr(args, name) is None or getattr(args, name) > 0, "a number above 0")
                for name in ("max_tokens", "limit", "code_timeout", "num_servers", "concurrency", "response_timeout",
                             "code_at_once")
            ),
            ("code_memory", args.code_memory, args.code_memory >= 64, "at least 64 MiB"),
            ("math_template", args.math_template, "{question}" in args.math_template, "a text with {question}"),
            (
                "choice_template", args.choice_template,
                all(name in args.choice_template for name in ("{question}", "{choices}")),
                "a text with {question} and {choices}",
            ),
        )
        if not good
    ]  # fmt: skip
    samples, wrong = _samples(args.samples)
    problems += wrong
    try:
        arguments = json.loads(args.chat_template_arguments)
        if not isinstance(arguments, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        problems.append(f"--chat-template-arguments {args.chat_template_arguments}: expected a JSON object: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return Protocol(
        sampling=sampling, samples=samples, limit=args.limit, truncated=args.truncated,
        math_template=args.math_template, choice_template=args.choice_template, choice_seed=args.choice_seed,
        mmlu_redux_rows=args.mmlu_redux_rows,
        code_timeout_s=args.code_timeout, code_memory_mib=args.code_memory, chat_template_arguments=arguments,
    )  # fmt: skip


def _samples(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return samples by benchmark, and what is wrong with the words."""
    samples, problems = dict(_DEFAULTS.samples), []
    for word in words:
        name, _, number = word.partition("=")
        if name in BENCHMARKS and number.isdecimal() and int(number) > 0:
            samples[name] = int(number)
        else:
            problems.append(f"--samples {word}: expected NAME=N with a benchmark and a number above 0")
    return samples, problems

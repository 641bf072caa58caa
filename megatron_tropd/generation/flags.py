"""The flags of the command: what they are called, and their values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_tropd.cli import Passed, split_flags
from megatron_tropd.config import DataConfig, EvaluationConfig
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.generation.rows import Keep
from megatron_tropd.types import GraderKind


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFlags:
    """The value of every flag, under its name."""

    prompt_data: list[str]
    prompt_key: str
    answer_key: str
    grader_key: str
    domain_key: str
    uid_key: str
    tools_key: str
    apply_chat_template: bool
    on_bad_row: Literal["error", "skip"]
    max_prompt_length: int
    save: Path
    n_samples_per_prompt: int
    max_response_length: int
    temperature: float
    top_p: float
    stop_token_ids: list[int]
    seed: int
    keep: Keep
    grader: GraderKind
    answer_pattern: str
    lenient_grading: bool
    responses_per_shard: int
    hf_checkpoint: str
    engine: Literal["sglang", "embedded"]
    num_servers: int
    server_urls: list[str]
    router_url: str
    gpu_ids: list[int]
    sglang_python: Path
    sglang_host: str
    sglang_key_file: Path | None
    sglang_tp_size: int
    sglang_start_timeout: float
    sglang_request_timeout: float
    max_concurrent_prompts: int
    dtype: Literal["float32", "bfloat16"] | None
    device: str | None
    max_batch_size: int
    passed: Passed
    """Flags for the SGLang servers, by their names with the prefix."""


def parse_flags(argv: Sequence[str]) -> GenerationFlags:
    """Return the flags of a command line; argparse ends the program where there are others."""
    names = flag_names()
    passed, words = split_flags(argv, lambda name: name.startswith("sglang-") and name not in names)
    return GenerationFlags(**vars(parser().parse_args(words)), passed=passed)


def flag_names() -> set[str]:
    """Return the names of all flags, without dashes."""
    return {option.removeprefix("--") for action in parser()._actions for option in action.option_strings}


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser of the command."""
    flags = FlagParser(
        prog="python -m megatron_tropd.generate",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Responses of a Hugging Face model to prompts, as Parquet files for --prompt-data of a run.  Any "
        "other --sglang-X is passed to the SGLang servers as --X.",
    )  # fmt: skip
    _add_prompts(flags.add_argument_group("prompts"))
    _add_responses(flags.add_argument_group("responses"))
    _add_engines(flags.add_argument_group("who writes"))
    return flags


def _add_prompts(flags: argparse._ArgumentGroup) -> None:
    data = DataConfig()
    flags.add_argument("--prompt-data", required=True, nargs="+", metavar="FILE", help="prompts; docs/data.md")
    for key in ("prompt", "answer", "grader", "domain", "uid", "tools"):
        flags.add_argument(f"--{key}-key", default=getattr(data, f"{key}_key"), help=f"column of the {key}")
    flags.add_argument("--apply-chat-template", action="store_true", help="render prompts with the model's template")
    flags.add_argument(
        "--on-bad-row", choices=["error", "skip"], default=data.on_bad_row, help="of a row that cannot be used"
    )
    flags.add_argument(
        "--max-prompt-length", type=int, default=data.max_prompt_length, help="tokens; a longer prompt is a bad row"
    )


def _add_responses(flags: argparse._ArgumentGroup) -> None:
    data, evaluation = DataConfig(), EvaluationConfig()
    flags.add_argument("--save", type=Path, required=True, metavar="DIR", help="where the responses go")
    flags.add_argument("--n-samples-per-prompt", type=int, default=1, help="responses per prompt")
    flags.add_argument("--max-response-length", type=int, default=data.max_response_length, help="tokens")
    flags.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    flags.add_argument("--top-p", type=float, default=1.0, help="share of the probability that is drawn from")
    flags.add_argument(
        "--stop-token-ids", type=int, nargs="+", default=[], metavar="ID",
        help="ids that end a response, besides those of generation_config.json, config.json and the tokenizer",
    )  # fmt: skip
    flags.add_argument("--seed", type=int, default=1234, help="of the embedded engine; SGLang draws by its own")
    flags.add_argument(
        "--keep", choices=["all", "finished", "right"], default="finished",
        help="which responses go into DIR/data; the others go into DIR/dropped",
    )  # fmt: skip
    flags.add_argument(
        "--grader", choices=get_args(GraderKind), default=evaluation.grader,
        help="with --keep right, of rows that name no grader; docs/grading.md",
    )  # fmt: skip
    flags.add_argument("--lenient-grading", action="store_true", help="docs/grading.md")
    flags.add_argument(
        "--answer-pattern", default=evaluation.answer_pattern,
        help="regular expression; group 1 of its last match is the answer; empty: the last \\boxed{...}",
    )  # fmt: skip
    flags.add_argument("--responses-per-shard", type=int, default=1000, help="responses of one Parquet file")


def _add_engines(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument("--hf-checkpoint", required=True, help="directory of a model, or its name on the Hub")
    flags.add_argument(
        "--engine", choices=["sglang", "embedded"], default="sglang", help="servers, or transformers here"
    )
    flags.add_argument("--num-servers", type=int, default=1, help="SGLang servers to start here")
    flags.add_argument("--server-urls", nargs="+", default=[], metavar="URL", help="servers that run already instead")
    flags.add_argument("--router-url", default="", help="sglang-router before the servers of --server-urls")
    flags.add_argument("--gpu-ids", type=int, nargs="+", default=[], metavar="GPU", help="of these servers, in order")
    flags.add_argument("--sglang-python", type=Path, default=Path(sys.executable), help="of SGLang's environment")
    flags.add_argument("--sglang-host", default="127.0.0.1", help="any but a loopback address needs keys")
    flags.add_argument("--sglang-key-file", type=Path, help="YAML with api-key and admin-api-key")
    flags.add_argument("--sglang-tp-size", type=int, default=1, help="GPUs of each server")
    flags.add_argument("--sglang-start-timeout", type=float, default=240.0, help="seconds")
    flags.add_argument("--sglang-request-timeout", type=float, default=300.0, help="seconds without progress")
    flags.add_argument("--max-concurrent-prompts", type=int, default=128, help="at one server")
    flags.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of weights; float32 on a CPU, bfloat16 on a GPU"
    )
    flags.add_argument("--device", help="of the embedded engine; cuda where there is a GPU, else cpu")
    flags.add_argument("--max-batch-size", type=int, default=256, help="responses the embedded engine writes at once")

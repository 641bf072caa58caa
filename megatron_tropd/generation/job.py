"""A launch of the command: its flags checked, and what they name opened.  Nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_tropd.cli import ConfigError, sglang_errors
from megatron_tropd.data.encoding.encode import Encoder
from megatron_tropd.data.encoding.row_format import PromptFormat
from megatron_tropd.data.reading.sources import DataFile, find_source
from megatron_tropd.data.tokenizer import eos_token_ids, load_tokenizer
from megatron_tropd.generation.flags import GenerationFlags, flag_names, parser
from megatron_tropd.generation.prompts import SourcePrompt, Survey, iterate, survey
from megatron_tropd.generation.rows import RowMaker
from megatron_tropd.grading.grader import Grader, make_grader
from megatron_tropd.grading.references import check_references
from megatron_tropd.hub import MODEL_FILES, Resolved, resolve
from megatron_tropd.models.hf_config import ModelShape, load_hf_config
from megatron_tropd.rollout.embedded.load import check_device
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import GraderKind


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """What was checked and found before anything is written."""

    flags: GenerationFlags
    model: Resolved
    shape: ModelShape
    encoder: Encoder
    files: tuple[DataFile, ...]
    survey: Survey
    stop_token_ids: tuple[int, ...]
    params: SamplingParams
    maker: RowMaker
    device: str
    """Of the weights: ``cuda``, or ``cpu``; any of torch's for the embedded engine."""
    dtype: Literal["float32", "bfloat16"]
    """Of the weights."""

    @property
    def total(self) -> int:
        """Responses of the whole job."""
        return self.survey.num_prompts * self.flags.n_samples_per_prompt


def prepare(flags: GenerationFlags) -> GenerationJob:
    """Check the flags and read all prompts once; nothing is written.

    Raises:
        ConfigError: a flag or a file cannot be used.
    """
    params, grader = _checked(flags)
    try:
        model = resolve(flags.hf_checkpoint, repo_type="model", allow_patterns=MODEL_FILES, flag="--hf-checkpoint")
        if not model.path.is_dir():
            raise ValueError(f"--hf-checkpoint {flags.hf_checkpoint} is not a directory")
        shape = ModelShape.of_config(load_hf_config(model.path), f"--hf-checkpoint {flags.hf_checkpoint}")
        tokenizer = load_tokenizer(model.path)
        stop_ids = tuple(dict.fromkeys((*eos_token_ids(model.path, tokenizer), *flags.stop_token_ids)))
        if flags.apply_chat_template and not tokenizer.chat_template:
            raise ValueError(f"--apply-chat-template: the tokenizer in {model.path} has no chat template")
        encoder = Encoder(tokenizer=tokenizer, fmt=_format(flags), stop_ids=stop_ids)
        files = tuple(file for given in flags.prompt_data for file in find_source(given).files)
        found = survey(files, encoder)
        _check_fit(flags, found, shape, stop_ids)
        device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        if grader is not None:
            _check_references(files, encoder, grader.kind)
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)]) from error
    name = model.source or flags.hf_checkpoint
    maker = RowMaker(encoder=_reader(encoder), model=name, keep=flags.keep, grader=grader)
    return GenerationJob(
        flags=flags, model=model, shape=shape, encoder=encoder, files=files, survey=found,
        stop_token_ids=stop_ids, params=params, maker=maker, device=device,
        dtype=flags.dtype or ("float32" if device == "cpu" else "bfloat16"),
    )  # fmt: skip


def _checked(flags: GenerationFlags) -> tuple[SamplingParams, Grader | None]:
    """Check what needs no file, and return how tokens are drawn and what grades."""
    counts = (
        "n_samples_per_prompt", "max_response_length", "responses_per_shard", "num_servers", "max_concurrent_prompts",
        "max_batch_size",
    )  # fmt: skip
    problems = [
        f"--{name.replace('_', '-')} {getattr(flags, name)}: expected at least 1"
        for name in counts
        if getattr(flags, name) < 1
    ]
    problems += [*sglang_errors(flags.passed, flag_names()), *_unused(flags)]
    grader = None
    try:
        if flags.keep == "right":
            grader = make_grader(flags.grader, flags.answer_pattern, lenient=flags.lenient_grading)
    except ValueError as error:
        problems.append(str(error))
    params = SamplingParams(seed=flags.seed, step=0)
    try:
        params = dataclasses.replace(params, temperature=flags.temperature, top_p=flags.top_p)
    except ValueError as error:
        problems.append(f"--temperature {flags.temperature} --top-p {flags.top_p}: {error}")
    if flags.temperature == 0 and flags.n_samples_per_prompt > 1:
        problems.append(
            f"--n-samples-per-prompt {flags.n_samples_per_prompt}: with --temperature 0 all responses to a prompt "
            "would be the same; give 1, or a temperature above 0"
        )
    if problems:
        raise ConfigError(problems)
    return params, grader


_OF_STARTED = ("num_servers", "gpu_ids", "sglang_tp_size")
_OF_SERVERS = ("server_urls", "router_url", *_OF_STARTED)
_OF_EMBEDDED = ("device", "max_batch_size")


def _unused(flags: GenerationFlags) -> list[str]:
    """Return errors for flags that would have no effect."""
    defaults = parser()
    passed = [f"--{name}" for name in flags.passed]

    def given(names: Sequence[str]) -> list[str]:
        changed = [name for name in names if getattr(flags, name) != defaults.get_default(name)]
        return [f"--{name.replace('_', '-')}" for name in changed]

    if flags.engine == "embedded":
        reason, unused = "--engine embedded starts no servers", [*given(_OF_SERVERS), *passed]
    elif flags.server_urls:
        reason = "--server-urls are servers that run already"
        unused = [*given((*_OF_STARTED, *_OF_EMBEDDED)), *passed]
    else:
        reason, unused = "--engine sglang writes on servers", given(_OF_EMBEDDED)
    return [f"{reason}: leave out {', '.join(unused)}"] if unused else []


def _format(flags: GenerationFlags) -> PromptFormat:
    return PromptFormat(
        prompt_key=flags.prompt_key, response_key="", answer_key=flags.answer_key, grader_key=flags.grader_key,
        domain_key=flags.domain_key, uid_key=flags.uid_key, tools_key=flags.tools_key,
        chat_template=flags.apply_chat_template, max_prompt_length=flags.max_prompt_length,
        max_response_length=flags.max_response_length, on_bad_row=flags.on_bad_row,
    )  # fmt: skip


def _reader(encoder: Encoder) -> Encoder:
    """Return what reads the rows that are written, whose columns have the names of docs/data.md."""
    fmt = encoder.fmt
    named = PromptFormat(
        chat_template=fmt.chat_template, max_prompt_length=fmt.max_prompt_length,
        max_response_length=fmt.max_response_length,
    )  # fmt: skip
    return dataclasses.replace(encoder, fmt=named)


def _check_fit(flags: GenerationFlags, found: Survey, shape: ModelShape, stop_ids: tuple[int, ...]) -> None:
    if found.longest + flags.max_response_length > shape.max_positions:
        raise ValueError(
            f"the longest prompt has {found.longest} tokens, and with --max-response-length "
            f"{flags.max_response_length} it is longer than the model's {shape.max_positions} positions; lower one of "
            "them (--max-prompt-length says which prompts are bad rows)"
        )
    if wrong := [token for token in stop_ids if not 0 <= token < shape.vocab_size]:
        source = "--stop-token-ids" if wrong[0] in flags.stop_token_ids else f"a stop token of {flags.hf_checkpoint}:"
        raise ValueError(f"{source} {wrong[0]}: the model has ids from 0 to {shape.vocab_size - 1}")
    if flags.keep == "right" and found.without_answer == found.num_prompts:
        raise ValueError(f"--keep right: no row of --prompt-data has an answer (--answer-key {flags.answer_key})")


def _check_references(files: Sequence[DataFile], encoder: Encoder, default: GraderKind) -> None:
    prompts = (item for item in iterate(files, encoder) if isinstance(item, SourcePrompt))
    rows = ((prompt.random_uid, prompt.answer, prompt.grader) for prompt in prompts if prompt.answer is not None)
    if faults := check_references(rows, default):
        raise ValueError("\n".join(f"--prompt-data: {fault}" for fault in faults))

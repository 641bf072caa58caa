"""The embedded engine or the SGLang servers that the flags of the command describe."""

from __future__ import annotations

from megatron_tropd.cli import ConfigError
from megatron_tropd.generation.flags import GenerationFlags
from megatron_tropd.generation.job import GenerationJob
from megatron_tropd.generation.servers import WritingFleet, WritingJob
from megatron_tropd.generation.writers import EmbeddedWriter, ServerWriter, Writer
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.embedded.load import load_engine
from megatron_tropd.rollout.sglang.api.generation import TokenRules
from megatron_tropd.sglang.server_flags import WRITER_FLAGS
from megatron_tropd.sglang.settings import ServerSettings, load_keys


def make_writer(job: GenerationJob) -> Writer:
    """Load or start what writes.

    Raises:
        ConfigError: a flag or a file cannot be used.
        EngineError: no server can be used, or the weights are not those of the architecture.
    """
    try:
        if job.flags.engine == "embedded":
            return EmbeddedWriter(
                _embedded_engine(job), job.params, max_new_tokens=job.flags.max_response_length,
                batch_size=job.flags.max_batch_size,
            )  # fmt: skip
        fleet = WritingFleet(_settings(job), _writing_job(job), max_in_flight=job.flags.max_concurrent_prompts)
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)]) from error
    writer = ServerWriter(fleet)
    try:
        writer.start()
    except BaseException:
        writer.close()
        raise
    return writer


def server_flags(flags: GenerationFlags) -> tuple[str, ...]:
    """Return the arguments that are passed to the servers, as on their command line."""
    prefix = WRITER_FLAGS.prefix.removeprefix("--")
    passed = flags.passed.items()
    return tuple(word for name, words in passed for word in (f"--{name.removeprefix(prefix)}", *(words or ())))


def _embedded_engine(job: GenerationJob) -> EmbeddedEngine:
    return load_engine(
        job.model.path, stop_token_ids=job.stop_token_ids, device=job.device, dtype=job.dtype,
        max_batch_size=job.flags.max_batch_size,
    )  # fmt: skip


def _settings(job: GenerationJob) -> ServerSettings:
    flags = job.flags
    return ServerSettings(
        names=WRITER_FLAGS,
        hf_dir=job.model.path.absolute(),
        log_dir=flags.save.absolute() / "servers",
        dtype=job.dtype,
        python=flags.sglang_python.absolute(),
        num_servers=flags.num_servers,
        urls=tuple(flags.server_urls),
        router_url=flags.router_url,
        host=flags.sglang_host,
        keys=load_keys(file=flags.sglang_key_file),
        tp_size=flags.sglang_tp_size,
        gpu_ids=tuple(flags.gpu_ids),
        flags=server_flags(flags),
        cuda=job.device == "cuda",
        start_timeout_s=flags.sglang_start_timeout,
        request_timeout_s=flags.sglang_request_timeout,
    )


def _writing_job(job: GenerationJob) -> WritingJob:
    return WritingJob(
        model_type=job.shape.model_type,
        max_positions=job.shape.max_positions,
        longest_prompt=job.survey.longest,
        max_new_tokens=job.flags.max_response_length,
        rules=TokenRules(
            stop_token_ids=frozenset(job.stop_token_ids),
            vocab_size=job.shape.vocab_size,
            model_vocab_size=job.shape.vocab_size,
        ),
        params=job.params,
    )

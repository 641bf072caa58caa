"""Names of the flags that describe the servers of one use, for messages, and the server flags that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

API_KEY_VARIABLE = "TROPD_SGLANG_API_KEY"
ADMIN_KEY_VARIABLE = "TROPD_SGLANG_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """What servers are called in messages, and the flags that describe them."""

    what: str
    """One server, as in "engine 0"."""
    number: str
    urls: str
    router: str
    gpu_ids: str
    tp_size: str
    prefix: str
    """Of flags that are handed through to ``sglang.launch_server``."""
    refused: Mapping[str, str]
    """Server flags that may not be passed through, and what to do instead."""

    def refusal(self, word: str) -> str:
        """Return why ``word`` of a server's command line may not be there; "" where it may.

        SGLang's parser takes the beginning of a name for the whole: ``--api-k`` would be ``--api-key``.
        """
        name = word.partition("=")[0]
        if name in self.refused:
            return self.refused[name]
        for whole, reason in self.refused.items() if name.startswith("--") else ():
            if whole.startswith(name):
                return f"SGLang takes it for {whole}; {reason}"
        return ""


def _refused(*, tp_size: str, model: str, dp_size: str, gpu_ids: str, pp_size: str) -> dict[str, str]:
    return {
        "--api-key": f"set {API_KEY_VARIABLE} or the key file",
        "--admin-api-key": f"set {ADMIN_KEY_VARIABLE} or the key file",
        "--config": "give the flags themselves",
        "--host": "use --sglang-host",
        "--port": "free ports are chosen",
        "--model-path": model,
        "--model": model,
        "--tp-size": f"use {tp_size}",
        "--tensor-parallel-size": f"use {tp_size}",
        "--tp": f"use {tp_size}",
        "--pp-size": pp_size,
        "--pipeline-parallel-size": pp_size,
        "--dp-size": dp_size,
        "--data-parallel-size": dp_size,
        "--dtype": "it is the trainer's: --bf16 or fp32",
        "--device": "it is the trainer's",
        "--base-gpu-id": f"use {gpu_ids}",
        "--skip-tokenizer-init": "it is always set: only token ids travel",
        "--trust-remote-code": "code of a checkpoint is never run",
    }


ENGINE_FLAGS = ServerFlags(
    what="engine",
    number="--rollout-num-engines",
    urls="--rollout-engine-urls",
    router="--rollout-router-url",
    gpu_ids="--rollout-gpu-ids",
    tp_size="--sglang-tp-size",
    prefix="--sglang-",
    refused={
        **_refused(
            tp_size="--sglang-tp-size",
            model="it is the student's",
            dp_size="use --rollout-num-engines: every replica needs a weight version of its own",
            gpu_ids="--rollout-gpu-ids",
            pp_size="pipeline stages are not supported: weights are pushed to tensor-parallel ranks",
        ),
        "--quantization": "the trainer's weights are pushed as they are, and every value is verified",
        "--load-format": "weights come from the trainer",
        "--custom-weight-loader": "--update-weight-transport planned sets it",
        "--enable-deterministic-inference": "it gives all samples of one prompt the same random numbers",
    },
)

TEACHER_FLAGS = ServerFlags(
    what="teacher server",
    number="--teacher-num-servers",
    urls="--teacher-urls",
    router="--teacher-router-url",
    gpu_ids="--teacher-gpu-ids",
    tp_size="--teacher-sglang-tp-size",
    prefix="--teacher-sglang-",
    refused={
        **_refused(
            tp_size="--teacher-sglang-tp-size",
            model="it is --teacher-hf-checkpoint",
            dp_size="use --teacher-num-servers: requests are balanced over servers",
            gpu_ids="--teacher-gpu-ids",
            pp_size="pipeline stages are not supported: use --teacher-sglang-tp-size",
        ),
        "--load-format": "weights are those of --teacher-hf-checkpoint",
        "--custom-weight-loader": "weights are those of --teacher-hf-checkpoint",
    },
)

WRITER_FLAGS = ServerFlags(
    what="server",
    number="--num-servers",
    urls="--server-urls",
    router="--router-url",
    gpu_ids="--gpu-ids",
    tp_size="--sglang-tp-size",
    prefix="--sglang-",
    refused={
        **_refused(
            tp_size="--sglang-tp-size",
            model="it is --hf-checkpoint",
            dp_size="use --num-servers: prompts are balanced over servers",
            gpu_ids="--gpu-ids",
            pp_size="pipeline stages are not supported: use --sglang-tp-size",
        ),
        "--dtype": "use --dtype",
        "--device": "it is a GPU where there is one",
        "--load-format": "weights are those of --hf-checkpoint",
        "--custom-weight-loader": "weights are those of --hf-checkpoint",
    },
)
"""Of the command that writes responses (generate.py)."""

BENCHMARK_FLAGS = ServerFlags(
    what="benchmark server",
    number="--num-servers",
    urls="--server-urls",
    router="",
    gpu_ids="--num-servers",
    tp_size="--sglang-tp-size",
    prefix="--sglang-",
    refused={
        **_refused(
            tp_size="--sglang-tp-size",
            model="it is the model that is evaluated",
            dp_size="use --num-servers: requests are balanced over servers",
            gpu_ids="CUDA_VISIBLE_DEVICES",
            pp_size="pipeline stages are not supported: use --sglang-tp-size",
        ),
        "--dtype": "use --dtype",
        "--device": "it is a GPU where there is one",
        "--skip-tokenizer-init": "chat messages need the tokenizer",
        "--load-format": "weights are those of the model's files",
        "--custom-weight-loader": "weights are those of the model's files",
    },
)

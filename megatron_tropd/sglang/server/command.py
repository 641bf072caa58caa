"""The command line and environment of one server.  Pure: nothing is started here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_tropd.parallel.interfaces import loopback_variables, without_chosen
from megatron_tropd.sglang.settings import ServerSettings

LAUNCHER = Path(__file__).with_name("launch.py")
_SPARE_POSITIONS = 8
"""SGLang stops two positions before its context length; a few more let a sequence use all of the model's."""

# No compiled kernels without a GPU: plain torch attention and sampling.  --sleep-on-idle: an idle scheduler
# would keep a core busy.  --dtype is always given: `auto` serves an fp32 checkpoint as fp16.
_CPU_DEFAULTS: dict[str, str | None] = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    "--disable-overlap-schedule": None,
    "--sleep-on-idle": None,
    "--mem-fraction-static": "0.2",
    "--max-total-tokens": "16384",
    "--max-running-requests": "64",
}
# Not run: no GPU was at hand.  The fraction leaves room for a trainer on the same GPU.
_CUDA_DEFAULTS: dict[str, str | None] = {"--device": "cuda", "--mem-fraction-static": "0.5", "--sleep-on-idle": None}


_SEVERAL_MACHINES = frozenset({"--dist-init-addr", "--nccl-init-addr", "--nnodes", "--node-rank"})
"""With one of these SGLang's own processes are on several machines, and must reach each other."""


def _given(flags: tuple[str, ...]) -> set[str]:
    return {flag.partition("=")[0] for flag in flags if flag.startswith("--")}


def server_arguments(settings: ServerSettings, index: int, port: int, max_positions: int) -> list[str]:
    """Arguments of ``sglang.launch_server``; the user's own flags replace defaults of the same name."""
    given = _given(settings.flags)
    wanted: dict[str, str | None] = {
        "--model-path": str(settings.hf_dir),
        "--host": settings.host,
        "--port": str(port),
        "--dtype": settings.dtype,
        "--tp-size": str(settings.tp_size),
        **({} if settings.speaks_text else {"--skip-tokenizer-init": None}),
        "--skip-server-warmup": None,
        "--context-length": str(max_positions + _SPARE_POSITIONS),
        **settings.weight_arguments,
        **(_CUDA_DEFAULTS if settings.cuda else _CPU_DEFAULTS),
    }
    if settings.cuda and not settings.hides_gpus(index):
        wanted["--base-gpu-id"] = str(settings.gpus_of(index)[0])
    arguments = []
    for flag, value in wanted.items():
        if flag not in given:
            arguments += [flag] if value is None else [flag, value]
    return [*arguments, *settings.flags]


def server_command(settings: ServerSettings, index: int, port: int, max_positions: int) -> list[str]:
    """argv of the server process.  -P keeps the launcher's folder off the import path."""
    return [str(settings.python), "-P", str(LAUNCHER), *server_arguments(settings, index, port, max_positions)]


def server_environment(settings: ServerSettings, index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of server number ``index``: the caller's, without the trainer's variables."""
    hidden = ("TROPD_", "PYTHON", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "TORCHDYNAMO_")
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"}
    given = without_chosen(environ)
    kept = {k: v for k, v in given.items() if not k.startswith(hidden) and k not in names}
    kept |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if not settings.cuda:
        kept["SGLANG_USE_CPU_ENGINE"] = "1"
    elif settings.hides_gpus(index):  # else --base-gpu-id names them: a handle names the trainer's GPU, to be seen too
        visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        mine = settings.gpus_of(index)
        own = [visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu) for gpu in mine]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return kept


def meeting_environment(settings: ServerSettings, port: int, meeting: Path) -> dict[str, str]:
    """Return variables that keep what is between the processes of one server on its machine; the caller's go before.

    SGLang would give its processes a store of torch's, which listens on every address of the machine and lets anyone
    write.  A file does the same for processes of one machine and one user.

    Args:
        settings: of the servers.
        port: of this server.
        meeting: an empty file that only this server has.
    """
    if not _SEVERAL_MACHINES.isdisjoint(_given(settings.flags)):
        return {}
    return {
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{meeting}",
        # By these SGLang names its shared memory on a CPU with AMX, where it would otherwise use the store's address.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **loopback_variables(),
    }

"""Make the rollout engines of a run from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.roles import another_connection, leads_node, meeting_host, node, own_address
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.embedded.pool import EmbeddedPool
from megatron_tropd.rollout.engine_pool import EnginePool, Export
from megatron_tropd.rollout.sglang.planned.push import PlannedPush, TrainerWeights
from megatron_tropd.rollout.sglang.pool import SGLangPool
from megatron_tropd.setup.engine_settings import is_planned, sglang_settings
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.sglang.server.handle import ServerHandle
from megatron_tropd.sglang.server.keeper import Keeper, RemoteServer
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.training.student import Student, params_dtype
from megatron_tropd.types import Rollout
from megatron_tropd.weights.coordinates.parameters import local_parameters


def _embedded(spec: RunSpec, student: Student, export: Export, probes: Sequence[Rollout]) -> EnginePool:
    config, source, tokens = spec.config, spec.models.student, spec.tokens
    engine = EmbeddedEngine(
        source.hf_dir,
        stop_token_ids=tokens.stop_ids,
        vocab_size=tokens.common_vocab_size,
        dtype=params_dtype(config),
        device=platform.device(),
        max_batch_size=config.rollout.rollout_max_batch_size,
    )
    return EmbeddedPool(engine)


def _sglang(spec: RunSpec, student: Student, export: Export, probes: Sequence[Rollout]) -> EnginePool:
    config, source, tokens = spec.config, spec.models.student, spec.tokens
    settings, planned = sglang_settings(config, source, spec.gpus.engines), None
    if is_planned(config):
        shared = config.engine.update_weight_transport == "planned-shared"
        planned = PlannedPush(settings, source.arch, _trainer_weights(student), shared=shared)
    return SGLangPool(
        settings, arch=source.arch, stop_token_ids=tokens.stop_ids, vocab_size=tokens.common_vocab_size,
        export=export, planned=planned, probes=[probe.token_ids for probe in probes],
        make_server=partial(_server, config.parallel.distributed_timeout_s),
    )  # fmt: skip


def _server(timeout_s: float, settings: ServerSettings, index: int, max_positions: int) -> ServerHandle:
    """Server number ``index``: on this machine, which is rank 0's, or on the one that its number falls to."""
    machine = settings.node_of(index)
    if machine == 0:
        return ServerProcess(settings, index, max_positions)
    return RemoteServer(machine, index, lambda: another_connection(timeout_s))


def make_keeper(spec: RunSpec) -> Keeper | None:
    """Make what starts the servers of this machine; None where this process is not the first of another machine than
    rank 0's, or no server belongs there.  Not collective."""
    config, engine = spec.config, spec.config.engine
    writes = spec.objective.needs.rollouts or spec.data.eval_prompts
    if engine.rollout_engine != "sglang" or engine.rollout_engine_urls or not engine.rollout_num_engines_per_node:
        return None
    if not writes or not leads_node() or node() == 0:
        return None
    settings = sglang_settings(config, spec.models.student, spec.gpus.engines)
    arch, timeout_s = spec.models.student.arch, config.parallel.distributed_timeout_s
    return Keeper(node(), settings, arch.max_position_embeddings, lambda: another_connection(timeout_s))


ENGINES: dict[str, Callable[[RunSpec, Student, Export, Sequence[Rollout]], EnginePool]] = {
    "embedded": _embedded,
    "sglang": _sglang,
}
"""Maker of the engines by --rollout-engine."""


def make_engines(spec: RunSpec, student: Student, export: Export, probes: Sequence[Rollout]) -> EnginePool:
    """Make the engines without weights; the first push fills them.  Collective over the world.

    SGLang servers score ``probes`` after every push, to check it.
    """
    return ENGINES[spec.config.engine.rollout_engine](spec, student, export, probes)


def _trainer_weights(student: Student) -> TrainerWeights:
    """Describe the trainer's weights and where its ranks meet the engines'."""
    host = meeting_host()
    return TrainerWeights(
        layout=student.groups.layout,
        params=lambda: local_parameters(student.model),
        store_host=host,
        address=own_address(host),
    )

"""Several servers as one: distributes requests, redistributes those of a failed server, and restarts servers."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_tropd.errors import EngineError
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.rollout.engine import Arrived, SamplingParams, ignore
from megatron_tropd.rollout.idle_clock import IdleClock
from megatron_tropd.rollout.sglang.api.generation import PromptGroup, TokenRules, group_requests
from megatron_tropd.rollout.sglang.api.weight_buckets import WeightBucket
from megatron_tropd.rollout.sglang.engine import Engine
from megatron_tropd.sglang.errors import BadResponse, EngineDown, EngineTimeout, StaleWeights
from megatron_tropd.sglang.server.fleet import ServerFleet
from megatron_tropd.sglang.server.handle import MakeServer
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import SGLangSettings
from megatron_tropd.types import GenerationRequest, Rollout

log = logging.getLogger(__name__)

COUNTS = ("restarts", "reissued", "bad_responses", "stale_weights", "given_up", "unverified", "planned_failed")
"""``engine/...`` of docs/metrics.md."""

_MAX_ATTEMPTS = 4
"""Tries of one prompt: a request that makes every server fail must end the run, not all the servers."""
_BAD_ANSWERS = 4
"""Answers that cannot be a rollout, without one that is in between, after which a server counts as failed.  It answers
at once, and so would be given most of the prompts."""


@dataclass(slots=True, kw_only=True)
class GenerationJob:
    """A batch of requests and the rollouts received so far; it survives the failure of a server."""

    requests: Sequence[GenerationRequest]
    params: SamplingParams
    version: int
    """Weight version that writes the groups that are pending."""
    arrived: Arrived = ignore
    pending: deque[PromptGroup] = field(default_factory=deque)
    done: dict[int, Rollout] = field(default_factory=dict)
    attempts: Counter[PromptGroup] = field(default_factory=Counter)
    tried: dict[PromptGroup, set[int]] = field(default_factory=dict)
    """Numbers of the servers where a prompt failed: it goes to others while there are others."""

    def __post_init__(self) -> None:
        self.pending.extend(group_requests(self.requests))
        nothing = {i: r for i, r in enumerate(self.requests) if r.max_new_tokens == 0}
        self.take({index: _nothing_written(request, self.version) for index, request in nothing.items()})

    def take(self, rollouts: Mapping[int, Rollout]) -> None:
        """Record finished rollouts, and hand them on."""
        self.done |= rollouts
        self.arrived(rollouts)

    def put_back(self, group: PromptGroup, index: int, error: EngineError) -> None:
        """Queue ``group``, which failed at server ``index``, to be written again; raises EngineError after too many
        tries."""
        self.attempts[group] += 1
        self.tried.setdefault(group, set()).add(index)
        if self.attempts[group] >= _MAX_ATTEMPTS:
            raise EngineError(f"prompt {group.prompt_uid} failed {_MAX_ATTEMPTS} times, at last: {error}") from error
        self.pending.appendleft(group)

    def rollouts(self) -> list[Rollout]:
        """Rollouts in the order of the requests; valid only when nothing is pending."""
        return [self.done[index] for index in range(len(self.requests))]


def _nothing_written(request: GenerationRequest, version: int) -> Rollout:
    return Rollout(
        prompt_uid=request.prompt_uid, sample_index=request.sample_index, token_ids=request.token_ids,
        prompt_len=request.prompt_len, guidance_len=request.guidance_len, logprobs=(),
        weight_version=(version, version), finish="length",
    )  # fmt: skip


class Fleet(ServerFleet[Engine]):
    """All servers of a run, on the one rank that talks to them.

    ``counts`` are the failures so far, by the names of ``COUNTS``.
    """

    def __init__(
        self, settings: SGLangSettings, rules: TokenRules, arch: Architecture, make_server: MakeServer = ServerProcess
    ) -> None:
        name = secrets.token_hex(4)  # of this launch: one before may have given other weights the same version
        if settings.urls:
            at = [url.rstrip("/") for url in settings.urls]
            engines = [Engine(i, settings, arch, None, url, run_name=name) for i, url in enumerate(at)]
        else:
            servers = [make_server(settings, i, arch.max_position_embeddings) for i in range(settings.num_servers)]
            engines = [Engine(i, settings, arch, server, run_name=name) for i, server in enumerate(servers)]
        super().__init__(settings, engines, COUNTS)
        self.router: Engine | None = None
        """What takes the prompts in the engines' place (--rollout-router-url) and chooses one for each."""
        if settings.router_url:
            at_router = settings.router_url.rstrip("/")
            self.router = Engine(len(engines), settings, arch, None, at_router, behind=engines, run_name=name)
        self._others_write = False
        """Whether an engine behind the router wrote with other weights: no prompt is handed out before an update."""
        self._max_concurrent = settings.max_concurrent_prompts
        self._rules = rules
        self.clock = IdleClock()
        self._checksums: dict[tuple[int, int], set[str]] = {}
        """Checksums that the servers reported, by weight version and tensor-parallel size.  Servers that were started
        anew may be given a later version than the last whole push."""
        self._writing: asyncio.Task[None] | None = None
        """The work on a job that :meth:`has_ended` has not seen the end of."""

    @property
    def engines(self) -> list[Engine]:
        """The servers."""
        return self.servers

    async def start(self) -> None:
        """Start all servers at once; :meth:`wait_until_up` waits for them."""
        await super().start()
        if self.router:
            await self.router.start()

    async def close(self) -> None:
        """Stop every server that was started here."""
        await self._stop_writing()
        if self.router:
            await self.router.close()
        await super().close()

    # ---- generation ----

    async def begin(self, job: GenerationJob) -> None:
        """Begin, or go on with, :meth:`generate` of ``job``, and return at once."""
        self.clock.start()
        self._writing = asyncio.create_task(self.generate(job))
        self._writing.add_done_callback(lambda _: self.clock.stop())

    async def has_ended(self, seconds: float) -> bool:
        """Return whether what was begun ended within so many seconds; raises what it raised."""
        assert self._writing is not None, "nothing was begun"
        try:
            done, _ = await asyncio.wait({self._writing}, timeout=seconds)
        except BaseException:  # interrupted: nobody will come back for the rest
            await self._stop_writing()
            raise
        if not done:
            return False
        task, self._writing = self._writing, None
        task.result()
        return True

    async def _stop_writing(self) -> None:
        task, self._writing = self._writing, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def generate(self, job: GenerationJob) -> None:
        """Work on ``job`` until it is done, or until no server holds its weights: then groups stay pending.

        Raises:
            RequestRefused: a server answered 4xx.
            EngineError: a prompt failed too often, or the router does not answer.
        """
        await self._check(job.version)
        await self._wait_for_router(job.version)
        running: dict[asyncio.Task[dict[int, Rollout]], tuple[Engine, PromptGroup]] = {}
        try:
            while job.pending or running:
                while job.pending and (engine := self._least_loaded(job)):
                    group = job.pending.popleft()
                    engine.prompts_in_flight += 1
                    engine.tokens_in_flight += group.tokens
                    task = asyncio.create_task(self._write(engine, group, job))
                    running[task] = engine, group
                if not running:
                    return
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    await self._settle(task, *running.pop(task), job)
        except BaseException:
            await self._abandon(running)
            raise

    async def _check(self, version: int) -> None:
        """Find out who died or lost its weights while nothing was asked, before prompts are handed out."""
        ready = [engine for engine in self.engines if engine.version == version]
        results = await asyncio.gather(*(engine.check_health() for engine in ready), return_exceptions=True)
        for engine, result in zip(ready, results, strict=True):
            if isinstance(result, EngineDown):
                await self._failed(engine, result)
            elif isinstance(result, EngineError):
                self._out_of_rotation(engine, result)
            elif result is not None:
                raise result

    def _out_of_rotation(self, engine: Engine, error: EngineError) -> None:
        """Take the engine out of rotation until the next push.  A router would go on using it."""
        log.warning("engine %d gets no prompts before it is given its weights again: %s", engine.index, error)
        self.counts["stale_weights"] += 1
        engine.version = None
        self._others_write = True

    async def _wait_for_router(self, version: int) -> None:
        """Raises EngineDown where the router does not answer within the start timeout, though a server is ready."""
        if self.router and any(engine.version == version for engine in self.engines):
            await self.router.wait_until_up()

    async def _look_behind(self, failure: EngineError, version: int) -> None:
        """Find out which engines behind the router are down or hold other weights, after a prompt failed there.

        Which of them had it is not known: all are asked.  Where it ended because none showed progress, all are down.

        Raises:
            EngineDown: the router itself does not answer.
        """
        if isinstance(failure, EngineTimeout):
            for engine in [engine for engine in self.engines if engine.version == version]:
                await self._failed(engine, failure)
        else:
            await self._check(version)
        # Also of one that was down, and is back without the weights: the router uses it again.
        self._others_write |= isinstance(failure, StaleWeights)
        await self._wait_for_router(version)

    def _least_loaded(self, job: GenerationJob) -> Engine | None:
        """Return the server with the least work for the first prompt of ``job``, None if all are busy; or the router,
        which is as free as they are."""
        ready, most = [engine for engine in self.engines if engine.version == job.version], self._max_concurrent
        if self.router:
            most *= len(ready)
            ready = [self.router] if ready and not self._others_write else []
        tried = job.tried.get(job.pending[0], ())
        ready = [engine for engine in ready if engine.index not in tried] or ready
        free = [engine for engine in ready if engine.prompts_in_flight < most]
        return min(free, key=lambda engine: (engine.tokens_in_flight, engine.index), default=None)

    async def _write(self, engine: Engine, group: PromptGroup, job: GenerationJob) -> dict[int, Rollout]:
        return await engine.generate(group, job.requests, job.params, job.version, self._rules)

    async def _settle(
        self, task: asyncio.Task[dict[int, Rollout]], engine: Engine, group: PromptGroup, job: GenerationJob
    ) -> None:
        engine.prompts_in_flight -= 1
        engine.tokens_in_flight -= group.tokens
        try:
            found = task.result()
        except (EngineDown, BadResponse, StaleWeights) as error:
            failure: EngineError = error
        else:
            engine.bad_answers = 0
            job.take(found)
            return
        self.counts["reissued"] += 1
        self.counts["bad_responses"] += isinstance(failure, BadResponse)
        log.warning("a prompt is written again: %s", failure)
        job.put_back(group, engine.index, failure)
        if isinstance(failure, BadResponse):
            engine.bad_answers += 1
            if engine.bad_answers >= _BAD_ANSWERS and engine.version == job.version:
                await self._failed(engine, failure)
        elif engine is self.router:
            await self._look_behind(failure, job.version)
        elif isinstance(failure, StaleWeights):
            self._out_of_rotation(engine, failure)
        elif engine.version == job.version:  # the first of its requests to say so
            await self._failed(engine, failure)

    async def _abandon(self, running: dict[asyncio.Task[dict[int, Rollout]], tuple[Engine, PromptGroup]]) -> None:
        """Stop waiting, and have the servers stop too."""
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for engine, group in running.values():
            engine.prompts_in_flight -= 1
            engine.tokens_in_flight -= group.tokens
        busy = list({engine.index: engine for engine, _ in running.values()}.values())
        if self.router and busy:  # it takes no orders
            busy = [engine for engine in self.engines if engine.version is not None]
        await asyncio.gather(*(engine.abort_all() for engine in busy), return_exceptions=True)

    async def score(
        self, sequences: Sequence[Sequence[int]], version: int
    ) -> dict[str, list[tuple[float, ...]]] | None:
        """Log-probabilities of the sequences by every engine, by its name; None if one that is not given up lacks
        ``version``, before or now: it is started anew, and wants the weights.

        Raises:
            RequestRefused: of any engine.
        """

        async def work(engine: Engine) -> list[tuple[float, ...]]:
            return await asyncio.gather(*(engine.score(sequence, self._rules) for sequence in sequences))

        ready = [engine for engine in self.engines if engine.version == version]
        results = await asyncio.gather(*(work(engine) for engine in ready), return_exceptions=True)
        found: dict[str, list[tuple[float, ...]]] = {}
        for engine, result in zip(ready, results, strict=True):
            if isinstance(result, list):
                found[engine.name] = result
            elif isinstance(result, EngineDown | BadResponse):
                self.counts["bad_responses"] += isinstance(result, BadResponse)
                await self._failed(engine, result)
            elif isinstance(result, StaleWeights):
                self._out_of_rotation(engine, result)
            else:
                raise result
        return found if all(engine.version == version for engine in self._usable()) else None

    # ---- memory ----

    async def sleep(self) -> None:
        """Have every server that is up free its memory; they write again after :meth:`wake` and an update."""
        await self._each([engine for engine in self._usable() if engine.is_up], Engine.sleep)

    async def wake(self) -> None:
        """Have every server take its memory again; one that was started anew in between has it."""
        await self._each([engine for engine in self._usable() if engine.is_asleep], Engine.wake)

    # ---- weights ----

    async def begin_update(self, *, but_not_with: int | None = None) -> None:
        """Wait for all servers and open a session with each that does not hold version ``but_not_with``."""
        await self.wait_until_up()
        if but_not_with is None:
            self._checksums.clear()
        wanting = [engine for engine in self._usable() if but_not_with is None or engine.version != but_not_with]
        await self._each(wanting, Engine.begin_update)

    async def send(self, bucket: WeightBucket, *, last_of_version: int | None) -> None:
        """Deliver a bucket to every server that got all earlier ones."""
        bodies: dict[int, bytes] = {}
        await self._each(
            self._updating(), lambda engine: engine.send(bucket, last_of_version=last_of_version, bodies=bodies)
        )

    async def end_update(self, version: int, names: Sequence[str], expected: Mapping[str, str] | None) -> bool:
        """Verify; returns whether every server that is not given up now serves ``version``.

        Raises:
            EngineError: no server is left, or servers hold different weights.
        """
        await self._each(self._updating(), lambda engine: engine.end_update(version, names, expected))
        self._others_write = False
        usable = self._usable()
        for engine in usable:
            if engine.version != version:
                continue
            self._forgive(engine)
            self.counts["unverified"] += not engine.verified
            if engine.checksum:
                self._checksums.setdefault((version, engine.tp_size), set()).add(engine.checksum)
        if any(len(checksums) > 1 for checksums in self._checksums.values()):
            for engine in usable:
                engine.version = None
            raise EngineError(
                f"engines hold different weights as version {version}: an update went wrong, or the weights that were "
                "exported again for a restarted engine are not those of that version"
            )
        return all(engine.version == version for engine in usable)

    def _updating(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.updating]

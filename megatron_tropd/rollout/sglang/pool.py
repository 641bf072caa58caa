"""SGLang servers behind the interface of the training loop: every method is collective over the ranks.

Rank 0 talks to the servers; the other ranks take part in the export of weights and receive rollouts.  When a server
fails, another one takes over its requests; if there is none, the server is restarted and all ranks export the current
weights once more for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import is_rank_zero, on_rank_zero, reason_of
from megatron_tropd.rollout.engine import Arrived, SamplingParams, check_requests, ignore
from megatron_tropd.rollout.engine_pool import EnginePool, Export, PushReport
from megatron_tropd.rollout.sglang.api.checksums import SentChecksums
from megatron_tropd.rollout.sglang.api.generation import TokenRules
from megatron_tropd.rollout.sglang.api.weight_buckets import BucketBuilder
from megatron_tropd.rollout.sglang.fleet import Fleet, GenerationJob
from megatron_tropd.rollout.sglang.planned.push import PlannedPush
from megatron_tropd.rollout.update_tracker import UpdateTracker
from megatron_tropd.sglang.loop_thread import LoopThread
from megatron_tropd.sglang.server.handle import MakeServer
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import SGLangSettings
from megatron_tropd.types import Counts, GenerationRequest, Rollout
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes

_SCORE_ATTEMPTS = 3
_LONGEST_ROUND_S = 30.0
"""Rank 0 lets the other ranks know at least so often that the servers write: they wait in a collective, whose timeout
would otherwise be the longest time that a batch may take."""
_WRITING, _WEIGHTS_WANTED = "writing", "weights wanted"


class SGLangPool(EnginePool):
    """Servers of this run, started when it is made (they are ready at the first push at the latest).

    Args:
        settings: how the servers are run.
        arch: of the student; says which tensors an update must hold.
        stop_token_ids: a rollout ends with any of them.
        vocab_size: only the first so many ids are written (the vocabulary shared with the teacher).
        export: the weights that were pushed last, collectively, for a server that was started anew.  None: such
            a server waits for the next push, and a batch that needs it fails.
        planned: sends updates rank to rank; ``export`` then serves what it could not deliver.
        probes: token ids of sequences that every engine scores after each push, before it writes anything.
        make_server: makes a server that is started here or on another machine of the job.

    Raises:
        ValueError: no stop token, one outside the vocabulary, or a vocabulary larger than the model's.
        EngineError: on every rank alike: a server cannot be started.
    """

    def __init__(
        self, settings: SGLangSettings, *, arch: Architecture, stop_token_ids: Collection[int], vocab_size: int,
        export: Export | None = None, planned: PlannedPush | None = None, probes: Sequence[Sequence[int]] = (),
        make_server: MakeServer = ServerProcess,
    ) -> None:  # fmt: skip
        if not 1 <= vocab_size <= arch.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}; the model has {arch.vocab_size} rows")
        if not stop_token_ids or not all(0 <= token < vocab_size for token in stop_token_ids):
            raise ValueError(f"stop_token_ids {sorted(stop_token_ids)}: expected at least one id in [0, {vocab_size})")
        if settings.router_url and vocab_size < arch.vocab_size:
            raise ValueError(
                f"{settings.names.router} {settings.router_url}: sglang-router drops the logit bias that keeps engines "
                f"from writing the {arch.vocab_size - vocab_size} ids that only the student has: leave the flag out"
            )
        self._settings, self._arch, self._vocab_size = settings, arch, vocab_size
        self._export, self._planned, self._probes = export, planned, probes
        self._run: Callable[[Any], Any] = _no_loop
        self._tracker = UpdateTracker(hf_shapes(arch))
        self._version: int | None = None
        self._job: GenerationJob | None = None
        self._fleet: Fleet | None = None
        if is_rank_zero():
            rules = TokenRules(
                stop_token_ids=frozenset(stop_token_ids), vocab_size=vocab_size, model_vocab_size=arch.vocab_size
            )
            self._loop = LoopThread("sglang-engines")
            self._run = self._loop.run
            self._fleet = Fleet(settings, rules, arch, make_server)
        on_rank_zero(lambda: self._run(self._servers.start()), EngineError)

    @property
    def _servers(self) -> Fleet:
        """The fleet; exists on rank 0 only."""
        if self._fleet is None:
            raise EngineError("the engines are closed")
        return self._fleet

    @property
    def weight_version(self) -> int | None:
        """Version of the servers' weights; None while they are incomplete."""
        return self._version

    @property
    def counts(self) -> dict[str, int]:
        """Counts of failures so far, by the names of ``fleet.COUNTS``; on rank 0, {} elsewhere."""
        return {} if self._fleet is None else dict(self._fleet.counts)

    def idle_share(self) -> float:
        """See EnginePool; 0 on other ranks than 0."""
        return 0.0 if self._fleet is None else self._fleet.clock.idle_share()

    # ---- generation ----

    @property
    def written(self) -> Counts | None:
        """Finished responses of the batch that is written now, on rank 0; None between two, and on other ranks."""
        job = self._job
        if job is None or self._fleet is None:
            return None
        return Counts(done=len(job.done), total=len(job.requests), unit="responses")

    def submit(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int, arrived: Arrived = ignore
    ) -> None:
        """Hand out all requests; the servers write while the trainer's ranks do other work.

        Rollouts arrive on rank 0, in a thread of its own.

        Raises:
            EngineError: on every rank alike: other weights are loaded, a request is malformed or too long.
        """
        if self._version != version:
            raise EngineError(f"the engines hold weight version {self._version}, the trainer is at {version}")
        if self._job is not None:
            raise EngineError("a batch is in writing already")
        check_requests(requests, vocab_size=self._vocab_size, max_positions=self._arch.max_position_embeddings)
        job = GenerationJob(requests=requests, params=params, version=version, arrived=arrived)
        on_rank_zero(lambda: self._begin(job), EngineError)
        self._job = job

    def _begin(self, job: GenerationJob) -> None:
        fleet = self._servers
        longest = max((len(r.token_ids) + r.max_new_tokens for r in job.requests), default=0)
        if longest > fleet.max_tokens:
            raise EngineError(
                f"a request of {longest} tokens (prompt and response) exceeds the {fleet.max_tokens} that the engines "
                "hold; raise --sglang-max-total-tokens or lower --max-response-length"
            )
        self._run(fleet.begin(job))

    def finished(self, version: int) -> list[Rollout]:
        """Wait for the rollouts of the batch; return them in order, on every rank.

        Raises:
            EngineError: on every rank alike: a prompt failed too often, or no server is left.
        """
        job = self._job
        if job is None:
            raise EngineError("no requests were submitted")
        try:
            while isinstance(outcome := on_rank_zero(lambda: self._wait(job), EngineError), str):
                if outcome == _WEIGHTS_WANTED:
                    self._deliver_again(version)
                    job.version = self._version = version
                    on_rank_zero(lambda: self._run(self._servers.begin(job)), EngineError)
        finally:
            self._job = None
        return list(outcome)

    def _deliver_again(self, version: int) -> None:
        """Send the current weights again, only to the engines that lack them."""
        if self._export is None:
            raise EngineError("engines lost their weights, and this pool was given no way to export them again")
        self._deliver(self._export, version, only_missing=True)

    def _wait(self, job: GenerationJob) -> list[Rollout] | str:
        """Wait for the job for one round; return its rollouts, or what is to be done before the next round."""
        if not self._run(self._servers.has_ended(min(_LONGEST_ROUND_S, self._settings.request_timeout_s))):
            return _WRITING
        return _WEIGHTS_WANTED if job.pending else job.rollouts()

    def score(self, sequences: Sequence[Sequence[int]], version: int) -> dict[str, list[tuple[float, ...]]]:
        """Log-probability of every token but the first of each sequence, over all rows of the student's vocabulary, by
        every engine, on every rank.

        The trainer compares them with its own.  An engine that died is started anew, given the weights
        of ``version`` again and asked again.

        Raises:
            EngineError: on every rank alike; also when engines keep dying of it.
        """
        for token_ids in sequences:
            if len(token_ids) < 2 or not all(0 <= token < self._vocab_size for token in token_ids):
                raise EngineError(
                    f"cannot score {list(token_ids)[:8]}: expected two or more ids below {self._vocab_size}"
                )
        for attempt in range(_SCORE_ATTEMPTS):
            if attempt:
                self._deliver_again(version)
            is_last = attempt + 1 == _SCORE_ATTEMPTS
            scores = on_rank_zero(lambda: self._score(sequences, version, is_last), EngineError)  # noqa: B023
            if scores is not None:
                return scores
        raise AssertionError("the last attempt returns or raises")

    def _score(
        self, sequences: Sequence[Sequence[int]], version: int, is_last: bool
    ) -> dict[str, list[tuple[float, ...]]] | None:
        servers = self._servers
        scores: dict[str, list[tuple[float, ...]]] | None = self._run(servers.score(sequences, version))
        if scores is None and is_last:
            reasons = "\n".join(each.last_error for each in servers.engines if each.version != version)
            raise EngineError(
                f"engines failed to score the probes of weight version {version} {_SCORE_ATTEMPTS} times:\n{reasons}"
            )
        return scores

    # ---- memory ----

    def sleep(self) -> None:
        """Have the servers free their memory; nothing happens unless the settings say so.

        Raises:
            EngineError: on every rank alike: a batch is in writing, or no server is left.
        """
        if not self._settings.release_memory:
            return
        if self._job is not None:
            raise EngineError("a batch is in writing: the servers need their memory")
        self._version = None
        on_rank_zero(lambda: self._run(self._servers.sleep()), EngineError)

    def wake(self) -> None:
        """Have the servers take their memory again; the next push fills it."""
        if self._settings.release_memory:
            on_rank_zero(lambda: self._run(self._servers.wake()), EngineError)

    # ---- weights ----

    def push(self, export: Export, version: int) -> PushReport:
        """Send complete new weights, by HF name, to every server and verify that they arrived.

        Args:
            export: begins this rank's part of the same collective export; not called while updates are planned.
            version: of the weights.

        Raises:
            EngineError: on every rank alike: the export failed on rank 0, a tensor is unknown, missing,
                repeated or of another shape or dtype, or no server took the update.  Nothing is written until a
                whole push succeeds.
        """
        if self._job is not None:
            raise EngineError("a batch is still in writing: its tokens would come from two weight versions")
        self._version = None
        # All ranks alike: the collective export is not begun, or begun anew below.
        if self._planned is not None and not self._planned.given_up:
            complete = self._planned.deliver(self._fleet, self._run, version)
        else:
            complete = self._deliver(export, version, only_missing=False)
        while not complete and self._export is not None:
            complete = self._deliver(self._export, version, only_missing=True)
        self._version = version
        return PushReport(probe_logprobs=self.score(self._probes, version) if self._probes else {})

    def _deliver(self, export: Export, version: int, *, only_missing: bool) -> bool:
        """Send all weights once; returns whether every server that is not given up now holds them."""
        stream = iter(export())
        failure: Exception | None = None
        complete = False
        if self._fleet is not None:
            try:
                complete = self._send_all(self._fleet, stream, version, only_missing)
            except Exception as error:  # of any kind: the other ranks wait for the outcome
                self._tracker.refuse(reason_of(error, EngineError))
                failure = error
        for _ in stream:  # the export is collective: the other ranks wait for us in it
            pass

        def outcome() -> bool:
            if failure is not None:
                raise failure
            return complete

        return on_rank_zero(outcome, EngineError)

    def _send_all(self, fleet: Fleet, stream: Iterator[tuple[str, Tensor]], version: int, only_missing: bool) -> bool:
        self._tracker.begin(version)
        run = self._run
        run(fleet.begin_update(but_not_with=version if only_missing else None))
        builder = BucketBuilder(self._settings.bucket_bytes)
        plain = all(e.is_cpu and e.tp_size == 1 for e in fleet.engines if e.updating)
        hashes = SentChecksums() if plain and not self._arch.num_experts else None
        names = []
        for name, tensor in stream:
            self._tracker.receive(name, tuple(tensor.shape))
            self._check_dtype(name, tensor)
            names.append(name)
            if hashes is not None:
                hashes.add(name, tensor)
            if full := builder.add(name, tensor):
                run(fleet.send(full, last_of_version=None))
                del full
        self._tracker.end(version)
        run(fleet.send(builder.close(), last_of_version=version))
        return bool(run(fleet.end_update(version, names, hashes.result() if hashes else None)))

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        given = str(tensor.dtype).removeprefix("torch.")
        if given != self._settings.dtype:
            self._tracker.fail(f"tensor {name} is {given}, the engines hold {self._settings.dtype}")

    def close(self) -> None:
        """Stop the servers that were started here.  May be called twice."""
        fleet, self._fleet, self._version = self._fleet, None, None
        if fleet is not None:
            self._loop.run(fleet.close())
            self._loop.close()


def _no_loop(_: Any) -> Any:
    raise AssertionError("only rank 0 speaks to the servers")

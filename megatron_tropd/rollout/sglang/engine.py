"""One SGLang server as a rollout engine: start and stop, weights, generation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_tropd.json_files import shown
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.rollout.sglang.api.generation import (
    PromptGroup,
    TokenRules,
    generate_body,
    read_samples,
    read_scores,
    stale_reason,
    weight_name,
)
from megatron_tropd.rollout.sglang.api.weight_buckets import WeightBucket, bytes_message, shared_message, update_body
from megatron_tropd.sglang.api.control import (
    check_done,
    read_checksums,
    read_weight_version,
)
from megatron_tropd.sglang.api.scores import score_body
from megatron_tropd.sglang.errors import RequestRefused, StaleWeights
from megatron_tropd.sglang.server.handle import ServerHandle
from megatron_tropd.sglang.server.server import Server
from megatron_tropd.sglang.settings import SGLangSettings
from megatron_tropd.types import GenerationRequest, Rollout
from megatron_tropd.weights.coordinates.engine_boxes import parameter_names

log = logging.getLogger(__name__)

_NOT_FOUND = 404

PauseMode = Literal["abort", "retract", "in_place"]


class Engine(Server):
    """Server number ``index``: started here (``server``), or running elsewhere (``url``).

    ``version`` is the weight version with which the server may generate; None keeps it out of rotation.  The server is
    told it with ``run_name``, so that what another run pushed is not taken for it.
    """

    def __init__(
        self, index: int, settings: SGLangSettings, arch: Architecture, server: ServerHandle | None, url: str = "",
        behind: Sequence[Engine] = (), run_name: str = "",
    ) -> None:  # fmt: skip
        super().__init__(index, settings, server, url, behind)
        self._settings: SGLangSettings = settings
        self._arch, self._run_name = arch, run_name
        self.version: int | None = None
        self.checksum: str | None = None
        """Hash over all its weights, of the last update; None where the server has no weights checker."""
        self.is_asleep = False
        self.updating = False
        self.verified = False
        """Whether the server hashed the last update's weights, and names (and checksums, if known) were as sent."""
        self.prompts_in_flight = self.tokens_in_flight = 0
        self.bad_answers = 0
        """Answers that cannot be a rollout, since the last one that is."""

    async def start(self) -> None:
        """Start (again) what was started here, and forget what the old server held; does not wait."""
        self.version, self.updating, self.is_asleep, self.bad_answers = None, False, False, 0
        await super().start()

    async def close(self) -> None:
        """Stop what was started here."""
        self.version, self.updating = None, False
        await super().close()

    async def check_health(self) -> None:
        """Raises EngineDown if the server does not answer, and StaleWeights if it serves other weights."""
        held = await self._held_version()
        if self.version is None:
            raise StaleWeights(f"{self.name} holds no whole weights of this run")
        if held != (expected := weight_name(self.version, self._run_name)):
            raise StaleWeights(f"{self.name} serves {stale_reason([held], expected)}")

    async def _held_version(self) -> str:
        answer = await self._get("/model_info")
        with self._named("/model_info"):
            return read_weight_version(answer)

    # ---- what it writes ----

    async def generate(
        self,
        group: PromptGroup,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        version: int,
        rules: TokenRules,
    ) -> dict[int, Rollout]:  # fmt: skip
        """The samples of one prompt, by their place in the batch.

        Raises:
            EngineDown, RequestRefused, BadResponse, StaleWeights: naming engine, step and prompt.
        """
        what = f"step {params.step}, prompt {group.prompt_uid}"
        answer = await self._ask(generate_body(group, params, rules), what)
        with self._named(what):
            return read_samples(
                answer, group, requests, version=version, rules=rules, run_name=self._run_name,
                report_top_k=params.report_top_k,
            )  # fmt: skip

    async def score(self, token_ids: Sequence[int], rules: TokenRules) -> tuple[float, ...]:
        """Log-probability of every token but the first, at temperature 1."""
        assert self.version is not None
        what = f"scoring {len(token_ids)} tokens"
        answer = await self._ask(score_body(token_ids), what)
        with self._named(what):
            return read_scores(answer, token_ids, version=self.version, rules=rules, run_name=self._run_name)

    async def pause(self, mode: PauseMode) -> None:
        """Write nothing until :meth:`resume`: end running requests, or put them back, or hold them."""
        await self._post("/pause_generation", {"mode": mode}, what=f"pause ({mode})")

    async def resume(self) -> None:
        """Write again."""
        await self._post("/continue_generation", {}, what="continue")

    async def abort_all(self) -> None:
        """End every request; each returns what it has, finished by ``abort``."""
        await self._post("/abort_request", {"abort_all": True}, what="abort")

    # ---- its memory ----

    async def sleep(self) -> None:
        """Write nothing and free the memory of weights and cache, until :meth:`wake` and a new update."""
        self.version = None
        await self.pause("retract")  # a scheduler that is not paused might not be idle yet, and would refuse
        await self._post("/release_memory_occupation", {}, what="release of its memory")
        self.is_asleep = True

    async def wake(self) -> None:
        """Take the memory again.  What it holds is arbitrary until an update."""
        if self.is_asleep:
            await self._post("/resume_memory_occupation", {}, what="taking its memory again")
            self.is_asleep = False

    # ---- its weights ----

    async def begin_update(self) -> None:
        """Stop writing and open an update session.

        Running requests go back to the queue, so that none sees half an update.  Servers before 0.5.20 have
        no session and take tensors without one.
        """
        self.version, self.checksum, self.updating = None, None, True
        await self.pause("retract")
        try:
            await self._change("/begin_weight_update", {}, what="begin of a weight update")
        except RequestRefused as error:
            if error.status == _NOT_FOUND:
                return
            # A session that an earlier, failed update left open.
            await self._change("/end_weight_update", {}, what="end of an abandoned weight update")
            await self._change("/begin_weight_update", {}, what="begin of a weight update")

    async def send(self, bucket: WeightBucket, *, last_of_version: int | None, bodies: dict[int, bytes]) -> None:
        """Deliver one bucket; the version travels with the last one, and the prefix cache is flushed with it.

        ``bodies`` keeps the bucket's bytes for other engines of as many tensor-parallel ranks.
        """
        version = None if last_of_version is None else weight_name(last_of_version, self._run_name)
        if self._shares_memory:
            body = update_body([shared_message(bucket) for _ in range(self.tp_size)], weight_version=version)
        elif (kept := bodies.get(self.tp_size)) is not None:
            body = kept
        else:
            body = bodies[self.tp_size] = update_body([bytes_message(bucket)] * self.tp_size, weight_version=version)
        names = bucket.names
        what = f"{len(names)} tensor(s) {names[0]} .. {names[-1]}"
        await self._change("/update_weights_from_tensor", body, what=what)

    @property
    def _shares_memory(self) -> bool:
        transport = self._settings.transport
        if transport == "auto" and self.server is not None and self.server.is_local:
            return not (self._settings.cuda and self._settings.hides_gpus(self.index))
        return transport == "shared"

    async def call_loader(self, body: bytes, *, what: str, timeout_s: float) -> None:
        """Have every worker call a custom weight loader with the tensors of ``body``."""
        await self._change("/update_weights_from_tensor", body, what=what, timeout_s=timeout_s)

    async def set_version(self, version: int) -> None:
        """Name the weights that it holds now."""
        body = {"new_version": weight_name(version, self._run_name), "abort_all_requests": False}
        await self._change("/update_weight_version", body, what=f"weight version {version}")

    async def end_update(self, version: int, names: Sequence[str], expected: Mapping[str, str] | None) -> None:
        """Close the session, verify, and serve ``version``.

        Args:
            version: what was sent.
            names: HF names of all tensors that were sent.
            expected: checksums by the server's parameter names; None where they cannot be worked out.

        Raises:
            StaleWeights: the server holds something else.
        """
        try:
            await self._change("/end_weight_update", {}, what="end of a weight update")
        except RequestRefused as error:
            if error.status != _NOT_FOUND:
                raise
        await self._verify(version, names, expected)
        await self.resume()
        self.version, self.updating = version, False

    async def _verify(self, version: int, names: Sequence[str], given: Mapping[str, str] | None) -> None:
        self.verified, self.checksum = False, None
        if (held := await self._held_version()) != (expected := weight_name(version, self._run_name)):
            raise StaleWeights(f"{self.name} says, after an update, {stale_reason([held], expected)}")
        try:
            answer = await self._post("/weights_checker", {"action": "checksum"}, what="checksum")
        except RequestRefused as error:
            log.warning("%s cannot hash its weights; only its version was verified (%s)", self.name, error)
            return
        with self._named("/weights_checker"):
            checksums = read_checksums(answer)
        hashes = checksums.by_name
        sent = parameter_names(self._arch, names)
        if wrong := sorted(hashes.keys() ^ sent):
            side = "was never sent" if wrong[0] in hashes else "is unknown to it and was skipped"
            raise StaleWeights(f"{self.name}: {len(wrong)} tensor(s) missed, first {shown(wrong[0])}, which {side}")
        if given is not None and (wrong := sorted(name for name in hashes if hashes[name] != given.get(name))):
            raise StaleWeights(
                f"{self.name}: {len(wrong)} tensor(s) differ from what was sent, first {shown(wrong[0])}"
            )
        self.verified, self.checksum = True, checksums.engine

    async def _change(
        self, path: str, body: dict[str, Any] | bytes, *, what: str, timeout_s: float | None = None
    ) -> None:
        """Send a step of a weight update; anything but success leaves unknown weights."""
        answer = await self._post(path, body, what=what, timeout_s=timeout_s)
        with self._named(what):
            check_done(answer)

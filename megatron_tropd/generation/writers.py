"""Who writes the responses.  A writer takes prompts from an iterator as it has room, and yields what is finished."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Iterable, Iterator
from typing import Protocol

from megatron_tropd.generation.journal import Written
from megatron_tropd.generation.servers import WritingFleet
from megatron_tropd.generation.task import Task
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.sglang.loop_thread import LoopThread
from megatron_tropd.types import GenerationRequest, Rollout


class Writer(Protocol):
    """Writes responses."""

    def write(self, tasks: Iterable[Task]) -> Iterator[list[Written]]:
        """Yield the responses of all tasks, in any order, soon after they are finished.

        Raises:
            EngineError: they cannot be written.
        """

    def close(self) -> None:
        """End what was started.  May be called twice."""


class EmbeddedWriter:
    """Writes with transformers in this process, a batch of prompts at a time.

    Args:
        engine: with its weights.
        params: how tokens are drawn; a token depends on the prompt's uid, sample and place, not on the batch.
        max_new_tokens: of a response.
        batch_size: responses written together; a prompt with more samples than that is a batch of its own.
    """

    def __init__(self, engine: EmbeddedEngine, params: SamplingParams, *, max_new_tokens: int, batch_size: int) -> None:
        self._engine, self._params = engine, params
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size

    def write(self, tasks: Iterable[Task]) -> Iterator[list[Written]]:
        """See :class:`Writer`."""
        for batch in self._batches(tasks):
            requests = [
                GenerationRequest(
                    prompt_uid=task.random_uid, sample_index=sample, token_ids=task.token_ids,
                    prompt_len=len(task.token_ids), guidance_len=0, max_new_tokens=self._max_new_tokens,
                )
                for task in batch
                for sample in task.samples
            ]  # fmt: skip
            numbers = [task.number for task in batch for _ in task.samples]
            rollouts = self._engine.generate(requests, self._params)
            yield [_written(number, rollout) for number, rollout in zip(numbers, rollouts, strict=True)]

    def _batches(self, tasks: Iterable[Task]) -> Iterator[list[Task]]:
        batch: list[Task] = []
        for task in tasks:
            if batch and sum(len(t.samples) for t in batch) + len(task.samples) > self._batch_size:
                yield batch
                batch = []
            batch.append(task)
        if batch:
            yield batch

    def close(self) -> None:
        """Free the weights."""
        self._engine.close()


def _written(number: int, rollout: Rollout) -> Written:
    return Written(
        number=number, sample=rollout.sample_index, token_ids=rollout.token_ids[rollout.prompt_len :],
        finish=rollout.finish,
    )  # fmt: skip


class ServerWriter:
    """Writes on SGLang servers.  Prompts wait for room in the fleet, so that no server is idle while this process
    stores what is finished."""

    def __init__(self, fleet: WritingFleet) -> None:
        self._fleet = fleet
        self._loop = LoopThread("sglang-writer")
        self._closed = False

    def start(self) -> None:
        """Start the servers, and wait until one of them answers or all are given up.

        Raises:
            EngineError: none can be used.
        """
        self._loop.run(self._fleet.open())
        self._loop.run(self._fleet.until_any_is_up())

    def write(self, tasks: Iterable[Task]) -> Iterator[list[Written]]:
        """See :class:`Writer`."""
        waiting = iter(tasks)
        running: set[concurrent.futures.Future[list[Written]]] = set()
        while True:
            for task in itertools.islice(waiting, self._fleet.room - len(running)):
                running.add(self._loop.begin(self._fleet.write(task)))
            if not running:
                return
            finished, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            yield [written for future in finished for written in future.result()]

    def close(self) -> None:
        """End the servers that were started here."""
        if not self._closed:
            self._closed = True
            try:
                self._loop.run(self._fleet.close())
            finally:
                self._loop.close()

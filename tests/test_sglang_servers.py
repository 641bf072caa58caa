"""Real SGLang servers against transformers: what they write, what they hold, what they refuse."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.errors import EngineError
from megatron_tropd.rollout.sglang.api.checksums import SentChecksums
from megatron_tropd.rollout.sglang.api.weight_buckets import BucketBuilder
from megatron_tropd.rollout.sglang.fleet import GenerationJob
from megatron_tropd.sglang.api.client import Client
from megatron_tropd.sglang.errors import RequestRefused, StaleWeights
from tests.hf_models import VOCAB_SIZE
from tests.sglang_helpers import (
    KEYS,
    STOP,
    Student,
    check_rollouts,
    greedy,
    make_pool,
    params,
    reference_logprobs,
    requests_of,
)

TOLERANCE = 1e-5


def test_sampled_tokens_have_the_students_logprobs(sglang, measured):
    counts, version = sglang.pool.counts, sglang.push()  # the servers are shared: other tests killed some
    requests = requests_of(10, samples=3, max_new=30)
    rollouts = sglang.pool.generate(requests, params(), version)
    worst = check_rollouts(rollouts, requests, sglang.student.model, version)
    measured("SGLang's log-probabilities of its samples, fp32, against transformers", worst, TOLERANCE)
    assert all(r.finish == ("stop" if r.token_ids[-1] == STOP else "length") for r in rollouts)
    assert len({r.token_ids for r in rollouts}) == len(rollouts), "samples of a prompt are different draws"
    assert sglang.pool.counts == counts, "something had to be done twice"


def test_the_reported_ids_are_the_most_probable_ones(sglang):
    version = sglang.push()
    rollouts = sglang.pool.generate(requests_of(3, samples=2, max_new=12), replace(params(), report_top_k=6), version)
    for rollout in rollouts:
        with torch.no_grad():
            logits = sglang.student.model(torch.tensor([rollout.token_ids])).logits[0]
        written = logits[len(rollout.token_ids) - len(rollout.logprobs) - 1 : -1]
        expected = written.topk(6).indices
        assert rollout.topk_ids.dtype == torch.int32
        assert torch.equal(rollout.topk_ids.long().sort(1).values, expected.sort(1).values)


def test_greedy_continuation_is_that_of_transformers_after_every_push(sglang):
    requests = requests_of(4, max_new=16)
    seen = set()
    for _ in range(3):  # the same prompts: a cache that outlived its weights would show
        version = sglang.push()
        rollouts = sglang.pool.generate(requests, params(temperature=0.0), version)
        for rollout, request in zip(rollouts, requests, strict=True):
            written = rollout.token_ids[len(request.token_ids) :]
            assert list(written) == greedy(sglang.student.model, request.token_ids, request.max_new_tokens)
            seen.add((rollout.prompt_uid, written))
    assert len(seen) > len(requests)


def test_a_sequence_may_use_every_position_of_the_model(sglang):
    version = sglang.push()
    room = sglang.arch.max_position_embeddings
    request = replace(requests_of(1)[0], max_new_tokens=room - 4)
    rollouts = sglang.pool.generate([request] * 8, params(), version)
    assert {len(r.token_ids) for r in rollouts if r.finish == "length"} <= {room}
    with pytest.raises(EngineError, match="exceed the model's"):
        sglang.pool.generate([replace(request, max_new_tokens=room)], params(), version)


def test_scores_of_given_tokens_are_those_of_transformers(sglang, measured):
    version = sglang.push()
    sequences = [list(range(3, 40)), [5, VOCAB_SIZE - 1, 7, VOCAB_SIZE - 1]]
    by_engine = sglang.pool.score(sequences, version)
    assert len(by_engine) == 2
    for scores, sequence in itertools.chain.from_iterable(zip(s, sequences, strict=True) for s in by_engine.values()):
        reference = reference_logprobs(sglang.student.model, sequence)
        worst = max(abs(a - b) for a, b in zip(scores, reference, strict=True))
        measured("SGLang's scores of given tokens, fp32, against transformers", worst, TOLERANCE)


def test_work_is_shared_and_nothing_is_written_without_room(sglang):
    version = sglang.push()
    requests = [*requests_of(8, max_new=8), replace(requests_of(1)[0], max_new_tokens=0)]
    before = [_generate_calls(engine) for engine in sglang.engines]
    rollouts = sglang.pool.generate(requests, params(), version)
    assert rollouts[-1].logprobs == () and rollouts[-1].finish == "length"
    after = [_generate_calls(engine) for engine in sglang.engines]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 4]


def _generate_calls(engine) -> int:
    return engine.server.log.read_text().count('"POST /generate HTTP')


def test_a_smaller_vocabulary_and_servers_of_somebody_else(sglang, measured):
    """Ids beyond the common vocabulary are never written, and log-probabilities are over the rest."""
    sglang.student.change()
    pool = sglang.other_pool(vocab_size=40)
    try:
        pool.push(sglang.student.export, sglang.student.version)
        rollouts = pool.generate(_low_requests(), params(), sglang.student.version)
    finally:
        pool.close()
    assert all(max(r.token_ids) < 40 for r in rollouts) and sum(len(r.logprobs) for r in rollouts) > 60
    for rollout in rollouts:
        with torch.no_grad():
            logits = sglang.student.model(torch.tensor([rollout.token_ids])).logits[0, :, :40].double()
        table = torch.log_softmax(logits, -1)
        start = rollout.prompt_len
        reference = [float(table[i - 1, rollout.token_ids[i]]) for i in range(start, len(rollout.token_ids))]
        worst = max(abs(a - b) for a, b in zip(reference, rollout.logprobs, strict=True))
        measured("SGLang's log-probabilities over a smaller vocabulary, against transformers", worst, TOLERANCE)


def _low_requests():
    return [
        replace(request, token_ids=tuple(range(3, 9)), prompt_len=6, guidance_len=0, max_new_tokens=40)
        for request in requests_of(24)  # some models stop early
    ]


# ---- weights ----


@pytest.mark.parametrize("fault", ["unknown", "missing", "twice", "shape", "dtype", "error"])
@pytest.mark.fault(number=20)
def test_a_push_that_is_not_whole_is_refused_and_the_next_one_heals(sglang, fault):
    sglang.push()
    version = sglang.student.change()
    tensors = dict(sglang.student.export())
    name = "model.layers.2.mlp.down_proj.weight"

    def damaged():
        for key, tensor in tensors.items():
            if key != name:
                yield key, tensor
            elif fault == "unknown":
                yield "model.layers.2.mlp.down_proj.weights", tensor
            elif fault == "twice":
                yield from [(key, tensor)] * 2
            elif fault == "shape":
                yield key, tensor.T
            elif fault == "dtype":
                yield key, tensor.bfloat16()
            elif fault == "error":
                raise RuntimeError("the export broke")

    with pytest.raises(EngineError, match=r"export broke|down_proj"):
        sglang.pool.push(damaged, version)
    with pytest.raises(EngineError, match="hold weight version None"):
        sglang.pool.generate(requests_of(1), params(), version)
    sglang.pool.push(sglang.student.export, version)
    requests = requests_of(2)
    assert (
        check_rollouts(sglang.pool.generate(requests, params(), version), requests, sglang.student.model, version)
        < 1e-5
    )


def _send(sglang, engine, tensors, version, *, expected=None, names=None):
    builder = BucketBuilder(1 << 30)
    hashes = SentChecksums()
    for name, tensor in (expected or tensors).items():
        hashes.add(name, tensor)
    for name, tensor in tensors.items():
        builder.add(name, tensor)

    async def work():
        await engine.begin_update()
        await engine.send(builder.close(), last_of_version=version, bodies={})
        await engine.end_update(version, names or list(tensors), hashes.result())

    sglang.run(work())


@pytest.mark.fault(number=21)
def test_what_the_server_does_not_say_is_found_by_the_verification(sglang):
    """SGLang answers success to a name it does not know, to an incomplete update, and to wrong values."""
    sglang.push()
    engine, good = sglang.engines[0], dict(sglang.student.export())
    norm = "model.layers.1.input_layernorm.weight"
    renamed = {(name + "_typo" if name == norm else name): tensor for name, tensor in good.items()}
    swapped = {**good, norm: good["model.layers.1.post_attention_layernorm.weight"]}
    partial = {name: tensor for name, tensor in good.items() if name != norm}
    for tensors, wrong in [
        (renamed, f"first .{norm}"),
        (partial, f"first .{norm}.*never sent"),
        (swapped, f"differ.*{norm}"),
    ]:
        with pytest.raises(StaleWeights, match=wrong):
            _send(sglang, engine, tensors, 900, expected=good)
        assert engine.version is None, "out of rotation until it has a whole update"
    sglang.push()


def test_weights_that_changed_since_the_push_are_not_given_to_a_restarted_server(sglang):
    """They would be served under the old version's name."""
    version = sglang.push()
    sglang.engines[0].version = None
    sglang.student.model.get_parameter("model.norm.weight").data += 1
    with pytest.raises(EngineError, match="different weights as version"):
        sglang.pool._deliver(sglang.student.export, version, only_missing=True)
    sglang.push()


@pytest.mark.fault(number=19)
def test_a_version_that_the_server_does_not_report_is_stale(sglang):
    version = sglang.push()
    engine = sglang.engines[0]
    sglang.run(engine.check_health())
    body = {"new_version": "elsewhere", "abort_all_requests": False}
    sglang.run(engine._post("/update_weight_version", body, what="test"))
    with pytest.raises(StaleWeights, match="elsewhere"):
        sglang.run(engine.check_health())
    requests = requests_of(6)
    rollouts = sglang.pool.generate(requests, params(), version)  # written by the other server
    check_rollouts(rollouts, requests, sglang.student.model, version)
    assert sglang.pool.counts["stale_weights"] >= 1 and engine.version is None
    sglang.push()
    assert engine.version == sglang.student.version


# ---- requests ----


def test_ids_beyond_the_vocabulary_never_reach_a_server(sglang):
    """One of them would end it."""
    version = sglang.push()
    bad = replace(requests_of(1)[0], token_ids=(3, 4, 5, VOCAB_SIZE))
    with pytest.raises(EngineError, match=f"outside .0, {VOCAB_SIZE}"):
        sglang.pool.generate([bad], params(), version)
    with pytest.raises(EngineError, match="cannot score"):
        sglang.pool.score([[3, VOCAB_SIZE]], version)
    sglang.run(sglang.engines[0].check_health())
    sglang.run(sglang.engines[1].check_health())


def test_pause_resume_and_abort(sglang):
    """Tried again where the prompts were written before it came: on a loaded machine they may be quicker."""
    version = sglang.push()
    fleet = sglang.pool._fleet
    requests = [replace(request, max_new_tokens=200) for request in requests_of(4)]

    async def disturbed(job, work):
        task = asyncio.create_task(fleet.generate(job))
        while not task.done() and not all([(await engine._load()).running for engine in fleet.engines]):
            pass
        met = await work()
        await asyncio.wait_for(task, 120)
        return met

    async def nothing():
        pass

    async def paused():
        await asyncio.gather(*(engine.pause("retract") for engine in fleet.engines))
        in_flight = [engine.prompts_in_flight for engine in fleet.engines]
        await asyncio.sleep(whole_job_s)  # servers that went on would be done
        still = [engine.prompts_in_flight for engine in fleet.engines]
        await asyncio.gather(*(engine.resume() for engine in fleet.engines))
        return all(still) and still == in_flight

    async def aborted():
        await asyncio.gather(*(engine.abort_all() for engine in fleet.engines))

    def tried(work):
        """What ``work`` returned, and how many prompts were begun again."""
        job, before = GenerationJob(requests=requests, params=params(), version=version), fleet.counts["reissued"]
        met = sglang.run(disturbed(job, work))
        assert check_rollouts(job.rollouts(), requests, sglang.student.model, version) < 1e-5
        return met, fleet.counts["reissued"] - before

    start = time.monotonic()
    tried(nothing)
    whole_job_s = time.monotonic() - start
    assert any(tried(paused) == (True, 0) for _ in range(10))
    assert any(tried(aborted)[1] > 0 for _ in range(10))


@pytest.mark.fault(number=31)
def test_keys_are_needed_and_shown_nowhere(sglang):
    sglang.push()
    engine = sglang.engines[0]

    async def with_keys(keys):
        client = Client("test", engine.server.url, keys)
        try:
            return await client.post("/pause_generation", {"mode": "abort"}, what="test", timeout_s=30)
        finally:
            await client.close()

    for keys in (None, replace(KEYS, admin="x" * 20), replace(KEYS, admin=KEYS.api, api=KEYS.admin)):
        with pytest.raises(RequestRefused, match="HTTP 401"):
            sglang.run(with_keys(keys))
    secrets = (KEYS.api.encode(), KEYS.admin.encode())
    seen = 0
    for place in _process_texts(engine.server.pid):
        seen += 1
        assert not any(secret in place.read_bytes() for secret in secrets), place
    assert seen >= 6, "argv and environment of launcher, scheduler and detokenizer"
    for log in sglang.settings.log_dir.iterdir():
        assert "<redacted>" in log.read_text() and not any(secret in log.read_bytes() for secret in secrets)
    assert not any(secret.decode() in repr(sglang.settings) for secret in secrets)


def _process_texts(group: int):
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                in_group = entry.joinpath("stat").read_text().rpartition(")")[2].split()[2] == str(group)
            except OSError:
                continue
            if in_group:
                yield from (entry / "cmdline", entry / "environ")


# ---- ranks ----


def _two_ranks(settings, arch, version):
    student = Student(torch.nn.Module(), version - 1)
    student.change()
    pool = make_pool(settings, arch, student)
    try:
        pool.push(student.export, version)
        requests = requests_of(4)
        rollouts = pool.generate(requests, params(), version)
        refusals = []
        for bad in (dict(student.model.named_parameters()), {}):
            bad.pop("lm_head.weight", None)
            try:
                pool.push(bad.items, version + 1)
            except EngineError as error:
                refusals.append(str(error))
        return rollouts, refusals
    finally:
        pool.close()


def test_two_ranks_get_the_same_rollouts_and_the_same_errors(sglang, ranks):
    sglang.push()
    version = sglang.student.version + 1
    urls = tuple(engine.server.url for engine in sglang.engines)
    first, second = ranks(2).run(_two_ranks, replace(sglang.settings, urls=urls), sglang.arch, version)
    assert first[0] == second[0] and len(first[0]) == 4
    assert first[1] == second[1] and len(first[1]) == 2 and "missing: lm_head.weight" in first[1][0]


def test_the_pool_says_how_many_responses_are_finished(sglang):
    """What the heartbeat's thread reads while a batch is written."""
    version, seen, ended = sglang.push(), [], threading.Event()

    def watch():
        while not ended.wait(0.002):
            seen.append(sglang.pool.written)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        sglang.pool.generate(requests_of(12, samples=2, max_new=24), params(), version)
    finally:
        ended.set()
        watcher.join()
    counts = [count for count in seen if count is not None]
    assert {(count.total, count.unit) for count in counts} == {(24, "responses")}
    done = [count.done for count in counts]
    assert done == sorted(done) and done[0] < done[-1] <= 24 and sglang.pool.written is None

"""EmbeddedEngine against a plain transformers forward pass, and its refusal to serve half an update."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_tropd.errors import EngineError
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.engine import RolloutEngine, SamplingParams
from tests.rollout_helpers import VOCAB, params, push, requests_of, tiny_engine, tiny_model

LENGTHS = [5, 3, 9, 1, 9, 7, 2, 14]
NEVER = (59,)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    engine, model = tiny_engine(directory, stop=NEVER)
    return engine, model, directory


def plain_logprobs(model, rollout, temperature=1.0) -> torch.Tensor:
    """Log-probabilities of the written tokens from one forward pass, no cache, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([rollout.token_ids])).logits[0, :-1].double() / temperature
    labels = torch.tensor(rollout.token_ids[1:])
    logprobs = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    return logprobs[rollout.prompt_len + rollout.guidance_len - 1 :]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_match_plain_transformers(tmp_path, family, tied):
    engine, model = tiny_engine(tmp_path, family=family, tied=tied, stop=(1, 2, 3))
    assert isinstance(engine, RolloutEngine)
    for temperature in (1.0, 0.7):
        rollouts = engine.generate(requests_of(LENGTHS), params(temperature=temperature))
        assert len({len(rollout.logprobs) for rollout in rollouts}) > 1  # rows really left the batch
        for rollout in rollouts:
            wanted = plain_logprobs(model, rollout, temperature)
            torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), wanted, atol=1e-5, rtol=0)


def test_greedy_matches_transformers_generate(made):
    engine, model, _ = made
    for request, rollout in zip(r := requests_of(LENGTHS), engine.generate(r, params(temperature=0.0)), strict=True):
        ids = torch.tensor([request.token_ids])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=59,
            pad_token_id=0,
        )  # fmt: skip
        assert rollout.token_ids == tuple(wanted[0].tolist())


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_do_not_depend_on_batch_composition(made, top_p):
    engine, _, directory = made
    requests = requests_of(LENGTHS, guidance=0)
    together = engine.generate(requests, params(top_p=top_p))
    alone = [engine.generate([request], params(top_p=top_p))[0] for request in requests]
    small, model = EmbeddedEngine(directory, stop_token_ids=NEVER, max_batch_size=3), made[1]
    push(small, model)
    split = small.generate(requests[::-1], params(top_p=top_p))[::-1]
    for a, b, c in zip(together, alone, split, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert (a.prompt_uid, a.sample_index) == (c.prompt_uid, c.sample_index)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_coins_are_keyed_by_seed_step_sample_and_response_position(made):
    engine = made[0]
    request = requests_of([6])[0]
    base = engine.generate([request], params())[0]
    assert engine.generate([request], params())[0] == base
    for changed in (params(seed=4), params(step=6)):
        assert engine.generate([request], changed)[0].token_ids != base.token_ids
    other = dataclasses.replace(request, sample_index=1)
    assert engine.generate([other], params())[0].token_ids != base.token_ids
    # The first 4 written tokens given as guidance: the rest comes out the same.
    guided = dataclasses.replace(request, token_ids=base.token_ids[:10], guidance_len=4, max_new_tokens=8)
    continued = engine.generate([guided], params())[0]
    assert continued.token_ids == base.token_ids
    assert continued.logprobs == pytest.approx(base.logprobs[4:], abs=1e-5)


def test_rollouts_stop_on_any_stop_token_and_include_it(tmp_path):
    stop = tuple(range(0, 20))
    engine, _ = tiny_engine(tmp_path, stop=stop)
    rollouts = engine.generate(requests_of([4] * 40, max_new=6), params())
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        written = rollout.token_ids[rollout.prompt_len :]
        assert not set(written[:-1]) & set(stop)
        assert (written[-1] in stop) == (rollout.finish == "stop")
        assert rollout.finish == "stop" or len(written) == 6
    assert len({rollout.token_ids[-1] for rollout in rollouts if rollout.finish == "stop"}) > 1


def test_every_request_has_its_own_length_limit(made):
    engine = made[0]
    requests = [dataclasses.replace(request, max_new_tokens=i) for i, request in enumerate(requests_of([5] * 6))]
    rollouts = engine.generate(requests, params())
    assert [len(rollout.logprobs) for rollout in rollouts] == [0, 1, 2, 3, 4, 5]
    assert rollouts[0].finish == "length"
    assert all(rollout.weight_version == (1, 1) for rollout in rollouts)
    assert engine.generate([], params()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": (1, 2, 60)}, "token id is outside"),
        ({"token_ids": (1, 2)}, "is not its 2 tokens"),
        ({"max_new_tokens": -1}, "negative"),
        ({"max_new_tokens": 126}, "--max-response-length"),
    ],
)
def test_malformed_requests_are_refused(made, change, message):
    with pytest.raises(EngineError, match=message):
        made[0].generate([dataclasses.replace(requests_of([3])[0], **change)], params())


def test_a_request_given_twice_is_written_twice_alike(made):
    # A prompt meets itself in one step where the step crosses the end of an epoch.
    first, second = made[0].generate(requests_of([3]) * 2, params())
    assert first == second


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_sampling_params_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(seed=0, step=0, **bad)


def refuses(engine: EmbeddedEngine) -> bool:
    assert engine.weight_version is None
    with pytest.raises(EngineError):
        engine.health()
    with pytest.raises(EngineError, match="refusing to generate"):
        engine.generate(requests_of([3]), params())
    return True


def test_no_generation_before_the_first_or_during_an_update(tmp_path):
    model = tiny_model(tmp_path)
    engine = EmbeddedEngine(tmp_path, stop_token_ids=NEVER)
    assert refuses(engine)
    engine.begin_update(4)
    assert refuses(engine)
    parameters = list(model.named_parameters())
    engine.update(parameters[:5])
    engine.update(parameters[5:])
    assert refuses(engine)
    engine.end_update(4)
    engine.health()
    assert engine.weight_version == 4


def _shape(parameters):
    return [(name, tensor[:-1] if name == "model.norm.weight" else tensor) for name, tensor in parameters]


def _transport_dies(parameters):
    yield from parameters[:3]
    raise ConnectionError("peer is gone")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p: p[1:], EngineError, "1 tensor.s. missing: model.embed_tokens.weight"),
        (lambda p: [*p, p[0]], EngineError, "embed_tokens.weight was sent twice"),
        (lambda p: [*p, ("model.nonsense", p[0][1])], EngineError, "model.nonsense is unknown"),
        (_shape, EngineError, r"shape \(31,\); expected \(32,\)"),
        (_transport_dies, ConnectionError, "peer is gone"),
    ],
)
def test_a_failed_update_refuses_until_a_whole_one_succeeds(tmp_path, spoil, error, message):
    engine, model = tiny_engine(tmp_path, stop=NEVER)
    parameters = list(model.named_parameters())
    engine.begin_update(2)
    with pytest.raises(error, match=message):
        engine.update(spoil(parameters))
        engine.end_update(2)
    assert refuses(engine)
    with pytest.raises(EngineError):  # the failed update cannot be patched up
        engine.update(parameters)
    with pytest.raises(EngineError):
        engine.end_update(2)
    assert refuses(engine)
    push(engine, model, version=3)
    assert engine.generate(requests_of([3]), params())[0].weight_version == (3, 3)


def test_end_update_must_name_the_version_that_was_begun(tmp_path):
    engine, model = tiny_engine(tmp_path)
    engine.begin_update(2)
    engine.update(model.named_parameters())
    with pytest.raises(EngineError, match="begun as version 2"):
        engine.end_update(3)
    assert refuses(engine)


def test_updates_change_what_is_generated(tmp_path):
    engine, _ = tiny_engine(tmp_path, stop=NEVER)
    other = tiny_model(tmp_path / "other", seed=1)
    push(engine, other, version=2)
    rollout = engine.generate(requests_of([4]), params())[0]
    torch.testing.assert_close(
        torch.tensor(rollout.logprobs).double(), plain_logprobs(other, rollout), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_model_takes_an_lm_head_only_if_it_equals_the_embedding(tmp_path, head_first):
    engine, model = tiny_engine(tmp_path)
    parameters = list(model.named_parameters())
    embedding = dict(parameters)["model.embed_tokens.weight"]

    def with_head(head):
        return [("lm_head.weight", head), *parameters] if head_first else [*parameters, ("lm_head.weight", head)]

    engine.begin_update(2)
    engine.update(with_head(embedding.detach().clone()))
    engine.end_update(2)
    engine.begin_update(3)
    with pytest.raises(EngineError, match="tie_word_embeddings"):
        engine.update(with_head(embedding + 1))
    assert refuses(engine)


def test_nan_weights_are_an_error_not_tokens(tmp_path):
    engine, model = tiny_engine(tmp_path)
    engine.begin_update(2)
    engine.update((name, torch.full_like(p, float("nan"))) for name, p in model.named_parameters())
    engine.end_update(2)
    with pytest.raises(EngineError, match="weight version 2, batch of prompts 100"):
        engine.generate(requests_of([3]), params())


def test_a_closed_engine_refuses(tmp_path):
    engine, _ = tiny_engine(tmp_path)
    engine.close()
    engine.close()
    for call in (engine.health, lambda: engine.generate([], params()), lambda: engine.begin_update(2)):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_construction_does_not_move_the_global_generator(tmp_path):
    tiny_model(tmp_path)
    before = torch.get_rng_state()
    EmbeddedEngine(tmp_path, stop_token_ids=NEVER)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stop", [(), (VOCAB,), (-1,)])
def test_stop_tokens_are_checked(tmp_path, stop):
    tiny_model(tmp_path)
    with pytest.raises(ValueError, match="stop_token_ids"):
        EmbeddedEngine(tmp_path, stop_token_ids=stop)


def test_ids_beyond_the_shared_vocabulary_are_never_written(tmp_path):
    model = tiny_model(tmp_path)
    engine = EmbeddedEngine(tmp_path, stop_token_ids=(1,), vocab_size=10)
    push(engine, model)
    requests = [dataclasses.replace(r, token_ids=(2, 3, 4)) for r in requests_of([3] * 8)]
    for rollout in engine.generate(requests, params()):
        assert max(rollout.token_ids) < 10
    with pytest.raises(ValueError, match="the model has 60 rows"):
        EmbeddedEngine(tmp_path, stop_token_ids=(1,), vocab_size=61)


def test_bfloat16_engine_agrees_with_a_bfloat16_model(tmp_path):
    engine, model = tiny_engine(tmp_path, stop=NEVER, dtype=torch.bfloat16)
    rollout = engine.generate(requests_of([6]), params())[0]
    wanted = plain_logprobs(model.to(torch.bfloat16), rollout)
    assert (torch.tensor(rollout.logprobs).double() - wanted).abs().max() < 0.2


def test_quickstart_sized_generation_is_fast(tmp_path):
    config = Qwen3Config(
        vocab_size=56, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    engine = EmbeddedEngine(tmp_path, stop_token_ids=(55,))
    push(engine, model)
    requests = requests_of([14] * 32, max_new=35)
    requests = [dataclasses.replace(r, token_ids=tuple(t % 56 for t in r.token_ids)) for r in requests]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        engine.generate(requests, params())
        seconds.append(time.perf_counter() - start)
    print("generate seconds", [f"{s:.3f}" for s in seconds])
    assert min(seconds) < 1.0  # 0.05 to 0.1 s were measured; the slack is for a shared machine

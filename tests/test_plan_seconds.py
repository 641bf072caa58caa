"""Seconds of writing and of a teacher's queue, against simulations that go token by token and rollout by rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.acceptance.flops import head_flops, layer_parameters, layers_flops
from tools.model_sizes import find_architecture
from tools.planning.generation import Decoder, Moment, written
from tools.planning.lengths import Lengths
from tools.planning.seconds import last_score

LENGTHS = Lengths(mean_prompt=40.0, mean_response=100.0, max_prompt=64, max_response=400)


def responses(lengths, count):
    """``count`` lengths whose shares are those of the distribution: its quantiles."""
    return [
        lengths.max_response * (1 - ((number + 0.5) / count) ** (1 / lengths.exponent)) for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("mean", [20.0, 100.0, 200.0, 350.0])
def test_lengths_have_the_moments_of_their_quantiles(mean):
    lengths = replace(LENGTHS, mean_response=mean)
    many = responses(lengths, 100_000)
    assert sum(many) / len(many) == pytest.approx(mean, rel=1e-3)
    assert sum(x * x for x in many) / len(many) == pytest.approx(lengths.mean_square_response, rel=1e-3)
    whole = [lengths.mean_prompt + x for x in many]
    assert sum(x * (x + 1) / 2 for x in whole) / len(whole) == pytest.approx(lengths.mean_pairs, rel=1e-3)
    assert sum(x > 150 for x in many) / len(many) == pytest.approx(lengths.longer_than(150), abs=1e-3)


@pytest.mark.parametrize("mean", [20.0, 100.0, 350.0])
def test_ages_are_those_of_responses_at_any_moment(mean):
    """Each moment of each response counts once."""
    lengths, beyond = replace(LENGTHS, mean_response=mean), 30.0
    moments = [(length, (at + 0.5) * length / 40) for length in responses(lengths, 4000) for at in range(40)]
    total = sum(length for length, _ in moments)
    left = [(length, age) for length, age in moments if length - age > beyond]
    share = sum(length for length, _ in left) / total
    assert share == pytest.approx(lengths.longer_than(beyond, aged=True), abs=0.01)
    assert sum(x * age for x, age in left) / (share * total) == pytest.approx(lengths.mean_age(beyond), rel=0.03)


def _decoder(model="qwen3-0.6b"):
    return Decoder(arch=find_architecture(model), itemsize=2, bandwidth=2e12, flops=4e14, step_s=1e-3)


def _simulated(decoder, lengths, count, batch, refills):
    """(seconds, when each response was finished): every step of every sequence, one after the other."""
    waiting, alive, clock, finished = [], {}, 0.0, []
    many = [max(1, round(x)) for x in responses(lengths, count)]
    order = [many[(number * 37) % count] for number in range(count)]  # short and long ones mixed
    waiting = list(enumerate(order))
    while waiting or alive:
        if not alive or refills:
            while waiting and len(alive) < batch:
                index, length = waiting.pop(0)
                alive[index] = [0, length]
        context = sum(lengths.mean_prompt + at for at, _ in alive.values()) / len(alive)
        clock += decoder.step(len(alive), context)
        for index in list(alive):
            alive[index][0] += 1
            if alive[index][0] == alive[index][1]:
                finished.append((clock, lengths.mean_prompt + alive.pop(index)[1]))
    return clock, finished


@pytest.mark.parametrize(
    ("count", "batch", "refills"), [(101, 101, True), (101, 101, False), (303, 101, False), (303, 101, True)],
    ids=["all at one time", "embedded, all at one time", "embedded, in turns", "as places become free"],
)  # fmt: skip
def test_seconds_of_writing_are_those_of_a_simulation(count, batch, refills):
    decoder = _decoder()
    simulated, finished = _simulated(decoder, LENGTHS, count, batch, refills)
    moments = written(decoder, LENGTHS, count, batch, refills=refills)
    assert moments[-1].seconds == pytest.approx(simulated, rel=0.1 if refills and count > batch else 0.04)
    assert moments[-1].finished == pytest.approx(1)
    # How much is finished at half of the time decides what is left for a teacher at the end.
    half, tokens = simulated / 2, sum(size for _, size in finished)
    real = sum(size for when, size in finished if when <= half) / tokens
    planned = max(at.finished for at in moments if at.seconds <= half)
    assert planned == pytest.approx(real, abs=0.06)


@pytest.mark.parametrize("seconds", [0.1, 2.0, 10.0])
def test_the_last_score_is_that_of_a_queue(seconds):
    _, finished = _simulated(_decoder(), LENGTHS, 303, 101, True)
    tokens, clock = sum(size for _, size in finished), 0.0
    for when, size in finished:
        clock = max(clock, when) + seconds * size / tokens
    moments, done = [Moment(seconds=0.0, finished=0.0)], 0.0
    for when, size in finished:
        done += size / tokens
        moments.append(Moment(seconds=when, finished=done))
    assert last_score(moments, seconds) == pytest.approx(clock)


def test_a_step_of_decoding_reads_weights_and_cache():
    decoder = _decoder("qwen3-8b")
    arch = decoder.arch
    read = arch.num_layers * (layer_parameters(arch) + 2 * arch.hidden_size + 2 * arch.head_dim) + arch.hidden_size
    read += arch.vocab_size * arch.hidden_size
    cache = 2 * arch.num_layers * arch.num_query_groups * arch.head_dim * 2
    assert decoder.step(3, 500) == pytest.approx((2 * read + 3 * 500 * cache) / 2e12 + 1e-3)
    slow = replace(decoder, bandwidth=1e18, flops=1e12)
    flops = 64 * (layers_flops(arch, 1, 500) + head_flops(arch, 1))
    assert slow.step(64, 500) == pytest.approx(flops / 1e12 + 1e-3)


def test_few_tokens_touch_few_experts():
    decoder = _decoder("qwen3-30b-a3b")
    one, many = decoder.weights_read(1), decoder.weights_read(4096)
    assert one / 1e9 == pytest.approx(3.3 - 0.31, abs=0.1)  # active parameters without the input table
    assert many / 1e9 == pytest.approx(30.53 - 0.31, abs=0.01)

"""Answers of SGLang's scoring, good and damaged, and the cut to the teacher's top-k."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.sglang.api.scores import read_at, read_given, read_top, score_body
from megatron_tropd.sglang.errors import BadResponse
from megatron_tropd.teacher.server.top_k import cut_top_k
from tests.sglang_replies import damaged

ROWS = 50
TOKENS = [4, 9, ROWS - 1, 7, 12]
START, TOP_K = 1, 3


def _logprobs(seed: int) -> np.ndarray:
    """[positions, ROWS] float32, with ties."""
    logits = torch.randn(len(TOKENS) - 1 - START, ROWS, generator=torch.Generator().manual_seed(seed)).mul(2).round()
    return logits.log_softmax(-1).numpy()


def _b64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _answer(seed: int, *, flat: bool) -> dict:
    """What /generate answers to score_body(TOKENS, start=START, top_k=TOP_K, ids=[5, 6])."""
    logprobs = _logprobs(seed)
    rows = range(len(logprobs))
    order = np.argsort(-logprobs, axis=1)[:, :TOP_K].astype(np.int32)
    values = np.take_along_axis(logprobs, order, axis=1)
    called = [0 if token == ROWS - 1 else token for token in TOKENS]
    meta = {
        "prompt_tokens": len(TOKENS),
        "input_token_logprobs": [
            [None, called[START], None],
            *([float(logprobs[i, TOKENS[START + 1 + i]]), called[START + 1 + i], None] for i in rows),
        ],
        "input_token_ids_logprobs": [None, *([[float(logprobs[i, t]), t, None] for t in (5, 6)] for i in rows)],
    }
    if flat:
        meta |= {
            "input_top_logprobs_val_flat_b64": _b64(values), "input_top_logprobs_val_flat_b64_dtype": "float32",
            "input_top_logprobs_idx_flat_b64": _b64(order), "input_top_logprobs_idx_flat_b64_dtype": "int32",
            "input_top_logprobs_shape": [len(logprobs), TOP_K], "input_top_logprobs_null_prefix": 1,
        }  # fmt: skip
    else:
        meta["input_top_logprobs"] = [
            None, *([[float(v), int(t), None] for v, t in zip(values[i], order[i], strict=True)] for i in rows)
        ]  # fmt: skip
    return {"output_ids": [], "meta_info": meta}


def _read(answer):
    given_ = read_given(answer, TOKENS, start=START, num_rows=ROWS)
    ids, values = read_top(answer, num_tokens=len(TOKENS) - 1 - START, top_k=TOP_K, num_rows=ROWS)
    return given_, ids, values, read_at(answer, [5, 6], num_tokens=len(TOKENS) - 1 - START)


@pytest.mark.parametrize("flat", [True, False])
def test_both_forms_of_an_answer_are_read_as_what_they_say(flat):
    logprobs = _logprobs(1)
    given_, ids, values, at = _read(_answer(1, flat=flat))
    assert given_ == tuple(float(logprobs[i, token]) for i, token in enumerate(TOKENS[START + 1 :]))
    assert np.array_equal(values, np.take_along_axis(logprobs, ids, axis=1)) and ids.dtype == np.int32
    assert np.array_equal(at, logprobs[:, [5, 6]])


@given(st.data(), st.integers(0, 1000), st.booleans())
def test_damaged_answers_are_scores_or_named_errors(data, seed, flat):
    body = data.draw(damaged(_answer(seed, flat=flat)))
    try:
        given_, ids, values, at = _read(body)
    except BadResponse:
        return
    assert all(type(value) is float and value <= 0.0 for value in given_) and len(given_) == len(TOKENS) - 2
    assert ids.shape == values.shape == (len(TOKENS) - 2, TOP_K) and at.shape == (len(TOKENS) - 2, 2)
    assert np.isfinite(values).all() and values.max() <= 0.0 and np.isfinite(at).all() and at.max() <= 0.0
    assert ids.min() >= 0 and ids.max() < ROWS


def _with(name, value):
    answer = _answer(1, flat=True)
    answer["meta_info"][name] = value
    return answer


NAN, TWICE = np.full((3, TOP_K), -1.0, np.float32), np.arange(9, dtype=np.int32).reshape(3, TOP_K)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_token_logprobs", [[None, 9, None]], "0 log-probabilities for 3 given tokens"),
        ("input_top_logprobs_shape", [2, TOP_K], r"of shape \[2, 3\] after 1 without"),
        ("input_top_logprobs_shape", None, "expected a list"),
        ("input_top_logprobs_null_prefix", 0, "after 0 without"),
        ("input_top_logprobs_null_prefix", True, "null_prefix is True; expected an integer"),
        ("input_top_logprobs_val_flat_b64", _b64(NAN[:2]), "top log-probabilities of shape"),
        ("input_top_logprobs_val_flat_b64", "*", "no base64 of float32"),
        ("input_top_logprobs_val_flat_b64", 7, "no base64 of float32"),
        ("input_top_logprobs_val_flat_b64_dtype", "float16", "expected float32"),
        ("input_top_logprobs_val_flat_b64", _b64(NAN * np.float32("nan")), "a top log-probability is nan"),
        ("input_top_logprobs_val_flat_b64", _b64(NAN * np.float32("inf")), "a top log-probability is -inf"),
        ("input_top_logprobs_val_flat_b64", _b64(-NAN), "a top log-probability is 1.0"),
        ("input_top_logprobs_idx_flat_b64", _b64(TWICE + 45), r"a top id is 50; expected one in \[0, 50\)"),
        ("input_top_logprobs_idx_flat_b64", _b64(TWICE - 1), "a top id is -1"),
        ("input_top_logprobs_idx_flat_b64", _b64(TWICE // 2), "twice"),
    ],
)
def test_each_damage_has_a_message(name, value, message):
    with pytest.raises(BadResponse, match=message):
        _read(_with(name, value))


def test_what_rounding_put_above_0_is_0():
    _, _, values, _ = _read(_with("input_top_logprobs_val_flat_b64", _b64(NAN * np.float32(-1e-3))))
    assert values.tolist() == [[0.0] * TOP_K] * len(values)


@pytest.mark.parametrize("vocab_size", [ROWS, ROWS - 6])
def test_the_cut_is_the_exact_top_k_with_ties_by_id(vocab_size):
    """Against a sort of all ids in Python, from candidates in a random order."""
    rng = np.random.default_rng(0)
    logprobs = _logprobs(2)
    ids = np.stack([rng.permutation(ROWS) for _ in logprobs]).astype(np.int32)
    cut = cut_top_k(ids, np.take_along_axis(logprobs, ids, axis=1), top_k=9, vocab_size=vocab_size)
    assert cut is not None
    for row, best, values in zip(logprobs, cut[0].tolist(), cut[1].tolist(), strict=True):
        expected = sorted(range(vocab_size), key=lambda token: (-row[token], token))[:9]
        assert best == expected and values == [float(row[token]) for token in expected]
        assert len(set(values)) < 9, "there are ties"


def test_too_few_common_ids_are_noticed():
    ids, values = np.array([[48, 3, 49]], dtype=np.int32), np.array([[-1.0, -2.0, -3.0]], dtype=np.float32)
    assert cut_top_k(ids, values, top_k=2, vocab_size=48) is None
    best, logprobs = cut_top_k(ids, values, top_k=2, vocab_size=49)
    assert best.tolist() == [[48, 3]]
    assert logprobs.tolist() == [[-1.0, -2.0]]


def test_a_request_scores_the_response_only_and_writes_nothing():
    body = score_body([5, 6, 7], start=1, top_k=4)
    assert body["logprob_start_len"] == 1 and body["sampling_params"]["max_new_tokens"] == 0
    assert body["top_logprobs_num"] == 4 and body["return_flat_raw_top_logprobs_b64"]
    assert score_body([5, 6])["logprob_start_len"] == 0 and "top_logprobs_num" not in score_body([5, 6])
    assert score_body([5, 6], ids=[1])["token_ids_logprob"] == [1]

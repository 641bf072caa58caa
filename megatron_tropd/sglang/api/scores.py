"""Scores of given tokens by /generate: the request, and the log-probabilities in its answer.  Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.json_files import shown
from megatron_tropd.sglang.api.fields import ROUNDING, field, integer, items, logprob
from megatron_tropd.sglang.errors import BadResponse

_MAX_ROWS = 1 << 30


def score_body(
    token_ids: Sequence[int], *, start: int = 0, top_k: int = 0, ids: Sequence[int] = (), flat: bool = True
) -> dict[str, Any]:
    """Body of a /generate call that writes nothing and scores given tokens, at temperature 1.

    Args:
        token_ids: the whole sequence.
        start: the first answer is for the token after position ``start``, which is itself answered with null.  Tokens
            up to it may come from the prefix cache; those after it are computed.
        top_k: number of most probable tokens to return per position.  A server dies of more than its model has.
        ids: log-probabilities of these ids are returned at every position.
        flat: ask for top-k as base64 arrays.  A server that does not know the fields answers with lists.
    """
    body: dict[str, Any] = {
        "input_ids": list(token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": start,
        "return_prompt_token_ids": True,
    }
    if top_k:
        body["top_logprobs_num"] = top_k
        if flat:
            body |= {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
    if ids:
        body["token_ids_logprob"] = list(ids)
    return body


def check_prompt(answer: Any, token_ids: Sequence[int]) -> None:
    """Check that an answer is to these tokens and no others: one of another request may look as good.

    A router does not hand on the wish for the tokens themselves; their number is there always.

    Raises:
        BadResponse: it is not.
    """
    number = integer(field(answer, "meta_info", "prompt_tokens"), "prompt_tokens", low=0, high=_MAX_ROWS)
    if number != len(token_ids):
        raise BadResponse(f"an answer to {number} tokens; {len(token_ids)} were given")
    if "prompt_token_ids" in answer and answer["prompt_token_ids"] != list(token_ids):
        raise BadResponse(f"an answer to {shown(answer['prompt_token_ids'])}; given were {shown(list(token_ids))}")


def reported_ids(token_ids: Sequence[int], num_rows: int) -> list[int]:
    """Return the ids by which the server reports given tokens: it scores the model's last id as it should, but reports
    it as id 0."""
    return [0 if token == num_rows - 1 else token for token in token_ids]


def read_logprobs(entries: Any, token_ids: Sequence[int], what: str, called: Sequence[int]) -> tuple[float, ...]:
    """Return the log-probability of each token, from SGLang's (log-probability, id, text) triples.

    ``called`` has the ids that the server reports for the tokens.
    """
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        given = len(entries) if isinstance(entries, list) else "no"
        raise BadResponse(f"{given} log-probabilities for {len(token_ids)} {what} tokens")
    values = []
    for entry, token, name in zip(entries, token_ids, called, strict=True):
        if not isinstance(entry, list | tuple) or len(entry) < 2 or type(entry[1]) is not int or entry[1] != name:
            raise BadResponse(f"log-probability entry {shown(entry)} does not belong to {what} token {token}")
        values.append(logprob(entry[0], f"the log-probability of {what} token {token}"))
    return tuple(values)


def read_given(body: Any, token_ids: Sequence[int], *, start: int, num_rows: int) -> tuple[float, ...]:
    """Return the log-probability of every token after position ``start``, in an answer to :func:`score_body`."""
    check_prompt(body, token_ids)
    entries, rest = field(body, "meta_info", "input_token_logprobs"), token_ids[start + 1 :]
    tail = entries[1:] if isinstance(entries, list) else entries
    return read_logprobs(tail, rest, "given", reported_ids(rest, num_rows))


def read_top(body: Any, *, num_tokens: int, top_k: int, num_rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (ids int32, log-probabilities float32), [num_tokens, top_k] each, in an answer to :func:`score_body`.

    They come in the server's order.  Reads the flat form, or the nested one of servers that do not know it.
    """
    meta = field(body, "meta_info")
    if isinstance(meta, dict) and "input_top_logprobs_val_flat_b64" in meta:
        ids, values = _flat(meta, "idx", "int32"), _flat(meta, "val", "float32")
        shape = [
            integer(n, "a size", low=0, high=_MAX_ROWS) for n in items(meta.get("input_top_logprobs_shape"), "shape")
        ]
        skipped = integer(field(meta, "input_top_logprobs_null_prefix"), "null_prefix", low=0, high=_MAX_ROWS)
        if shape != [num_tokens, top_k] or skipped != 1 or ids.size != values.size or ids.size != num_tokens * top_k:
            raise BadResponse(
                f"top log-probabilities of shape {shown(shape)} after {skipped} without; expected "
                f"{[num_tokens, top_k]} after 1"
            )
        ids, values = ids.reshape(num_tokens, top_k), values.reshape(num_tokens, top_k)
    else:
        rows = items(field(meta, "input_top_logprobs"), "input_top_logprobs")
        ids, values = read_nested(rows[1:], num_tokens, top_k)
    check_top(ids, values, num_rows)
    return ids, values


def check_top(ids: NDArray[Any], values: NDArray[Any], num_rows: int) -> None:
    """Check the ids and log-probabilities of tops, [N, K] each, by a model of ``num_rows`` ids.  What is above 0 by
    rounding becomes 0 in ``values``."""
    if ids.size and not (ids.min() >= 0 and ids.max() < num_rows):
        wrong = ids[(ids < 0) | (ids >= num_rows)]
        raise BadResponse(f"a top id is {int(wrong[0])}; expected one in [0, {num_rows})")
    good = np.isfinite(values) & (values <= ROUNDING)
    if not good.all():
        raise BadResponse(f"a top log-probability is {float(values[~good][0])!r}; expected a finite number not above 0")
    np.minimum(values, 0.0, out=values)
    if ids.size and (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise BadResponse("a top id is there twice in one position")


def _flat(meta: dict[str, Any], part: str, dtype: str) -> NDArray[Any]:
    name = f"input_top_logprobs_{part}_flat_b64"
    if (given := meta.get(f"{name}_dtype")) != dtype:
        raise BadResponse(f"{name}_dtype is {shown(given)}; expected {dtype}")
    text = field(meta, name)
    try:
        data = base64.b64decode(text, validate=True)
        return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)
    except (TypeError, ValueError, binascii.Error) as error:
        raise BadResponse(f"{name} is no base64 of {dtype}: {shown(str(error))}") from None


def read_nested(rows: list[Any], num_tokens: int, top_k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (ids int32, log-probabilities float32), [num_tokens, top_k] each, from lists of SGLang's triples."""
    if len(rows) != num_tokens:
        raise BadResponse(f"top log-probabilities of {len(rows)} tokens; expected {num_tokens}")
    ids = np.empty((num_tokens, top_k), dtype=np.int32)
    values = np.empty((num_tokens, top_k), dtype=np.float32)
    for place, row in enumerate(rows):
        given = items(row, "top log-probabilities of a token")
        if len(given) != top_k:
            raise BadResponse(f"{len(given)} top log-probabilities of a token; expected {top_k}")
        for rank, entry in enumerate(given):
            if not isinstance(entry, list) or len(entry) < 2:
                raise BadResponse(f"a top log-probability is {shown(entry)}; expected [log-probability, id, text]")
            values[place, rank] = logprob(entry[0], "a top log-probability")
            ids[place, rank] = integer(entry[1], "a top id", low=0, high=_MAX_ROWS)
    return ids, values


def read_at(body: Any, ids: Sequence[int], *, num_tokens: int) -> NDArray[Any]:
    """Return the log-probabilities of ``ids`` at every position, float32 [num_tokens, len(ids)], in an answer to
    :func:`score_body`."""
    rows = items(field(body, "meta_info", "input_token_ids_logprobs"), "input_token_ids_logprobs")
    if len(rows) != num_tokens + 1:
        raise BadResponse(f"log-probabilities of requested ids for {len(rows) - 1} tokens; expected {num_tokens}")
    values = [read_logprobs(row, ids, "requested", ids) for row in rows[1:]]
    return np.asarray(values, dtype=np.float32).reshape(num_tokens, len(ids))

"""Scores of given responses in a directory: ``manifest.json``, which says who scored and what, and safetensors shards.

A shard holds N responses of R_1, ..., R_N tokens, one after the other:

    keys            uint8 [N, 16]   the first bytes of a sha256 over the ids of prompt and response
    lengths         int64 [N]       R of each
    logprob         fp32 [sum R]    log-probability of every response token, in nats
    topk_ids        int32 [sum R, K], by (log-probability descending, id ascending)
    topk_logprobs   fp32 [sum R, K]
    entropy         fp32 [sum R]    where asked for

Shards are mapped into memory; only the rows of the responses that are asked for are read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.atomic_files import replacing, writing
from megatron_tropd.json_files import read_json_object, shown
from megatron_tropd.types import TeacherScores

VERSION = 1
MANIFEST = "manifest.json"
_KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Who scored, and what was stored."""

    teacher: str
    """Digest of the teacher's architecture and weights."""
    top_k: int
    vocab_size: int
    """Ids over which the probabilities sum to 1: the common vocabulary of teacher and student."""
    entropy: bool
    version: int = VERSION

    def write(self, directory: Path) -> None:
        """Write ``manifest.json``."""
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2) + "\n"
        with replacing(directory / MANIFEST) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Return the manifest of ``directory``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another version, or damaged.
        """
        found = read_json_object(directory / MANIFEST)
        types = {"teacher": str, "top_k": int, "vocab_size": int, "entropy": bool, "version": int}
        if found.get("version") != VERSION:
            raise ValueError(
                f"{directory / MANIFEST}: version {shown(found.get('version'))}, expected {VERSION}; score the "
                "responses again"
            )
        if {field.name for field in fields(cls)} != found.keys() or any(
            type(found[k]) is not t for k, t in types.items()
        ):
            raise ValueError(f"{directory / MANIFEST} is damaged: it holds {shown(found)}; score the responses again")
        return cls(**found)


def key_of(token_ids: Sequence[int], prompt_len: int) -> bytes:
    """Return what names a response: the same for the same tokens and the same place where the response begins."""
    numbers = torch.tensor([prompt_len, *token_ids], dtype=torch.int32).numpy()
    return hashlib.sha256(numbers.astype("<i4").tobytes()).digest()[:_KEY_BYTES]


def shard_path(directory: Path, number: int) -> Path:
    """Return the path of a shard."""
    return directory / f"scores-{number:05d}.safetensors"


def write_shard(path: Path, scored: Sequence[tuple[bytes, TeacherScores]]) -> None:
    """Write a shard of (key, scores of every response token)."""
    names = ["logprob", *(n for n in ("topk_ids", "topk_logprobs", "entropy") if getattr(scored[0][1], n) is not None)]
    tensors = {name: torch.cat([getattr(scores, name) for _, scores in scored]).contiguous() for name in names}
    tensors["keys"] = torch.frombuffer(bytearray(b"".join(key for key, _ in scored)), dtype=torch.uint8).view(-1, 16)
    tensors["lengths"] = torch.tensor([len(scores.logprob) for _, scores in scored])
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # of a disk its text has the number: "... (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def shard_keys(path: Path) -> list[bytes]:
    """Return the keys of a shard; [] where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    return list(_Shard(path).rows) if path.exists() else []


class _Shard:
    """A shard, mapped into memory."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
            keys, lengths = self._file.get_tensor("keys"), self._file.get_tensor("lengths").tolist()
            names: list[str] = self._file.keys()
            self._slices = {name: self._file.get_slice(name) for name in names if name not in ("keys", "lengths")}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and score the responses again") from error
        self.rows: dict[bytes, slice] = {}
        """Rows of every response, by key."""
        start = 0
        for key, length in zip(keys.numpy(), lengths, strict=True):
            self.rows[key.tobytes()] = slice(start, start + length)
            start += length

    def read(self, name: str, rows: slice) -> Tensor | None:
        """Return some rows of a tensor; None where the shard has no such tensor."""
        part = self._slices.get(name)
        return None if part is None else part[rows]


class ScoreFiles:
    """The scores of a directory.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a file is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        self._places: dict[bytes, tuple[_Shard, slice]] = {}
        for path in sorted(self.directory.glob("scores-*.safetensors")):
            shard = _Shard(path)
            self._places |= {key: (shard, rows) for key, rows in shard.rows.items()}

    def missing(self, keys: Iterable[bytes]) -> list[int]:
        """Return which of ``keys`` have no scores, by their number."""
        return [number for number, key in enumerate(keys) if key not in self._places]

    def scores(self, key: bytes, *, top_k: int, entropy: bool) -> TeacherScores | None:
        """Return the scores of all tokens of a response, with the first ``top_k`` of the stored top-k; None where the
        response was not scored."""
        if key not in self._places:
            return None
        shard, rows = self._places[key]
        logprob = shard.read("logprob", rows)
        assert logprob is not None
        ids, values = (shard.read(name, rows) if top_k else None for name in ("topk_ids", "topk_logprobs"))
        return TeacherScores(
            logprob=logprob,
            topk_ids=None if ids is None else ids[:, :top_k],
            topk_logprobs=None if values is None else values[:, :top_k],
            entropy=shard.read("entropy", rows) if entropy else None,
        )

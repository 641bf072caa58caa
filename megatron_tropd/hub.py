"""Names of models and data sets: a local path, or the name of a repository of the Hugging Face Hub.

A name of the Hub is ``owner/name`` or, at one branch, tag or commit, ``owner/name@revision``.  huggingface_hub finds it
in its cache or downloads it, and honours HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RepoType = Literal["model", "dataset"]

MODEL_CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "LICENSE", "LICENSE.txt",
    "LICENSE.md",
)  # fmt: skip
"""Files of a model repository without weights that this package reads or copies beside exported weights."""
MODEL_FILES = (*MODEL_CONFIG_FILES, "model.safetensors.index.json", "model*.safetensors")
"""Files of a model repository that are downloaded: never a pickle, never code."""
_REVISION = re.compile(r"(?!.*\.\.)[\w][\w.+/-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Where a model or data set is on this machine."""

    path: Path
    repo_id: str = ""
    """Name on the Hub; empty for a local path."""
    commit: str = ""
    """Commit hash on the Hub; empty for a local path."""

    @property
    def source(self) -> str:
        """The name that always gives these files, ``owner/name@commit``; empty for a local path."""
        return f"{self.repo_id}@{self.commit}" if self.repo_id else ""


def split_name(name: str) -> tuple[str, str] | None:
    """Return (repository, revision) if ``name`` can be one of the Hub, with "" for no revision; else None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, at, revision = name.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return None
    return None if at and not _REVISION.fullmatch(revision) else (repo_id, revision)


def is_hub_name(name: str) -> bool:
    """Return whether ``name`` is not a local path and can be a name of the Hub; nothing is looked up there."""
    return not os.path.lexists(name) and split_name(name) is not None


def resolve(name: str, *, repo_type: RepoType, allow_patterns: Sequence[str], flag: str) -> Resolved:
    """Return the local files of ``name``.  What exists locally wins; what cannot be a name of the Hub is a path too.

    The directory of a name may hold other files too, if someone downloaded more of the repository before.
    All ranks of a node may call this at one time: huggingface_hub locks every file that it downloads, so one of them
    downloads it and the others wait, and it moves complete files into place.

    Args:
        name: a local path, or ``owner/name`` or ``owner/name@revision``.
        repo_type: which kind of repository a name of the Hub is.
        allow_patterns: files to download, as shell patterns of paths inside the repository.
        flag: the flag that gave the name, for messages.

    Raises:
        ValueError: the Hub and its cache do not have it, or the download failed.
    """
    if not is_hub_name(name):
        return Resolved(path=Path(name))
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

    parts = split_name(name)
    assert parts is not None
    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()  # one rank of a node shows them
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                parts[0], repo_type=repo_type, revision=parts[1] or None, allow_patterns=list(allow_patterns)
            )
        )
    except Exception as error:
        # huggingface_hub raises its own errors and those of its HTTP and Xet libraries, which have no common base.
        raise ValueError(_not_found(name, repo_type, flag, error)) from error
    present = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    if not any(filter_repo_objects(present, allow_patterns=list(allow_patterns))):
        raise ValueError(
            f"{flag} {name}: the {repo_type} repository of the Hugging Face Hub has none of the files that are "
            f"needed: {', '.join(allow_patterns)}"
        )
    return Resolved(path=path, repo_id=parts[0], commit=path.name)


def _not_found(name: str, repo_type: RepoType, flag: str, error: Exception) -> str:
    """Return the message: what was given, what the Hub or its cache answered, and the state of offline mode."""
    from huggingface_hub import constants

    answer = " ".join(f"{type(error).__name__}: {error}".split())
    given = f"{flag} {name}: there is no such local path, and as a {repo_type} of the Hugging Face Hub it was not found"
    value = os.environ.get("HF_HUB_OFFLINE")
    state = f"HF_HUB_OFFLINE is {value}" if value is not None else "HF_HUB_OFFLINE is not set"
    if constants.is_offline_mode():
        if not value:
            state = "TRANSFORMERS_OFFLINE is set"
        return (
            f"{given} in the cache {constants.HF_HUB_CACHE} ({state}, so nothing is downloaded): {answer} "
            "Correct the path or name, or download it where there is a network"
        )
    return f"{given} at {constants.ENDPOINT} or in the cache {constants.HF_HUB_CACHE} ({state}): {answer}"

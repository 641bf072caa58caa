"""Which model a Hugging Face directory holds."""

from __future__ import annotations

from pathlib import Path

from megatron_tropd.file_digest import digest_files

_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def model_identity(directory: Path) -> str:
    """Return a digest over config, tokenizer, chat template and weights; other files and the place do not count.

    Raises:
        OSError: a file cannot be read.
    """
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix in (*_TEXT_SUFFIXES, *_WEIGHT_SUFFIXES)
        and not path.name.startswith((".", "LICENSE"))
    ]
    return digest_files(files)

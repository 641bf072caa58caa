"""Training checkpoints in Megatron's directory conventions, and their conversion.

    save.py, load.py   the two ways through; both are collective
    state.py           the state dicts that go in and come out
    directory.py       which iterations are there, and what they are
    metadata.py        checkpoint.json: architecture, size and digest of every file
    integrity.py       files held against those records
    safety.py          what a checkpoint may make a reader do: nothing but read numbers
    conversion/        between Hugging Face files and checkpoints, as streams

When a run saves is decided in ``training/checkpointing.py``.
"""

FRONT = {
    "directory": (
        "HF_FOLDER", "RELEASE", "find_checkpoint", "hf_directory", "latest_iteration", "model_dtype", "read_metadata",
        "stored_tensors",
    ),
    "load": ("load_checkpoint", "open_checkpoint"),
    "metadata": ("CheckpointError", "CheckpointMetadata", "FileRecord", "check_architecture"),
    "safety": ("COMMON_FILE",),
    "save": ("save_checkpoint", "write_checkpoint", "write_hf_folder"),
    "state": ("load_model_state",),
}  # fmt: skip

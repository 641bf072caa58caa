"""Training checkpoints in Megatron's directory conventions, and their conversion.

    save.py, load.py   write and read a checkpoint; both are collective
    state.py           state dicts: what is left out of a checkpoint, and loading one into a model
    directory.py       the checkpoints in a directory, and what each of them holds
    metadata.py        checkpoint.json: architecture, size and digest of every file
    integrity.py       compare the files with those sizes and digests
    safety.py          refuse checkpoints that would run code when they are read
    conversion/        convert between Hugging Face files and checkpoints, as streams

``training/checkpointing.py`` decides when a run saves.
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

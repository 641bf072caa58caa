"""Training checkpoints in Megatron's directory conventions, and their conversion.

    save.py, load.py   write and read a checkpoint; both are collective
    async_save.py      write one while training goes on
    elsewhere.py       save on another disk what its own could not take
    retention.py       which checkpoints are kept; removes the others
    fallback.py        the newest checkpoint that is whole
    state.py           state dicts: what is left out of a checkpoint, and loading one into a model
    directory.py       the checkpoints in a directory, and what each of them holds
    run_record.py      run.json: settings of the run, digests of its prompts and models
    known_logprobs.py  known_logprobs.json: what transformers' model gives a few sequences
    metadata.py        checkpoint.json: architecture, size and digest of every file
    integrity.py       compare the files with those sizes and digests
    safety.py          refuse checkpoints that would run code or fill the memory when they are read
    structure.py       what .metadata has to look like
    conversion/        convert between Hugging Face files and checkpoints, as streams

``training/checkpointing.py`` decides when a run saves.
"""

FRONT = {
    "async_save": ("AsyncSaver",),
    "directory": (
        "HF_FOLDER", "RELEASE", "find_checkpoint", "hf_directory", "is_being_replaced", "iterations",
        "latest_iteration", "model_dtype", "read_metadata", "restore_replaced", "stored_tensors",
    ),
    "elsewhere": ("SavedElsewhere", "is_ahead", "save_elsewhere"),
    "fallback": ("newest_step", "newest_whole", "set_aside", "with_advice"),
    "known_logprobs": ("KNOWN_LOGPROBS_JSON", "KnownLogprobs", "read_known_logprobs"),
    "load": ("load_checkpoint", "open_checkpoint"),
    "metadata": (
        "CheckpointError", "CheckpointMetadata", "FileRecord", "METADATA_JSON", "check_architecture", "record_file",
    ),
    "retention": ("Retention", "remove_superseded"),
    "run_record": ("ModelRecord", "RUN_JSON", "RunRecord", "read_run_record"),
    "safety": ("COMMON_FILE",),
    "save": ("add_text", "save_checkpoint", "write_checkpoint", "write_hf_folder"),
    "state": ("load_model_state",),
}  # fmt: skip

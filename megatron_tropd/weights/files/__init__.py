"""Weights in files: Hugging Face safetensors, and Megatron's torch_dist.

    hf_checkpoint.py   an opened Hugging Face directory: headers checked, ranges read on demand
    identity.py        which model a directory holds
    load.py            fills a live module from such a directory
    hf_writer.py       writes the weight files of one, from a manifest of how they looked (hf_manifest.py)
    torch_dist.py      reads and writes torch_dist checkpoints chunk by chunk, without holding a model

``safetensors_header.py``, ``other_tensors.py`` (names of tensors that are no weights of the decoder),
``torch_dist_chunk.py``, ``saved_objects.py`` (what a file of torch.save holds), ``plain_pickle.py`` (pickles of plain
data, within limits) and ``byte_ranges.py`` are the parts that those are built from.  The package ``checkpoints`` has
the rest of a training checkpoint: directories, digests and metadata.
"""

FRONT = {
    "byte_ranges": ("Scratch", "tensor_bytes"),
    "hf_checkpoint": ("HfCheckpoint", "copy_sidecars", "read_headers"),
    "hf_manifest": ("MANIFEST_FILE", "HfManifest"),
    "hf_writer": ("HfWriter", "fsync_path", "remove_other_weights", "replace_text", "write_hf_files"),
    "identity": ("model_identity",),
    "load": ("load_hf_into",),
    "other_tensors": ("IGNORE_FLAG", "listed"),
    "plain_pickle": ("PickleFault", "load_plain"),
    "saved_objects": ("read_saved",),
    "torch_dist": ("ChunkFile", "TorchDistReader", "WrittenFile", "make_metadata", "write_metadata"),
}

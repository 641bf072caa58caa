"""Which part of which Hugging Face tensor is held where.  Integers only, except for ``parameters.py``.

A model's weights are described in the coordinates of its Hugging Face tensors.  A *box* (``box.py``) is a rectangle of
one such tensor and its place in a parameter of one rank.  Three modules compute boxes:

    megatron_boxes.py     those of a Megatron rank, for every TP x PP x DP x EP layout
    engine_boxes.py       those of a tensor-parallel rank of an SGLang engine
    checkpoint_boxes.py   those of a torch_dist checkpoint, which has no layout

``hf_shapes.py`` gives the Hugging Face names and shapes; ``parameters.py`` pairs the parameters of a live module with
their boxes.  To add a model family, extend ``models/architecture.py`` and ``hf_shapes.py``; to add an engine, write a
module beside ``engine_boxes.py``.
"""

FRONT = {
    "box": ("Box", "ParamBoxes"),
    "checkpoint_boxes": ("StoredParam", "by_hf_tensor", "stored_params"),
    "engine_boxes": ("EngineLayout", "engine_boxes", "parameter_names"),
    "hf_shapes": ("EMBED_TOKENS", "LM_HEAD", "Index", "hf_shapes"),
    "megatron_boxes": ("OwnedBox", "owners", "rank_boxes"),
    "parameters": ("local_parameters", "match_parameters"),
}

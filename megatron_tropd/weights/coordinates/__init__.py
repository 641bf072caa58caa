"""Which part of which Hugging Face tensor is where.  Integers only, but for ``parameters.py``.

A model's weights are described in the coordinates of its Hugging Face tensors.  A *box* (``box.py``) is a rectangle of
one such tensor and its place in a parameter of one rank.  Three modules say which boxes there are:

    megatron_boxes.py     on a rank of Megatron, for every TP x PP x DP x EP layout
    engine_boxes.py       on a tensor-parallel rank of an SGLang engine
    checkpoint_boxes.py   in a torch_dist checkpoint, which has no layout

``hf_shapes.py`` knows the Hugging Face names and shapes, ``parameters.py`` pairs a live module with its boxes.  A new
model family is taught to ``models/architecture.py`` and ``hf_shapes.py``; a new engine gets a module beside
``engine_boxes.py``.
"""

FRONT = {
    "box": ("Box", "ParamBoxes"),
    "checkpoint_boxes": ("StoredParam", "by_hf_tensor", "stored_params"),
    "engine_boxes": ("EngineLayout", "engine_boxes", "parameter_names"),
    "hf_shapes": ("EMBED_TOKENS", "LM_HEAD", "Index", "hf_shapes"),
    "megatron_boxes": ("OwnedBox", "owners", "rank_boxes"),
    "parameters": ("local_parameters", "match_parameters"),
}

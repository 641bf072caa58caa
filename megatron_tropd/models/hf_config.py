"""Read an architecture from the ``config.json`` of an HF checkpoint, through transformers' own configuration classes.

The classes know the defaults of missing keys and the older names of keys, so a config means here what it means to
transformers, or is refused.  No code of the checkpoint is run, and nothing is fetched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.json_files import culprit, read_json_object, shown
from megatron_tropd.models.architecture import FAMILIES, Architecture, UnsupportedArchitecture, Window
from megatron_tropd.models.hf_fields import FIELDS, check, check_field, check_fields
from megatron_tropd.models.hf_rope import rope_fields, rope_kind

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
DEQUANTIZE = (
    "quantized weights cannot be read; use the unquantized checkpoint that it was made from, or dequantize it with "
    "transformers (FP8: FineGrainedFP8Config(dequantize=True); bitsandbytes: model.dequantize()) and save_pretrained"
)
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


def load_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of an HF checkpoint directory.

    Raises:
        FileNotFoundError, ValueError: with the path, when it is missing, not a JSON object, or beside a LoRA adapter.
    """
    path = Path(directory) / CONFIG_FILE
    if (adapter := Path(directory) / ADAPTER_FILE).exists():
        raise ValueError(
            f"{adapter} is the config of a LoRA adapter, which is not applied here; merge it into its base model "
            "(peft: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(DIR)) and give that directory, "
            f"or delete {ADAPTER_FILE} if the adapter is not wanted"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an HF checkpoint directory needs a config.json")
    return read_json_object(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What config.json says of a model of any family, also of one that only servers can run."""

    model_type: str
    max_positions: int
    """Longest sequence, in tokens."""
    vocab_size: int

    @classmethod
    def of_config(cls, config: Mapping[str, Any], source: str) -> ModelShape:
        """Read it from config.json, or from the text model in it; a missing key has transformers' default.

        Raises:
            ValueError: a key is missing and transformers has no default for it, or it is not a whole number; the
                message names ``source``.
        """
        text = config.get("text_config")
        keys = {**config, **(text if isinstance(text, dict) else {})}
        names = ("max_position_embeddings", "vocab_size")
        if missing := [name for name in names if keys.get(name) is None]:
            keys |= _defaults(keys.get("model_type"), missing)
        found: dict[str, Any] = {"model_type": config.get("model_type"), **{name: keys.get(name) for name in names}}
        for name, value in found.items():
            if value is None:
                lacking = " or no ".join(names) if name in names else name
                raise ValueError(f"{source}: config.json names no {lacking}")
            if not FIELDS[name].fits(value):
                raise ValueError(f"{source} has {name} {shown(value)}; expected {FIELDS[name].expected}")
        return cls(model_type=found["model_type"], max_positions=found[names[0]], vocab_size=found[names[1]])


def _defaults(model_type: object, names: Sequence[str]) -> dict[str, Any]:
    """Return transformers' values for missing keys of a family's config, as far as it knows the family."""
    from transformers import CONFIG_MAPPING  # see _transformers_config

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    text = CONFIG_MAPPING[model_type]().get_text_config()
    return {name: getattr(text, name, None) for name in names}


def load_architecture(directory: str | Path) -> Architecture:
    """Return the architecture that the ``config.json`` of an HF checkpoint directory describes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no usable config; the message names the file and the key.
    """
    return architecture_from_hf_config(load_hf_config(directory), source=str(Path(directory) / CONFIG_FILE))


def architecture_from_hf_config(config: Mapping[str, Any], *, source: str = CONFIG_FILE) -> Architecture:
    """Return the architecture that an HF config mapping describes.

    Args:
        config: The content of a ``config.json``.
        source: Its path, for messages.

    Raises:
        UnsupportedArchitecture: unknown ``model_type``, a value that transformers refuses, or one that would change
            the network into one that this package does not build.
    """
    try:
        return _architecture(config)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{source} {error}") from error.__cause__


def _architecture(config: Mapping[str, Any]) -> Architecture:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedArchitecture(f"has model_type {shown(name)}; supported are {', '.join(sorted(FAMILIES))}")
    _refuse_quantized(config)
    check_fields(config)
    hf = _transformers_config(config)
    _check_one_rope(config)
    _check_switches(hf, name, config)
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    groups = _size(hf, "num_key_value_heads")
    check(heads % groups == 0, "num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
    head_dim = _size(hf, "head_dim") if hasattr(hf, "head_dim") else hidden // heads
    check(head_dim > 0 and head_dim % 2 == 0, "head_dim", head_dim, "a positive even number (hidden_size / heads)")
    epsilon = hf.rms_norm_eps
    check(isinstance(epsilon, float) and 0 <= epsilon < 1, "rms_norm_eps", epsilon, "a number from 0 to 1")
    tied = hf.tie_word_embeddings
    check(isinstance(tied, bool), "tie_word_embeddings", tied, "true or false")
    return Architecture(
        family=name,
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden,
        ffn_hidden_size=_size(hf, "intermediate_size"),
        num_layers=_size(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        norm_epsilon=epsilon,
        max_position_embeddings=_size(hf, "max_position_embeddings"),
        tie_word_embeddings=tied,
        attention_window=_attention_window(hf, FAMILIES[name].window),
        **rope_fields(hf),
        **(_experts(hf, config) if FAMILIES[name].sparse else {}),
    )


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if (value := config.get(key)) is None:
            continue
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        raise UnsupportedArchitecture(
            f"has {key} (quant_method {shown(method)}), but {DEQUANTIZE}.  If the weights in this directory are not "
            f"quantized, delete {key} from config.json"
        )


def _transformers_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' configuration object of ``config``, as its models read it.

    Raises:
        UnsupportedArchitecture: transformers refuses it; the message names the key.
    """
    from transformers import CONFIG_MAPPING  # importing transformers takes seconds, and plans of weights need no config

    kind = CONFIG_MAPPING[config["model_type"]]

    def build(values: Mapping[str, Any]) -> Any:
        # The value would take the place of a method, or of the table of names that attribute access itself uses.
        if shadowed := [key for key in values if key == "attribute_map" or callable(getattr(kind, key, None))]:
            raise TypeError(f"{shadowed[0]} is a part of {kind.__name__}")
        hf = kind(**copy.deepcopy(dict(values)))
        if hasattr(hf, "standardize_rope_params"):  # transformers 5: models call it again when they compute RoPE
            hf.standardize_rope_params()
        hf.to_dict()  # from_pretrained logs it, and fails where it fails
        return hf

    def accepted(values: Mapping[str, Any]) -> bool:
        try:
            build(values)
        except Exception:  # as below
            return False
        return True

    try:
        return build(config)
    except Exception as error:  # of any type: its validators, and whatever its code does to a value of another type
        reason = " ".join(str(error).split()) or type(error).__name__
        key = culprit({name: value for name, value in config.items() if name != "model_type"}, accepted)
        what = f"has {key} {shown(config[key])}, which transformers refuses" if key else "is refused by transformers"
        raise UnsupportedArchitecture(f"{what}: {reason[:300]}") from error


def _check_one_rope(config: Mapping[str, Any]) -> None:
    """Refuse ``rope_scaling`` beside a ``rope_parameters`` that means something else.

    transformers 4 wrote the first, transformers 5 writes the second.  Given both, transformers 5 uses the first and
    drops the second with the ``rope_theta`` in it.
    """
    if not all(config.get(key) for key in _ROPE_KEYS):
        return
    scaling, parameters = (
        _transformers_config({key: value for key, value in config.items() if key != dropped})
        for dropped in reversed(_ROPE_KEYS)
    )
    if (rope_kind(scaling), rope_fields(scaling)) != (rope_kind(parameters), rope_fields(parameters)):
        raise UnsupportedArchitecture(
            f"has rope_scaling {shown(config['rope_scaling'])} beside rope_parameters "
            f"{shown(config['rope_parameters'])}, and they mean different things; delete the one that is wrong (a "
            "rope_scaling that stays needs rope_theta in it or beside it)"
        )


def _check_switches(hf: Any, family: str, config: Mapping[str, Any]) -> None:
    """Refuse values that would change the network."""
    if config.get("per_layer_config") is not None:
        raise UnsupportedArchitecture("has per_layer_config: layers that differ from each other are not supported")
    activation = getattr(hf, "hidden_act", None)
    check(activation in ("silu", "swish"), "hidden_act", activation, "'silu', the only one that is supported")
    for key, wanted in {"is_causal": True, **FAMILIES[family].allowed_flags}.items():
        value = getattr(hf, key, wanted)
        good = value == wanted and isinstance(value, type(wanted))
        check(good, key, value, f"{wanted!r}, with which alone {family} is supported")


def _size(hf: Any, key: str) -> int:
    """Return a positive integer of a config."""
    value: Any = getattr(hf, key, None)
    check_field(key, value)
    return value


def _attention_window(hf: Any, window: Window) -> int | None:
    """Return ``sliding_window`` if any layer of the model has it."""
    if window is Window.NONE:
        return None
    if window is Window.BY_LAYER_TYPE:
        types = set(hf.layer_types)
        if unknown := sorted(types - {"full_attention", "sliding_attention"}):
            raise UnsupportedArchitecture(f"has {unknown[0]} in layer_types, which is not supported")
        if "sliding_attention" not in types:
            return None
        check(hf.sliding_window is not None, "sliding_attention in layer_types, but sliding_window", None,
              "a number (and use_sliding_window true)")  # fmt: skip
    elif hf.sliding_window is None:
        return None
    return _size(hf, "sliding_window")


def _experts(hf: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a sparse model.  ``num_local_experts`` is the newer name of ``num_experts``."""
    both = [config.get(key) for key in ("num_experts", "num_local_experts")]
    if None not in both and both[0] != both[1]:
        raise UnsupportedArchitecture(f"has num_experts {both[0]} beside num_local_experts {both[1]}; delete one")
    experts, chosen = _size(hf, "num_experts"), _size(hf, "num_experts_per_tok")
    check(chosen <= experts, "num_experts_per_tok", chosen, f"at most num_experts {experts}")
    normalised = hf.norm_topk_prob
    check(isinstance(normalised, bool), "norm_topk_prob", normalised, "true or false")
    return {
        "num_experts": experts,
        "moe_intermediate_size": _size(hf, "moe_intermediate_size"),
        "num_experts_per_tok": chosen,
        "norm_topk_prob": normalised,
    }

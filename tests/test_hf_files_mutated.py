"""Config and tokenizer files with mistakes: what is read means what it means to transformers, or is refused by name.

The mistakes are made by hypothesis, the same in every run.  Nothing else than ValueError and FileNotFoundError may come
out, and a message names the file and, where a key is to blame, one of the keys that were changed.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_tropd.data.tokenizer import eos_token_ids, load_tokenizer
from megatron_tropd.models.architecture import FAMILIES
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.models.rope import inverse_frequencies
from megatron_tropd.teacher.preflight import PreflightError, check_same_tokens
from tests.hf_models import save_tokenizer
from tests.test_hf_config import EXPERTS, LLAMA3, SIZES, YARN

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
COUNTS = {"config": 1500, "text": 250, "stop tokens": 600, "tokenizer": 300, "preflight": 150}
VALUES = [
    None, True, False, 0, 1, 2, 3, 8, -1, 64, 10**30, 0.0, 0.5, 1.0, 2.5, -1.5, 1e30, math.inf, -math.inf, math.nan, "",
    "x", "2", "silu", "gelu", "default", "yarn", "linear", "</s>", "w3", [], [1], ["x"], [[]], [None], {}, {"x": 1},
    {"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 3}, {**YARN},
    {**YARN, "attention_factor": 0.9}, {**LLAMA3, "original_max_position_embeddings": 32}, {"content": "</s>"},
    ["full_attention"] * 3, ["sliding_attention", "full_attention", "full_attention"], {"full_attention": {**YARN}},
]  # fmt: skip
OTHER_KEYS = [
    "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "attention_bias", "mlp_bias", "dtype",
    "quantization_config", "torch_dtype", "eos_token_id", "per_layer_config", "num_local_experts", "is_causal", "to_dict",
    "id2label", "num_labels", "attribute_map", "initializer_range", "decoder_sparse_step", "mlp_only_layers", "self",
    "text_config", "pad_token_id", "attention_dropout", "transformers_version", "keys_to_ignore_at_inference",
]  # fmt: skip
DROP = "drop this key"


def _many(kind):
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=COUNTS[kind], deadline=None, derandomize=True, database=None,
                    phases=[Phase.generate], suppress_health_check=slow)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    """transformers warns of every odd value."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _changed(base, changes):
    """``base`` with (path, value) changes; a path that is not there any more is left out."""
    content = copy.deepcopy(base)
    for path, value in changes:
        place = content
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(path[-1], None)
            if value is not DROP:
                place[path[-1]] = copy.deepcopy(value)
    return content


def _changes(base, more=(), most=3):
    """Lists of changes to a nested mapping: keys that it has, at any depth, and ``more`` keys at the top."""
    paths = [(key,) for key in (*base, *more)]
    paths += [(key, inner) for key, value in base.items() if isinstance(value, dict) for inner in value]
    return st.lists(st.tuples(st.sampled_from(paths), st.sampled_from([*VALUES, DROP])), min_size=1, max_size=most)


ROPES = [{}, {"rope_theta": 5e5}, {"rope_scaling": YARN}, {"rope_parameters": {**YARN, "rope_theta": 1e6, "mscale": 1.2}},
         {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}},
         {"rope_scaling": {"type": "linear", "factor": 2.0}}]  # fmt: skip
BASES = [
    {"model_type": family, **SIZES, **(EXPERTS if family == "qwen3_moe" else {}), **rope}
    for family in FAMILIES for rope in ROPES
]  # fmt: skip
CONFIGS = st.sampled_from(BASES).flatmap(lambda base: st.tuples(st.just(base), _changes(base, OTHER_KEYS)))


def _write(directory, name, content):
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def _assert_same_meaning(arch, directory, config):
    """Every number against transformers' own object, which is made from the same file."""
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = CONFIG_MAPPING[config["model_type"]].from_pretrained(directory)
    names = {"ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers", "norm_epsilon": "rms_norm_eps",
             "num_query_groups": "num_key_value_heads"}  # fmt: skip
    plain = ["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "tie_word_embeddings"]
    moe = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"] if arch.num_experts else []
    for ours, theirs in [*names.items(), *((name, name) for name in plain + moe)]:
        assert getattr(arch, ours) == getattr(hf, theirs), ours
    assert arch.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert hf.hidden_act in ("silu", "swish") and not getattr(hf, "quantization_config", None)
    windowed = {"mistral": True, "qwen3_moe": True}.get(
        arch.family, "sliding_attention" in (getattr(hf, "layer_types", None) or ())
    )
    window = getattr(hf, "sliding_window", None) if windowed and arch.family != "llama" else None
    assert arch.attention_window == window
    own = 1.0 / (arch.rope_theta ** (torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim))
    kind, factor = hf.rope_parameters["rope_type"], 1.0
    wanted = 1.0 / (hf.rope_parameters["rope_theta"] ** (torch.arange(0, arch.head_dim, 2).float() / arch.head_dim))
    if kind != "default":
        wanted, factor = ROPE_INIT_FUNCTIONS[kind](hf)
    assert torch.allclose(inverse_frequencies(own, arch), wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(arch.rope_yarn.attention_factor if arch.rope_yarn else 1.0)


@_many("config")
@given(CONFIGS)
def test_config(tmp_path_factory, case):
    base, changes = case
    directory = tmp_path_factory.getbasetemp() / "config"
    directory.mkdir(exist_ok=True)
    config = _changed(base, changes)
    _write(directory, "config.json", config)
    try:
        arch = load_architecture(directory)
    except ValueError as error:
        assert str(error).startswith(str(directory / "config.json"))
        named = {key for path, _ in changes for key in path}
        if any(value is DROP for _, value in changes):  # a default clashes with another key
            named |= config.keys()
        text = str(error)  # transformers speaks of "attention heads"
        assert any(key in text or key.removeprefix("num_").replace("_", " ") in text for key in named), (text, changes)
        return
    _assert_same_meaning(arch, directory, config)


GOOD = json.dumps(BASES[0]).encode()
TEXTS = st.one_of(
    st.integers(0, len(GOOD)).map(lambda end: GOOD[:end]),
    st.binary(max_size=20),
    st.tuples(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=3)).map(lambda x: GOOD[: x[0]] + x[1] + GOOD[x[0] :]),
    st.sampled_from([b"", b" ", b"\xef\xbb\xbf" + GOOD, GOOD.decode().encode("utf-16"), b"[" + GOOD + b"]", b"[" * 10**5,
                     b'{"a":' * 10**5, b"null", b"1", b'"x"', b"NaN", b'{"hidden_size": ' + b"9" * 5000 + b"}", GOOD + GOOD,
                     GOOD[:-1] + b', "hidden_size": 48}', GOOD[:-1] + b', "hidden_size": -48}', GOOD[:-1] + b",}"]),
    st.tuples(st.sampled_from(sorted(SIZES)), st.sampled_from([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1E2"])).map(
        lambda x: GOOD[:-1] + b', "' + x[0].encode() + b'": ' + x[1] + b"}"),
)  # fmt: skip


@_many("text")
@given(TEXTS)
def test_text_of_config(tmp_path_factory, text):
    """Not JSON, not UTF-8, a byte order mark, keys given twice, numbers that JSON does not have."""
    directory = tmp_path_factory.getbasetemp() / "text"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(text)
    try:
        arch = load_architecture(directory)
    except ValueError as error:
        assert str(error).startswith(str(directory / "config.json"))
        return
    _assert_same_meaning(arch, directory, json.loads(text))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, 40)
    _write(directory, "config.json", {"model_type": "llama", **SIZES, "eos_token_id": 2})
    _write(directory, "generation_config.json", {"eos_token_id": [2, 5], "temperature": 0.7})
    return directory


IDS = st.sampled_from([*VALUES, [2], [2, 5], [5, 2, 5], [2, -1], [2, True], 39, DROP])


@_many("stop tokens")
@given(st.tuples(IDS, IDS, st.booleans()))
def test_stop_tokens(tmp_path_factory, tokenizer_dir, case):
    from transformers import GenerationConfig

    in_generation, in_config, other_keys = case
    directory = tmp_path_factory.getbasetemp() / "stop"
    directory.mkdir(exist_ok=True)
    for name, value in (("generation_config.json", in_generation), ("config.json", in_config)):
        content = {"temperature": "hot"} if other_keys else {}
        _write(directory, name, content if value is DROP else {**content, "eos_token_id": value})
    tokenizer = load_tokenizer(tokenizer_dir)
    try:
        found = eos_token_ids(directory, tokenizer)
    except ValueError as error:
        assert f"{directory}/" in str(error) and "eos_token_id" in str(error)
        return
    if not other_keys:
        assert_in_order = GenerationConfig.from_pretrained(directory).eos_token_id
        wanted = [assert_in_order] if isinstance(assert_in_order, int) else assert_in_order or []
        assert list(found[: len(dict.fromkeys(wanted))]) == list(dict.fromkeys(wanted))
    assert tokenizer.eos_token_id in found and all(type(i) is int and i >= 0 for i in found)


TOKENIZER_KEYS = ["add_bos_token", "added_tokens_decoder", "chat_template", "extra_special_tokens", "auto_map",
                  "additional_special_tokens", "padding_side", "truncation_side", "model_input_names", "get_vocab", "self",
                  "tokenizer_file", "name_or_path", "eos_token_id", "vocab", "legacy"]  # fmt: skip


def _mutate_tokenizer(data, source, target):
    """Copy a tokenizer with mistakes in one of its files; the file's name."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["tokenizer_config.json", "tokenizer.json", "config.json"]))
    content = json.loads((source / name).read_text())
    more = TOKENIZER_KEYS if name == "tokenizer_config.json" else []
    _write(target, name, _changed(content, data.draw(_changes(content, more, most=2))))
    return name


@_many("tokenizer")
@given(st.data())
def test_tokenizer(tmp_path_factory, tokenizer_dir, data):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.getbasetemp() / "mutated"
    _mutate_tokenizer(data, tokenizer_dir, directory)
    try:
        tokenizer = load_tokenizer(directory)
    except (ValueError, FileNotFoundError) as error:
        assert f"{directory}/" in str(error)
        return
    wanted = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.get_vocab() == wanted.get_vocab() and tokenizer.eos_token_id == wanted.eos_token_id
    assert tokenizer.encode("") == wanted.encode("")


@_many("preflight")
@given(st.data())
def test_preflight(tmp_path_factory, tokenizer_dir, data):
    """Against a student whose files are good."""
    directory = tmp_path_factory.getbasetemp() / "teacher"
    _mutate_tokenizer(data, tokenizer_dir, directory)
    try:
        report = check_same_tokens(tokenizer_dir, directory)
    except PreflightError as error:
        assert str(directory) in str(error) and "--teacher-hf-checkpoint" in str(error)
        return
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    assert (report.num_tokens, report.teacher_vocab_size, report.common_vocab_size) == (40, rows, min(40, rows))
    assert all(0 <= i < report.common_vocab_size for i in report.stop_ids)


def test_there_are_many_mistakes():
    assert sum(COUNTS.values()) >= 2500

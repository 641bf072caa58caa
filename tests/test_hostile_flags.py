"""Command lines and YAML files from anywhere, through every check that comes before a process group.  See tests/hostile.py."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.parallel.megatron_flags import megatron_fields
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.weights.files.hf_manifest import HfManifest
from tests.hf_models import SIZES, save_tokenizer
from tests.hostile import Mutator, Trial
from tests.test_cli_properties import KINDS, NUMBERS

EXTREME = [
    "0", "1", "-1", "2", "1e308", "-1e308", "1e-320", "9" * 18, "9" * 19, "-" + "9" * 18, "9" * 400, "9" * 5000, "1e400", "0x10", "nan", "inf",
    "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "0.5", "1.5", "true", "false", "", "a\0b", "\ud800", "x" * 5000,
    "*", "[]", "()", "(", "a/b", "..", "a@b", "a/b@c", "::", "http://[::1", "http://h:99999", "::train", "x.jsonl::train", "\u0663", "{}", "--",
    "{", "1000000000", "999999999", "1000000", "a b", "~", "/", "\u202e", "3",
]  # fmt: skip
NAMES = list(KINDS)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Flags of a run that could start: a model without numbers in its weights, a tokenizer, and prompts."""
    root = tmp_path_factory.mktemp("world")
    config = {"model_type": "qwen3", **SIZES, "num_hidden_layers": 2, "head_dim": 8, "tie_word_embeddings": True}
    save_tokenizer(root / "model", 131)
    (root / "model" / "config.json").write_text(json.dumps(config))
    for name, header in HfManifest.default(architecture_from_hf_config(config), torch.float32).headers.items():
        (root / "model" / name).write_bytes(header.prefix + bytes(header.data_bytes))
    (root / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{3 + n} w9", "response": "w4"}) + "\n" for n in range(8))
    )
    return {
        "hf-checkpoint": [str(root / "model")], "teacher-hf-checkpoint": [str(root / "model")], "run-dir": [str(root / "run")],
        "prompt-data": [str(root / "p.jsonl")], "max-prompt-length": ["8"], "max-response-length": ["8"], "top-k": ["5"],
        "rollout-batch-size": ["4"], "max-tokens-per-microbatch": ["64"], "train-iters": ["3"],
        "data-cache-path": [str(root / "cache")],
    }  # fmt: skip


def _changes(draw):
    """Flags with odd values, most of them numbers."""
    names = {"ours": NAMES, "numbers": NUMBERS, "megatron": list(megatron_fields())}[
        draw.choice(["ours", "numbers", "megatron"])
    ]
    return {
        draw.choice(names): [draw.choice(EXTREME) for _ in range(draw.choice([1] * 8 + [0, 2]))]
        for _ in range(draw.choice([1, 1, 2, 4]))
    }


def _argv(flags, draw):
    argv = []
    for name, words in flags.items():
        argv += [f"--{name}={words[0]}"] if len(words) == 1 and draw.random() < 0.3 else [f"--{name}", *words]
    return argv


def test_a_run_could_start(given):
    draw = Mutator("no changes").draw
    make_run_spec(parse(_argv(given, draw)), 1)


@pytest.mark.parametrize(("whole", "count"), [(True, 200), (False, 900)])
def test_command_lines(given, whole, count, monkeypatch):
    """With a model and prompts, and without, where all that is wrong with the numbers is found at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw = Mutator(f"command lines {whole}").draw
    with Trial(ConfigError) as trial:
        for _ in range(count):
            argv = _argv({**(given if whole else {}), **_changes(draw)}, draw)
            trial.give(lambda argv=argv: make_run_spec(parse(argv), 1), argv)
    trial.check(count, accepted=0.02 if whole else 0)


def test_yaml_files(given, tmp_path):
    """--config and --teacher-config with values of any shape: both are YAML, of which JSON is a part."""
    path, make = tmp_path / "run.yaml", Mutator("yaml", deep=False)  # PyYAML takes a second for each that is deep
    good = {name: words if len(words) > 1 else words[0] for name, words in given.items()}
    good |= {"sglang-x": ["1", "2"], "bf16": True, "lr": 1e-3, "prompt-data": given["prompt-data"]}
    teacher = {
        "teacher-hf-checkpoint": given["hf-checkpoint"][0],
        "domains": ["a"],
        "weight": 0.5,
        "teacher-sglang-y": "z",
    }
    with Trial(ConfigError) as trial:
        for number in range(400):
            raw = make.json(teacher if number % 3 == 0 else good)
            if make.draw.random() < 0.15:
                raw = raw.replace(b'"', b"") + make.draw.choice(
                    [b"", b"\n---\n", b"\n<<: *x", b" !!python/object:os.system x", b"&a [*a]"]
                )
            path.write_bytes(raw)
            trial.give(
                lambda flag=("--teacher-config" if number % 3 == 0 else "--config"): parse([flag, str(path)]), raw
            )
    trial.check(400)

"""Make the small world of the quickstart: a teacher, a weaker student and their prompts, in a minute or two of CPU.

    python tools/make_small_world.py --save runs/small_world

writes ``teacher/`` and ``student/`` (Hugging Face Qwen3 checkpoints with tokenizer), ``train.jsonl`` (prompt, the
teacher's sampled response, answer), ``eval.jsonl`` (held-out prompts) and ``world.json`` (how it was made and how
good teacher and student are).  The same seed makes the same world on the same machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_tropd.flag_parser import FlagParser

os.environ.setdefault("OMP_NUM_THREADS", "1")

from small_world.build import WorldSpec, make_world


def main() -> None:
    """Read the command line and make the world."""
    spec = parse_arguments()
    print(f"making a small world in {spec.save} (seed {spec.seed}): teacher and student train side by side")
    try:
        world = make_world(spec)
    except OSError as error:
        sys.exit(f"make_small_world: --save {spec.save} cannot be written: {error}")
    for name in ("teacher", "student"):
        scores = "  ".join(f"{decoding} {value:.1%}" for decoding, value in world[name]["accuracy"].items())
        print(f"{name}  {world[name]['steps']} steps, {world[name]['num_parameters']} parameters: {scores}")
    print(f"wrote {spec.save}/teacher, student, train.jsonl, eval.jsonl, world.json in {world['seconds']:.0f} s")


def parse_arguments() -> WorldSpec:
    """The command line as a :class:`WorldSpec`."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train-prompts", type=int, default=1600)
    parser.add_argument("--num-eval-prompts", type=int, default=512)
    arguments = parser.parse_args()
    if arguments.num_train_prompts < 1 or arguments.num_eval_prompts < 1:
        parser.error("--num-train-prompts and --num-eval-prompts must be at least 1")
    return WorldSpec(
        save=arguments.save,
        seed=arguments.seed,
        num_train_prompts=arguments.num_train_prompts,
        num_eval_prompts=arguments.num_eval_prompts,
    )


if __name__ == "__main__":
    main()

"""What the server of tests/warm.py imports before it forks: modules that a rank of a job takes seconds to import."""

import gc
import importlib

from megatron_tropd.parallel import platform

platform.install()

for _name in (
    "checkpoint_convert.hf_to_megatron",
    "checkpoint_convert.megatron_to_hf",
    "matplotlib.pyplot",
    "megatron_tropd.evaluate",
    "megatron_tropd.setup.assemble",
    "megatron_tropd.training.finish",
    "pandas",
    "tests.hf_models",
    "torch.distributed.run",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # a collection in a forked process would look at, and so copy, all that was imported: 0.3 s

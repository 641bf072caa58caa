"""What the server imports before it forks the processes of the study; see ``jobs``."""

import gc
import importlib

from megatron_tropd.parallel import platform

platform.install()  # before the first import of Megatron

for _name in (
    "matplotlib.pyplot",
    "megatron_tropd.setup.assemble",
    "megatron_tropd.train",
    "megatron_tropd.training.finish",
    "tools.study.worlds",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # a collection in a forked process would look at, and so copy, all that was imported

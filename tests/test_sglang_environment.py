"""SGLang's environment without a GPU: the stand-ins can be imported everywhere and are loud when called."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from tests.sglang_helpers import PYTHON, needs_sglang

pytestmark = pytest.mark.slow

_SCRIPT = """
import json
import sgl_kernel, torch, torchvision, triton
import triton.language as tl
from torchvision.transforms import InterpolationMode
from triton.runtime.jit import JITFunction

@triton.autotune(configs=[triton.Config({"B": 1}, num_warps=2)], key=["n"])
@triton.jit
def kernel(pointer, n: tl.constexpr):
    pass

def refusal(work):
    try:
        work()
    except NotImplementedError as error:
        return str(error).split(" was called")[0]
    return "NOT REFUSED"

print(json.dumps({
    "refused": [
        refusal(lambda: kernel[(1,)](0, 1)), refusal(lambda: kernel(0)), refusal(lambda: tl.load(0)),
        refusal(lambda: triton.testing.do_bench(lambda: None)), refusal(JITFunction),
        refusal(lambda: torchvision.transforms.functional.resize(0)), refusal(lambda: sgl_kernel.silu_and_mul(0)),
    ],
    "sizes": [triton.cdiv(7, 3), triton.next_power_of_2(5), triton.next_power_of_2(8)],
    "inert": not isinstance(kernel, JITFunction) and str(InterpolationMode.BICUBIC),
    "torch": torch.__version__.split("+")[0],
}))
"""


@needs_sglang
def test_the_stand_ins_refuse_every_call():
    result = subprocess.run([str(PYTHON), "-c", _SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["refused"] == [
        "kernel __main__.kernel", "kernel __main__.kernel", "triton.language.load", "triton.testing.do_bench",
        "triton.runtime.jit.JITFunction", "torchvision.transforms.functional.resize", "sgl_kernel.silu_and_mul",
    ]  # fmt: skip
    assert said["sizes"] == [3, 8, 8] and said["inert"]
    assert said["torch"] == torch.__version__.split("+")[0], "weights are shared between two torches of one version"

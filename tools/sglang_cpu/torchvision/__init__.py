"""Stand-in for torchvision, whose published builds want CUDA; text models never call it."""

from sglang_cpu_inert import install

install(__name__, "0.28.0")

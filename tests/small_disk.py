"""The command that writes responses, on a disk that is full soon: no file may have more than 2000 bytes."""

import resource
import signal

from megatron_tropd.generate import main as generate


def main(words: list[str]) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    return generate(words)

"""The training command, whose dedicated teacher loses its weights after the number of batches in FAIL_AFTER."""

from __future__ import annotations

import os
import sys

from megatron_tropd import train


def _lose_weights_later() -> None:
    from megatron_tropd.teacher.dedicated.worker import Worker

    deliver, delivered = Worker._deliver, []

    def and_count(self, *args):
        deliver(self, *args)
        delivered.append(None)
        if len(delivered) == int(os.environ["FAIL_AFTER"]):
            for weight in self._model._model.parameters():
                weight.data.fill_(float("nan"))

    Worker._deliver = and_count


if __name__ == "__main__":
    from megatron_tropd.parallel import platform

    platform.install()  # before the first import of Megatron
    _lose_weights_later()
    sys.exit(train.main(sys.argv[1:]))

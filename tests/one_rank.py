"""Training curves on pools of ranks, and the curve of one rank that they are compared with."""

from __future__ import annotations

from tests.tiny_run import flags, train_here


def _train(argv, stop_after):
    return train_here(argv, stop_after)


def curve_of(ranks, size, argv, stop_after=None):
    """(loss, gradient norm) of every step on ``size`` ranks, which must all report the same."""
    curves = ranks(size).run(_train, argv, stop_after)
    assert all(curve == curves[0] for curve in curves), "ranks report different numbers"
    return curves[0]


def difference(mine, theirs):
    """The largest relative difference of two curves."""
    assert len(mine) == len(theirs)
    return max(abs(a - b) / abs(b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


class OneRank:
    """By other flags, made on demand: the curve of one rank."""

    def __init__(self, ranks, world, root, steps):
        self._ranks, self._world, self._root, self._steps = ranks, world, root, steps
        self._curves = {}

    def __call__(self, **changes):
        key = repr(changes)
        if key not in self._curves:
            argv = flags(self._world, self._root / str(len(self._curves)), train_iters=self._steps, **changes)
            self._curves[key] = curve_of(self._ranks, 1, argv)
        return self._curves[key]

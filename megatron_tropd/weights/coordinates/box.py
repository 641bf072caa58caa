"""A box: a rectangle of one Hugging Face tensor, and the place it takes in a parameter of one rank.

Every layout is described by boxes: what a Megatron rank holds (``megatron_boxes.py``), what a rank of an SGLang engine
holds (``engine_boxes.py``) and what a torch_dist checkpoint stores (``checkpoint_boxes.py``).  Integers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.weights.coordinates.hf_shapes import Index


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle of one HF tensor and where it lies in a local parameter.  One entry per HF dimension.

    A parameter that stacks several HF tensors (an engine's experts) has one dimension more: ``local_start``
    then begins with the position in the stack.
    """

    hf_name: str
    start: Index
    size: Index
    local_start: Index

    @property
    def numel(self) -> int:
        """Elements in the box."""
        count = 1
        for extent in self.size:
            count *= extent
        return count

    @property
    def hf_slices(self) -> tuple[slice, ...]:
        """Index of the box in the HF tensor."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.size, strict=True))

    @property
    def local_slices(self) -> tuple[int | slice, ...]:
        """Index of the box in the local parameter; what it selects has the box's shape."""
        stacked = len(self.local_start) - len(self.size)
        rows = zip(self.local_start[stacked:], self.size, strict=True)
        return (*self.local_start[:stacked], *(slice(s, s + n) for s, n in rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamBoxes:
    """One parameter of one rank's model."""

    names: tuple[str, ...]
    """Names that it may have in the model.  In a GPTModel: the Transformer Engine spec's name comes first, layers and
    experts are numbered LOCALLY, and names begin with ``model0.``, ``model1.`` ... if a rank has several chunks."""
    shape: Index
    """Local shape, vocabulary padding included."""
    boxes: tuple[Box, ...]


def block(hf_name: str, hf_start: int, size: Index, local_row: int, *stack: int) -> Box:
    """Return a box of whole rows: ``size`` from row ``hf_start``, placed at row ``local_row`` (of entry ``stack``)."""
    rest = (0,) * (len(size) - 1)
    return Box(hf_name=hf_name, start=(hf_start, *rest), size=size, local_start=(*stack, local_row, *rest))


def column_block(hf_name: str, shape: Index, parts: int, part: int, *stack: int) -> Box:
    """Return the box of share ``part`` of the columns of a matrix of ``shape``, cut evenly into ``parts`` shares.

    It fills the local matrix (of entry ``stack``).
    """
    columns = shape[1] // parts
    return Box(
        hf_name=hf_name, start=(0, part * columns), size=(shape[0], columns), local_start=(*stack, 0, 0)
    )  # fmt: skip


ShapeAndBoxes = tuple[Index, list[Box]]
"""Local shape of a parameter and its boxes."""

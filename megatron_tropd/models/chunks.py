"""The model chunks of a rank: one GPTModel, or one per virtual pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.build import HiddenStateGPT, build_gpt_model
from megatron_tropd.parallel.groups import ModelGroups


class ModelChunks(nn.ModuleList):
    """All GPTModels of a rank, in the order in which a micro-batch passes them."""

    def __init__(self, chunks: list[HiddenStateGPT]) -> None:
        super().__init__(chunks)
        self.chunks = tuple(chunks)

    @property
    def config(self) -> TransformerConfig:
        """Megatron's config, the same of all chunks."""
        return self.chunks[0].config

    @property
    def vocab_size(self) -> int:
        """Rows of the whole output table, padding included."""
        return self.chunks[0].vocab_size  # type: ignore[no-any-return]  # Megatron does not annotate it

    def lm_head_weight(self) -> Tensor:
        """This rank's rows of the output table; on the last pipeline stage."""
        return self.chunks[-1].lm_head_weight()

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the chunks' sharded states by number.  The names of the tensors inside know nothing of chunks, so
        every layout loads them."""
        return {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(self.chunks)}


def build_chunks(
    arch: Architecture, groups: ModelGroups, *, params_dtype: torch.dtype, config_overrides: Mapping[str, Any]
) -> ModelChunks:
    """Build all of this rank's chunks, as :func:`build_gpt_model` does one.

    Raises:
        ValueError: the layout does not divide the architecture; the message names the flag.
    """
    return ModelChunks(
        [
            build_gpt_model(arch, groups, params_dtype=params_dtype, config_overrides=config_overrides, chunk=chunk)
            for chunk in range(groups.layout.chunks)
        ]
    )

"""The parameters of a live module, paired with their boxes.  The only module of this package that uses tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from megatron_tropd.weights.coordinates.box import ParamBoxes


class WeightMismatch(ValueError):
    """A module's parameters are not those that its architecture and layout require."""


def local_parameters(model: nn.Module | Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the parameters by GPTModel name, whether or not ``model`` is wrapped in Float16Module or DDP.

    Several model chunks (a virtual pipeline) are a sequence; the names then begin with ``model0.``, ``model1.`` ...
    """
    if isinstance(model, nn.ModuleList):
        model = list(model)
    if not isinstance(model, nn.Module):
        if len(model) == 1:
            return local_parameters(model[0])
        return {
            f"model{chunk}.{name}": parameter
            for chunk, module in enumerate(model)
            for name, parameter in local_parameters(module).items()
        }
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return dict(model.named_parameters())


def match_parameters(params: Mapping[str, Tensor], boxes: Iterable[ParamBoxes]) -> list[tuple[Tensor, ParamBoxes]]:
    """Pair every parameter with its boxes, by any of its names.

    Raises:
        WeightMismatch: a parameter is missing, unknown or of another shape; one message reports all problems.
    """
    problems, pairs, used = [], [], set()
    for wanted in boxes:
        found = [name for name in wanted.names if name in params]
        if len(found) != 1:
            problems.append(f"the module has {'both' if found else 'none'} of {' / '.join(wanted.names)}")
            continue
        used.add(found[0])
        tensor = params[found[0]]
        if tuple(tensor.shape) != wanted.shape:
            problems.append(f"{found[0]} has local shape {list(tensor.shape)}, expected {list(wanted.shape)}")
        pairs.append((tensor, wanted))
    problems += [f"the module has an unknown parameter {name}" for name in sorted(params.keys() - used)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightMismatch(f"the module does not fit its architecture and layout: {shown}")
    return pairs

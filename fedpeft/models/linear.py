"""Linear layers of a model: their weights and sizes, and the checks of ranks against them."""

from collections.abc import Iterable, Sequence

from torch import nn


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place.

    Args:
        model: changed in place.
        name: dotted name of the module that is replaced.
        module: takes its place.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, quantised or not, or GPT-2's Conv1D."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def linear_weight(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None, bool]:
    """Return a linear layer's weight and bias, and True if the weight is transposed.

    A transposed weight is (in, out), as in GPT-2's Conv1D; else it is (out, in).

    Raises:
        ValueError: the weight is quantised, so its numbers cannot be read.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    if not weight.is_floating_point():
        raise ValueError(
            f"{type(module).__name__} holds quantised weights ({weight.dtype}), and this method "
            "has to read them: set model.load_in=null, or choose a method that only adds to them"
        )
    assert bias is None or isinstance(bias, nn.Parameter)
    return weight, bias, is_transposed(module)


def output_width(module: nn.Module) -> int:
    """Return a linear layer's number of outputs, which a quantised weight's shape does not tell."""
    return sides(module)[0]


def sides(module: nn.Module) -> tuple[int, int]:
    """Return a linear layer's numbers of outputs and inputs."""
    names = ("nf", "nx") if is_transposed(module) else ("out_features", "in_features")
    width, depth = (getattr(module, name) for name in names)
    assert isinstance(width, int) and isinstance(depth, int)
    return width, depth


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a layer's weight is (in, out), as that of GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D"


def check_rank(model: nn.Module, names: Iterable[str], rank: int) -> None:
    """Check a method's rank against the matrices that it changes.

    Args:
        model: has the matrices.
        names: names of the layers that the method changes; only linear ones are checked.
        rank: the method's rank.

    Raises:
        ValueError: no matrix can have such a rank.
    """
    shapes = {n: sides(m) for n in names if is_linear(m := model.get_submodule(n))}
    if not shapes:
        return
    name, (width, depth) = max(shapes.items(), key=lambda entry: min(entry[1]))
    if rank > min(width, depth):
        raise ValueError(
            f"method.rank must be <= {min(width, depth)}, the smaller side of {name} "
            f"({width} x {depth}), got {rank}"
        )


def check_bottleneck(model: nn.Module, names: Sequence[str], bottleneck: int) -> None:
    """Check the inner width of adapters against the layers whose outputs they change.

    Args:
        model: has the layers.
        names: names of the layers whose outputs the adapters change.
        bottleneck: the adapters' inner width.

    Raises:
        ValueError: an adapter would be wider than any of the layers, so it is no bottleneck.
    """
    widest = max(names, key=lambda name: max(sides(model.get_submodule(name))))
    width, depth = sides(model.get_submodule(widest))
    if bottleneck > max(width, depth):
        raise ValueError(
            f"method.bottleneck must be <= {max(width, depth)}, the larger side of {widest} "
            f"({width} x {depth}), got {bottleneck}"
        )

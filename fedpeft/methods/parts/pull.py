"""A proximal pull, as FedProx and Ditto have it."""

from collections.abc import Mapping

from torch import Tensor, nn

from fedpeft.methods.base import Term


class ProximalPull(Term):
    """Adds strength (theta - towards), the gradient of strength/2 |theta - towards|^2.

    Args:
        strength: factor of the pull's gradient.
        towards: values by name, full. A parameter without a value, or without a gradient in a
            phase, is not pulled.
    """

    def __init__(self, strength: float, towards: Mapping[str, Tensor]) -> None:
        self.strength, self.towards = strength, dict(towards)

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if name in self.towards and parameter.grad is not None:
                # kept where the parameter is, because each step needs it
                self.towards[name] = self.towards[name].to(parameter.device)
                difference = parameter.detach() - self.towards[name]
                parameter.grad.add_(difference, alpha=self.strength)

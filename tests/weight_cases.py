"""What the tests of fused modules share: the truth of a weight gradient, and who computes it."""

import torch

DERIVED = 2.0**-23


class WeightSum:
    """The sum of a weight's gradients over a window, in float64, and the bound for a float32 sum.

    A micro-batch of T tokens adds a sum of T products, each rounded at most (T + 2) times.
    """

    def __init__(self, weight):
        self.total = torch.zeros(weight.shape, dtype=torch.float64)
        self.magnitude = self.total.clone()
        self.roundings = 0

    def add(self, gradient, magnitude, tokens, factor=1.0):
        """Adds a gradient in float64, with the sum of its terms' absolute values."""
        self.total += gradient * factor
        self.magnitude += magnitude * abs(factor)
        self.roundings += tokens + 2

    def contains(self, main):
        """Tells whether every element lies within the bound."""
        error = (main.detach().cpu().double() - self.total).abs()
        return bool((error <= self.roundings * (DERIVED * self.magnitude + 2.0**-149)).all())


def exact_gradient(product, weight, x, dy):
    """The gradient of a product in a weight and its terms' sum of absolute values, in float64.

    Args:
        product: computes the output from x and the weight with stock operators, linear in both.
        weight: of which shape and layout alone matter.
        x: the input, as it took part in the product.
        dy: the gradient of its output.
    """
    gradients = []
    for convert in (torch.Tensor.double, lambda t: t.double().abs()):
        leaf = torch.zeros(weight.shape, dtype=torch.float64, requires_grad=True)
        output = product(convert(x.detach().cpu()), leaf)
        gradients += torch.autograd.grad(output, leaf, convert(dy.detach().cpu()))
    return gradients


def assert_input_gradient(ours, stock, is_autocast=False):
    """The gradient of an input: stock's, bit for bit.

    Not so under autocast on a GPU, where stock rounds that of a float32 input to 16 bits, and we do
    not.
    """
    assert ours.dtype == stock.dtype
    if not (is_autocast and ours.is_cuda and ours.dtype == torch.float32) or ours.numel() == 0:
        assert ours.equal(stock)
        return
    limit = 2.0**-8 * stock.abs().max().item()
    torch.testing.assert_close(ours, stock, rtol=0, atol=limit, equal_nan=True)


def nodes_before(output, leaf):
    """The names of the backward nodes that send gradients to a leaf."""
    target = torch.autograd.graph.get_gradient_edge(leaf).node
    found, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [edge[0] for edge in node.next_functions]
        if target in following:
            found.add(node.name())
        todo += following
    return found


FUSED_NODES = {"FusedWeightBackward", "FusedEmbeddingBackward", "_MultiplyBackward"} | {
    "_LookupBackward"
}


def is_fused(output, weight):
    """Tells whether all gradients of a weight come from a fused node."""
    found = nodes_before(output, weight)
    return bool(found) and found <= FUSED_NODES

"""Training loops run twice, stock and attached: the same training, and a smaller gradient error.

A test gives ``make()``, which builds a model, and ``train(model, attach)``, which is a loop as
users write it that calls ``attach(model)`` once. Hooks measure from outside what the loop does.
"""

import os
from functools import partial

import pytest
import torch
from oracle import WindowSum
from torch.optim.optimizer import register_optimizer_step_post_hook

import gradacc_kernels as gk

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

EPSILON = 2.0**-23
K = 4  # micro-batches in a window
STEPS = 3
# Where training is equal to rounding: each step rounds the gradient's sum, its clipped form, the
# momentum and the parameter.
ULPS = 4 * STEPS

every_fuse = pytest.mark.parametrize("fuse", ["auto", True], ids=["default", "fused"])

_operators = []  # alive as long as the process


def importorskip(name):
    """pytest.importorskip, of libraries that import torchvision where it is installed.

    The torchvision of PyPI is compiled for CUDA. Beside a CPU build of torch its operators do not
    load, and it fails to import, as it declares meta kernels for two of them. Declared, they are
    there; nothing here calls them.
    """
    if torch.version.cuda is None and not _operators:
        _operators.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                _operators[0].define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
    return pytest.importorskip(name)


def stock(model):
    """In place of attach: nothing."""


def run(make, train, attach):
    """Trains a new model, and returns it and what it was before."""
    torch.manual_seed(1234)
    model = make()
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several gain nothing in models this small
    torch.manual_seed(5678)
    try:
        train(model, attach)
    finally:
        torch.set_num_threads(threads)
    return model, before


def _tensors(model):
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_same_training(make, train, fuse, *, ulps=0):
    """Trained parameters and buffers are those of stock; returns the model and stock's.

    Where nothing is fused each sum has the terms of stock in the order of stock, so the bits are
    equal: ``ulps`` is 0. A fused gradient is rounded once less an addend, and the gradient of an
    activation that several layers read is summed in another order: there it is how many units in
    the last place of its largest element a tensor may be off.
    """
    theirs, before = run(make, train, stock)
    ours, _ = run(make, train, partial(gk.attach, fuse=fuse))
    expected, worst = dict(_tensors(theirs)), 0.0
    for name, param in theirs.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, f"{name} was not trained"
    for name, actual in _tensors(ours):
        actual, want = actual.detach(), expected[name].detach()
        if torch.equal(actual, want):
            continue
        assert ulps > 0, f"{name} differs"
        worst = max(worst, float((actual - want).abs().amax() / want.abs().amax() / EPSILON))
        assert worst <= ulps, f"{name} is {worst} units in the last place off"
    print(f"at most {worst} units in the last place off")
    return ours, theirs


def check_follows_float32(make, train, train_in_16_bits):
    """Fused training under autocast is as near to training in float32 as stock autocast is.

    With a 16-bit copy of the weights that is one window old it would be several times as far.
    """

    def movement(loop, attach):
        model, before = run(make, loop, attach)
        return [param.detach().double() - before[name] for name, param in model.named_parameters()]

    truth = movement(train, stock)

    def distance(attach):
        moved = movement(train_in_16_bits, attach)
        return float(_norm([a - b for a, b in zip(moved, truth, strict=True)]) / _norm(truth))

    theirs, ours = distance(stock), distance(partial(gk.attach, fuse=True))
    print(f"from training in float32: stock {theirs:.3g}, attached {ours:.3g}")
    assert 0 < ours < 1.5 * theirs


class Witness:
    """What the gradients of one window are to be, in float64, and what they are.

    Of a parameter that is left to the hook it sees the gradient of each micro-batch by a hook on
    the tensor; of a fused module's it computes it from inputs and output gradients.
    """

    def __init__(self, model, is_fused):
        self.sums = {}
        self.grads = {}
        self.names = {param: name for name, param in model.named_parameters()}
        seen = set()
        for module in model.modules():
            kind = type(module).__name__
            if is_fused and kind in ("Linear", "Conv1D", "Embedding"):
                seen.update(module.parameters(recurse=False))
                module.register_forward_hook(getattr(self, f"_see_{kind.lower()}"))
        for param in self.names:
            if param.requires_grad and param not in seen:
                param.register_hook(partial(self._see_gradient, param))
        self.handle = register_optimizer_step_post_hook(self._see_step)

    def _sum(self, param):
        zeros = torch.zeros(param.shape, dtype=torch.float64)
        return self.sums.setdefault(self.names[param], WindowSum(zeros))

    def _see_gradient(self, param, grad):
        if not self.grads:
            self._sum(param).add(grad)

    def _see_linear(self, module, inputs, output, is_transposed=False):
        x = inputs[0].detach().to(output.dtype).flatten(0, -2)  # as autocast casts it

        def see(dy):
            if self.grads:
                return
            dy = dy.detach().flatten(0, -2).double()
            left, right = (x.double(), dy) if is_transposed else (dy, x.double())
            if module.weight.requires_grad:
                self._add(module.weight, left.T @ right, left.abs().T @ right.abs(), len(x))
            if module.bias is not None and module.bias.requires_grad:
                self._add(module.bias, dy.sum(0), dy.abs().sum(0), len(x))

        if output.requires_grad:
            output.register_hook(see)

    def _see_conv1d(self, module, inputs, output):
        self._see_linear(module, inputs, output, is_transposed=True)

    def _see_embedding(self, module, inputs, output):
        rows = inputs[0].flatten()

        def see(dy):
            if self.grads:
                return
            dy = dy.detach().flatten(0, -2).double()
            zeros = torch.zeros(module.weight.shape, dtype=torch.float64)
            terms = (zeros.index_add(0, rows, part) for part in (dy, dy.abs()))
            self._add(module.weight, *terms, len(rows))

        if output.requires_grad:
            output.register_hook(see)

    def _add(self, param, total, magnitude, k):
        window = self._sum(param)
        window.total = window.total + total
        window.magnitude = window.magnitude + magnitude
        window.k += k

    def _see_step(self, optimizer, args, kwargs):
        if not self.grads:
            self.grads = {
                name: param.grad.detach().clone()
                for param, name in self.names.items()
                if param.grad is not None
            }

    def is_within_bounds(self):
        """Tells of each parameter whether float32 arithmetic explains its error."""
        assert self.sums and self.sums.keys() == self.grads.keys()
        return {name: window.contains(self.grads[name]) for name, window in self.sums.items()}

    def error(self):
        """The error of all gradients together, relative to the gradient."""
        parts = [self.grads[name].double() - window.total for name, window in self.sums.items()]
        totals = [window.total for window in self.sums.values()]
        return float(_norm(parts) / _norm(totals))


def _norm(tensors):
    return torch.linalg.vector_norm(torch.stack([t.norm() for t in tensors]))


def witness(make, train, attach, is_fused):
    """Trains a new model under a witness of its first window."""
    held = []

    def watched():
        model = make()
        held.append(Witness(model, is_fused))
        return model

    try:
        run(watched, train, attach)
    finally:
        for one in held:
            one.handle.remove()
    return held[0]


def check_window(make, train, fuse, *, gain):
    """Float32 arithmetic explains the error of our gradients, and does not that of stock's.

    ``gain`` is how many times larger stock's error is at least.
    """
    theirs = witness(make, train, stock, fuse is True)
    ours = witness(make, train, partial(gk.attach, fuse=fuse), fuse is True)
    assert all(grad.dtype == torch.float32 for grad in ours.grads.values())
    outside = [name for name, within in ours.is_within_bounds().items() if not within]
    print(f"error: stock {theirs.error():.3g}, attached {ours.error():.3g}; outside: {outside}")
    assert not outside
    assert not all(theirs.is_within_bounds().values())
    assert theirs.error() > gain * ours.error()

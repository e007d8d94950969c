"""Fused layers that read one activation: one 16-bit copy of it, and one sum of its gradient."""

import copy
import resource
import threading
from pathlib import Path

import pytest
import torch
from fused_cases import assert_equal, every_device, fused, grads, is_fused
from hook_cases import Raise
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

READERS = 3
FAMILIES = pytest.mark.parametrize("family", ["float32", "bfloat16", "autocast"])
WIDTH = 16


class Readers(nn.Module):
    """The projections of an attention, without it."""

    def __init__(self, readers=READERS):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 8 + i) for i in range(readers))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def pair(device, family, **options):
    """A stock copy, and the fused model."""
    torch.manual_seed(0)
    model = Readers(**options).to(device, torch.bfloat16 if family == "bfloat16" else torch.float32)
    return copy.deepcopy(model), fused(model)


def activation(device, family, *shape):
    """A tensor with a node of its own, and the leaf behind it."""
    dtype = torch.bfloat16 if family == "bfloat16" else torch.float32
    leaf = torch.randn(*(shape or (2, 5, WIDTH)), device=device).to(dtype).requires_grad_()
    return leaf, leaf * 1


def resident(device):
    """Bytes of memory that are in use."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(model, x, family):
    device = x.device.type
    with torch.autocast(device, torch.bfloat16, enabled=family == "autocast"):
        return model(x)


def loss(outputs):
    return sum((i + 1) * y.float().square().sum() for i, y in enumerate(outputs))


def close(ours, theirs, family):
    assert ours.dtype == theirs.dtype
    unit = 2.0**-20 if family == "float32" else 2.0**-6
    limit = unit * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


def compare(device, family, work):
    """What a stock model and ours give, each with its own leaf, is the same but for rounding."""
    leaf, _ = activation(device, family)
    theirs, ours = (
        work(net, leaf.detach().clone().requires_grad_()) for net in pair(device, family)
    )
    for expected, found in zip(theirs, ours, strict=True):
        close(found, expected, family)


@every_device
@FAMILIES
@pytest.mark.parametrize("is_residual", [False, True], ids=["readers alone", "and a residual"])
def test_the_sum_is_that_of_stock(device, family, is_residual):
    stock, model = pair(device, family)
    results = []
    leaf, _ = activation(device, family)
    for net in (stock, model):
        x = leaf.detach().clone().requires_grad_()
        hidden = x * 1
        outputs = run(net, hidden, family)
        assert all(is_fused(y) for y in outputs) == (net is model)
        if is_residual:
            outputs = [*outputs, hidden]
        loss(outputs).backward()
        results.append((x.grad, *grads(net)))
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs.to(ours.dtype), family)


@every_device
def test_no_farther_from_the_truth_than_stock(device):
    """The sum of three rounded gradients, and one that is rounded when the third is added."""
    stock, model = pair(device, "bfloat16")
    exact = copy.deepcopy(stock).double()
    leaf, _ = activation(device, "bfloat16", 512, WIDTH)
    found = {}
    for name, net in (("stock", stock), ("ours", model), ("exact", exact)):
        x = leaf.detach().to(torch.float64 if name == "exact" else leaf.dtype).requires_grad_()
        outputs = net(x * 1)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        found[name] = x.grad.double()
    error = {name: float((found[name] - found["exact"]).norm()) for name in ("stock", "ours")}
    assert error["ours"] <= 1.01 * error["stock"]


def copies(model, x):
    """The addresses of the 16-bit copies of x that a forward saves."""
    found = set()

    def pack(tensor):
        if tensor.shape == x.shape and tensor.dtype == torch.bfloat16:
            found.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run(model, x, "autocast")
    return found, outputs


@every_device
def test_the_copy_is_made_once(device):
    _, model = pair(device, "autocast")
    leaf, x = activation(device, "autocast")
    found, kept = copies(model, x)
    assert len(found) == 1
    again, _ = copies(model, x)
    assert again == found  # as long as it is kept
    other, _ = copies(model, leaf * 2)
    assert len(other) == 1 and other != found
    del kept


@every_device
def test_data_is_read_anew_by_every_layer(device):
    """Nobody forbids to write to it where no version counter tells."""
    stock, model = pair(device, "autocast")
    results = []
    for net in (stock, model):
        x = torch.ones(4, WIDTH, device=device)
        with torch.autocast(device, torch.bfloat16):
            first = net.layers[0](x)
            x.data.fill_(2)
            second = net.layers[1](x)
        loss([first, second]).backward()
        results.append((second.detach(), *[layer.weight.grad for layer in net.layers[:2]]))
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs, "autocast")


@every_device
@pytest.mark.parametrize("change", ["requires_grad_", "detach_"])
def test_an_activation_that_joins_or_leaves_the_graph_between_its_readers(device, change):
    stock, model = pair(device, "autocast")
    leaf, _ = activation(device, "autocast")
    results = []
    for net in (stock, model):
        start = leaf.detach().clone()
        x = start if change == "requires_grad_" else start.requires_grad_() * 1
        with torch.autocast(device, torch.bfloat16):
            first = net.layers[0](x)
            getattr(x, change)()
            second = net.layers[1](x)
        weight = net.layers[1].weight
        (grad,) = torch.autograd.grad(second.float().square().sum(), weight, create_graph=True)
        total = grad.square().sum() + first.float().square().sum()
        (found,) = torch.autograd.grad(total, start, allow_unused=True)
        results.append(found)
    close(results[1], results[0], "autocast")


POLICIES = {
    "products": lambda op: op == torch.ops.aten.mm.default,
    "casts": lambda op: op == torch.ops.aten._to_copy.default,
    "all": lambda op: True,
}


@every_device
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_selective_checkpoints_of_a_reader_beside_another(device, backend, policy):
    """Recomputing makes the calls that forward made, whatever is shared and kept meanwhile."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def mlp(self, x):
            return self.down(torch.sin(x)) + self.up(x) + torch.cos(x).bfloat16()

        def forward(self, x):
            return self.q(x) + checkpoint(self.mlp, x, use_reentrant=False, context_fn=contexts)

    def contexts():
        keep, drop = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return create_selective_checkpoint_contexts(
            lambda context, op, *args, **kwargs: keep if policy(op) else drop
        )

    torch.manual_seed(0)
    model = Block().to(device)
    stock = copy.deepcopy(model)
    fused(model, backend=backend)
    data = [torch.randn(6, WIDTH, device=device) for _ in range(2)]
    for net in (stock, model):
        losses = []
        for each in data:  # both forwards before a backward
            x = each.clone().requires_grad_() * 1
            losses.append(run(net, x, "autocast").float().square().sum())
        for each in losses:
            each.backward()
    for theirs, ours in zip(grads(stock), grads(model), strict=True):
        close(ours, theirs, "autocast")


@every_device
@FAMILIES
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2), (1, 2)], ids=str)
def test_readers_that_take_no_part_in_the_loss(device, family, used):
    def work(net, x):
        outputs = run(net, x * 1, family)
        loss([outputs[i] for i in used]).backward()
        return (x.grad,)

    compare(device, family, work)


@every_device
@FAMILIES
def test_backward_again_over_a_retained_graph(device, family):
    def work(net, x):
        total = loss(run(net, x * 1, family))
        total.backward(retain_graph=True)
        once = x.grad.clone()
        total.backward()
        return (once, x.grad)

    compare(device, family, work)


@every_device
@FAMILIES
@pytest.mark.parametrize("wrt", ["leaf", "activation", "weights", "all"])
def test_autograd_grad(device, family, wrt):
    stock, model = pair(device, family)
    leaf, _ = activation(device, family)
    results = []
    for net in (stock, model):
        x = leaf.detach().clone().requires_grad_()
        hidden = x * 1
        targets = {
            "leaf": [x],
            "activation": [hidden],
            "weights": [layer.weight for layer in net.layers],
            "all": [x, hidden, *(layer.weight for layer in net.layers)],
        }[wrt]
        results.append(torch.autograd.grad(loss(run(net, hidden, family)), targets))
        assert all(grad is None for grad in [x.grad, *grads(net)])
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs, family)


@every_device
def test_backward_with_inputs(device):
    def work(net, x):
        loss(net(x * 1)).backward(inputs=[x, net.layers[1].weight])
        assert net.layers[0].weight.grad is None
        return (x.grad, net.layers[1].weight.grad)

    compare(device, "float32", work)


@every_device
@pytest.mark.parametrize("family", ["float32", "autocast"])
def test_double_backward(device, family):
    def work(net, x):
        (first,) = torch.autograd.grad(loss(run(net, x * 1, family)), x, create_graph=True)
        first.square().sum().backward()
        return (first.detach(), x.grad, *(layer.weight.grad for layer in net.layers))

    compare(device, family, work)


@every_device
@FAMILIES
def test_a_leaf_that_is_read(device, family):
    def work(net, x):
        for _ in range(2):
            loss(run(net, x, family)).backward()
        return (x.grad,)

    compare(device, family, work)


@every_device
def test_a_hook_on_the_activation_sees_the_sum_once(device):
    stock, model = pair(device, "bfloat16")
    leaf, _ = activation(device, "bfloat16")
    seen = []
    for net in (stock, model):
        hidden = leaf.detach().clone().requires_grad_() * 1
        hidden.register_hook(lambda grad: seen.append(grad.clone()))
        loss(net(hidden)).backward()
    assert len(seen) == 2
    close(seen[1], seen[0], "bfloat16")


@every_device
def test_a_hook_on_the_activation_may_change_the_sum(device):
    _, model = pair(device, "float32")
    x, hidden = activation(device, "float32")
    hidden.register_hook(lambda grad: grad * 0 + 7)
    loss(model(hidden)).backward()
    assert x.grad.eq(7).all()


@every_device
def test_backward_that_raised_leaves_nothing_behind(device):
    class Raise(torch.autograd.Function):
        is_active = False

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            if Raise.is_active:
                raise ValueError("in the middle")
            return dy

    stock, model = pair(device, "float32")
    leaf, _ = activation(device, "float32")
    results = []
    for net in (stock, model):
        x = leaf.detach().clone().requires_grad_()
        outputs = net(x * 1)
        total = loss([Raise.apply(outputs[0]), *outputs[1:]])
        if net is model:
            Raise.is_active = True
            with pytest.raises(ValueError, match="in the middle"):
                total.backward(retain_graph=True)
            Raise.is_active = False
            model.zero_grad()
            x.grad = None
        total.backward()
        results.append(x.grad)
    close(results[1], results[0], "float32")


@every_device
def test_backwards_in_several_threads(device):
    """Each has a sum of its own, over the one graph."""
    _, model = pair(device, "float32")
    x, hidden = activation(device, "float32", 64, WIDTH)
    outputs = model(hidden)
    losses = [loss([y * (k + 1) for y in outputs]) for k in range(4)]
    expected = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in losses]
    wrong = []

    def work(k):
        for _ in range(50):
            (found,) = torch.autograd.grad(losses[k], x, retain_graph=True)
            if not torch.allclose(found, expected[k], rtol=1e-5, atol=1e-5):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_device
def test_a_backward_inside_of_another(device):
    """The inner one frees the node that both pass, and the outer one's sum stays."""
    found = []
    for net in pair(device, "float32"):
        torch.manual_seed(0)
        x, _ = activation(device, "float32")
        first, second, third = net(x + 0)  # whose node saves nothing: it may run twice
        inner = first.sum()
        second.register_hook(lambda _, inner=inner: inner.backward())
        (second.sum() + third.sum()).backward()
        found.append(x.grad)
    close(*found, "float32")


@every_device
def test_backwards_of_several_threads_that_free_the_graph(device):
    found = []
    for net in pair(device, "float32"):
        torch.manual_seed(0)
        sums = []
        for _ in range(30):
            x, _ = activation(device, "float32", 64, WIDTH)
            outputs = net(x + 0)
            threads = [
                threading.Thread(target=loss(part).backward) for part in (outputs[:2], outputs[2:])
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sums.append(x.grad)
        found.append(torch.stack(sums))
    close(*found, "float32")


@every_device
def test_backwards_that_raise_free_their_sums(device):
    _, model = pair(device, "float32")
    _, hidden = activation(device, "float32", 1 << 16, WIDTH)  # 4 MB
    first = model.layers[0](hidden)
    raising = Raise.apply(torch.ones(1, device=device, requires_grad=True))
    total = loss([first, raising, *(layer(hidden) for layer in model.layers[1:])])
    before = resident(device)
    for _ in range(60):
        with pytest.raises(ValueError, match="in the middle"):
            total.backward(retain_graph=True)
    assert resident(device) - before < 20 * hidden.nbytes


@every_device
def test_the_gradient_at_the_shared_node(device):
    """Asked for by an edge, or seen by a hook there, it is the sum as everywhere else."""
    _, model = pair(device, "float32")
    x, hidden = activation(device, "float32")
    outputs = model(hidden)
    (expected,) = torch.autograd.grad(loss(outputs), x, retain_graph=True)
    node = outputs[0].grad_fn.next_functions[0][0]
    assert node.name() == "FusedInputBackward"
    edge = torch.autograd.graph.GradientEdge(node, 0)
    close(torch.autograd.grad(loss(outputs), edge, retain_graph=True)[0], expected, "float32")
    seen = []
    node.register_prehook(lambda grads: seen.append(grads[0]))
    loss(outputs).backward()
    close(seen[0], expected, "float32")
    close(x.grad, expected, "float32")


@every_device
@FAMILIES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, family, use_reentrant):
    def work(net, x):
        run_net = lambda h, net=net: tuple(run(net, h, family))  # noqa: E731
        loss(checkpoint(run_net, x * 1, use_reentrant=use_reentrant)).backward()
        return (x.grad, *(grad.float() for grad in grads(net)))

    compare(device, family, work)


@every_device
@pytest.mark.parametrize("family", ["float32", "autocast"])
def test_an_activation_that_changes_between_its_readers(device, family):
    """The second layer reads other numbers; the first one's backward misses those that it saved."""
    stock, model = pair(device, family)
    leaf, _ = activation(device, family)
    outputs = []
    for net in (stock, model):
        hidden = leaf.detach().clone()
        with torch.autocast(device, torch.bfloat16, enabled=family == "autocast"):
            net.layers[0](hidden)
            hidden.mul_(2)
            outputs.append(net.layers[1](hidden))
    assert_equal(outputs[:1], outputs[1:])


@every_device
def test_readers_with_and_without_grad_mode(device):
    def work(net, x):
        hidden = x * 1
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                unused = net.layers[0](hidden)
            outputs = [layer(hidden) for layer in net.layers[1:]]
        assert not unused.requires_grad
        (first,) = torch.autograd.grad(loss(outputs), x, create_graph=True)
        first.square().sum().backward()
        return (first.detach(), x.grad)

    compare(device, "autocast", work)


@every_device
def test_nothing_is_kept(device):
    import gc
    import weakref

    _, model = pair(device, "autocast")
    leaf, hidden = activation(device, "autocast")
    outputs = run(model, hidden, "autocast")
    alive = weakref.ref(hidden)
    del hidden, outputs
    gc.collect()
    assert alive() is None

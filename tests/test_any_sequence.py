"""Random sequences of what people do with a model and its gradients, against a model in float64.

All values are small integers times powers of two, so that every dtype holds them and every sum is
exact: a gradient that is lost, doubled, scaled twice or rounded shows as another number.
"""

import copy
import os

import hypothesis.stateful as stateful
import pytest
import torch
from hook_cases import Raise, every_hook
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc_kernels as gk

# GRADACC_SEQUENCES: how many for each test; a night's worth by hand.
SEQUENCES = int(os.environ.get("GRADACC_SEQUENCES", "15"))
STEPS = 30
VOCABULARY, WIDTH, OUT, ROWS = 5, 3, 2, 4
SCALE = 0.5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARTS = ("embedding", "linear", "head", "bare")


class Model(nn.Module):
    """An embedding whose weight is also that of a head, a linear layer, and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.linear = nn.Linear(WIDTH, OUT)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.bare = nn.Parameter(torch.zeros(WIDTH))
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(integers(*param.shape))

    def forward(self, part, data):
        if part == "bare":
            return data * self.bare
        return getattr(self, part)(data)


def integers(*shape):
    return torch.randint(-2, 3, shape)


class Sequence(stateful.RuleBasedStateMachine):
    """`sums` is what `.grad` of each parameter must be: None, or its value in float64."""

    def __init__(self, device, backend, fuse):
        super().__init__()
        self.device, self.options = device, {"backend": backend, "fuse": fuse, "scale": SCALE}
        self.model = Model().to(device, torch.bfloat16)
        self.dtype = torch.bfloat16
        self.factor = SCALE
        self.attach()
        self.foreign = set()
        self.sums = dict.fromkeys(self.named())
        self.saved = None

    def attach(self):
        self.accumulator = gk.attach(self.model, **self.options)

    def named(self):
        return dict(self.model.named_parameters())

    # What a micro-batch adds

    def data(self, part, seed):
        """The input of a part, its output's gradient, and what these add to which parameter."""
        torch.manual_seed(seed)
        if part == "embedding":
            data, dy = torch.randint(VOCABULARY, (ROWS,)), integers(ROWS, WIDTH)
            one_hot = nn.functional.one_hot(data, VOCABULARY)
            return data, dy, {"embedding.weight": one_hot.t() @ dy}
        data = integers(ROWS, WIDTH)
        if part == "linear":
            dy = integers(ROWS, OUT)
            return data, dy, {"linear.weight": dy.t() @ data, "linear.bias": dy.sum(0)}
        if part == "head":
            dy = integers(ROWS, VOCABULARY)
            return data, dy, {"embedding.weight": dy.t() @ data}
        dy = integers(ROWS, WIDTH)
        return data, dy, {"bare": (data * dy).sum(0)}

    def autocast(self, enabled):
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)

    def loss(self, parts, seed, *, is_checkpointed=False, raising=False):
        """The loss of a micro-batch, and its gradients."""
        total, terms = 0, {}
        for index, part in enumerate(parts):
            data, dy, adds = self.data(part, seed + index)
            data, dy = data.to(self.device), dy.to(self.device, self.dtype)
            if part != "embedding":
                data = data.to(self.dtype)
                if raising and index == 0:
                    data = Raise.apply(data.requires_grad_())
            y = (
                checkpoint(self.model, part, data, use_reentrant=False)
                if is_checkpointed
                else self.model(part, data)
            )
            total = total + (y * dy).sum().float()
            for name, term in adds.items():
                terms[name] = terms.get(name, 0) + term.double()
        return total, {
            name: term for name, term in terms.items() if self.named()[name].requires_grad
        }

    def add(self, terms):
        for name, term in terms.items():
            value = self.sums[name]
            self.sums[name] = term * self.factor + (0 if value is None else value)
            self.foreign.discard(name)

    # The rules

    parts = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5)
    seeds = st.integers(0, 1000)
    names = st.sampled_from(["embedding.weight", "linear.weight", "linear.bias", "bare"])

    @stateful.rule(
        parts=parts, seed=seeds, is_checkpointed=st.booleans(), is_autocast=st.booleans()
    )
    def backward(self, parts, seed, is_checkpointed, is_autocast):
        with self.autocast(is_autocast):
            loss, terms = self.loss(parts, seed, is_checkpointed=is_checkpointed)
        if loss.requires_grad:
            loss.backward()
            self.add(terms)

    @stateful.rule(
        parts=st.lists(st.sampled_from(["linear", "head"]), min_size=1, max_size=4),
        seed=seeds,
        is_autocast=st.booleans(),
        is_inner=st.booleans(),
    )
    def readers_of_an_activation(self, parts, seed, is_autocast, is_inner):
        """Its gradient is that of all of them, also where one backward runs inside of another."""
        torch.manual_seed(seed)
        x = integers(ROWS, WIDTH)
        leaf = x.to(self.device, self.dtype).requires_grad_()
        losses, terms, exact = [], {}, torch.zeros(ROWS, WIDTH, dtype=torch.float64)
        with self.autocast(is_autocast):
            activation = leaf + 0
            for part in parts:
                weight = getattr(self.model, part).weight
                dy = integers(ROWS, len(weight))
                y = self.model(part, activation)
                losses.append((y * dy.to(self.device, self.dtype)).sum().float())
                exact += dy.double() @ weight.detach().double().cpu()
                name = "linear.weight" if part == "linear" else "embedding.weight"
                adds = {name: dy.t() @ x}
                if part == "linear":
                    adds["linear.bias"] = dy.sum(0)
                for name, term in adds.items():
                    if self.named()[name].requires_grad:
                        terms[name] = terms.get(name, 0) + term.double()
        if is_inner and len(losses) > 2:
            inner = losses.pop(0)
            losses[0].register_hook(lambda _: inner.backward())
        sum(losses).backward()
        self.add(terms)
        assert leaf.grad.double().cpu().equal(exact)

    @stateful.rule(parts=parts, seed=seeds)
    def backward_twice(self, parts, seed):
        loss, terms = self.loss(parts, seed)
        if loss.requires_grad:
            loss.backward(retain_graph=True)
            loss.backward()
            self.add(terms)
            self.add(terms)

    @stateful.rule(parts=parts, others=parts, seed=seeds)
    def two_losses(self, parts, others, seed):
        one, terms = self.loss(parts, seed)
        other, more = self.loss(others, seed + 100)
        for loss, its in ((other, more), (one, terms)):
            if loss.requires_grad:
                loss.backward()
                self.add(its)

    @stateful.rule(parts=parts, seed=seeds)
    def backward_that_raises(self, parts, seed):
        loss, terms = self.loss(["linear", *parts], seed, raising=True)
        with pytest.raises(ValueError, match="in the middle"):
            loss.backward()
        for name, term in terms.items():  # each was reached, or was not
            grad, before = self.named()[name].grad, self.sums[name]
            after = term * self.factor + (0 if before is None else before)
            if grad is not None and (before is None or not grad.double().cpu().equal(before)):
                # A shared parameter's uses may have been reached in part where they are fused.
                is_shared = name == "embedding.weight"
                assert is_shared or grad.double().cpu().equal(after)
            self.sums[name] = None if grad is None else grad.double().cpu()

    @stateful.rule(parts=parts, seed=seeds, is_raised=st.booleans())
    def gradients_as_a_result(self, parts, seed, is_raised):
        loss, terms = self.loss(parts, seed)
        params = self.named()
        wanted = [name for name in terms]
        if wanted:
            found = torch.autograd.grad(loss, [params[name] for name in wanted])
            for name, grad in zip(wanted, found, strict=True):
                assert grad.double().cpu().equal(terms[name])

    @stateful.rule(name=names, parts=parts, seed=seeds)
    def backward_with_inputs(self, name, parts, seed):
        loss, terms = self.loss(parts, seed)
        if name in terms:
            loss.backward(inputs=[self.named()[name]])
            self.add({name: terms[name]})

    @stateful.rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)
        for name, value in self.sums.items():
            if value is not None:
                self.sums[name] = None if set_to_none else torch.zeros_like(value)

    @stateful.rule(name=names)
    def drop_one(self, name):
        self.named()[name].grad = None
        self.sums[name] = None

    @stateful.rule(name=names, factor=st.sampled_from([0.5, -1.0, 2.0]))
    def edit_one(self, name, factor):
        if self.sums[name] is not None:
            self.named()[name].grad.mul_(factor)
            self.sums[name] = self.sums[name] * factor

    @stateful.rule(name=names, seed=seeds)
    def assign_one(self, name, seed):
        param = self.named()[name]
        torch.manual_seed(seed)
        value = integers(*param.shape)
        param.grad = value.to(self.device, torch.float32)
        self.sums[name] = value.double()
        self.foreign.add(name)

    @stateful.rule(inv_scale=st.sampled_from([0.5, 1.0, 2.0]))
    def set_inv_scale(self, inv_scale):
        self.accumulator.inv_scale.fill_(inv_scale)
        self.factor = SCALE * inv_scale

    @stateful.rule(dtype=st.sampled_from(DTYPES), follow=st.booleans())
    def cast(self, dtype, follow):
        self.model.to(dtype)
        self.dtype = dtype
        self.accumulator.refresh()

    @stateful.rule(name=names, requires_grad=st.booleans())
    def freeze(self, name, requires_grad):
        self.named()[name].requires_grad_(requires_grad)

    @stateful.rule(assign=st.booleans())
    def load_weights(self, assign):
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        if assign:
            state["head.weight"] = state["embedding.weight"]
            flags = {name: param.requires_grad for name, param in self.named().items()}
            self.model.load_state_dict(state, assign=True)
            self.model.head.weight = self.model.embedding.weight
            for name, param in self.named().items():
                param.requires_grad_(flags[name])
            self.sums = dict.fromkeys(self.sums)  # new parameters have no gradients
            self.accumulator.refresh()
        else:
            self.model.load_state_dict(state)

    @stateful.rule()
    def detach_and_attach(self):
        frozen = [name for name, param in self.named().items() if not param.requires_grad]
        self.model.requires_grad_()
        self.accumulator.detach()
        for name, param in self.named().items():
            value = self.sums[name]
            self.sums[name] = None if value is None else value.to(self.dtype).double()
            assert param.grad is None or param.grad.dtype == self.dtype
        self.foreign = set(self.sums)
        self.attach()
        self.factor = SCALE
        for name in frozen:
            self.named()[name].requires_grad_(False)

    @stateful.rule()
    def save(self):
        self.saved = self.accumulator.state_dict(), dict(self.sums)

    @stateful.precondition(lambda self: self.saved is not None)
    @stateful.rule()
    def load(self):
        state, sums = self.saved
        self.accumulator.load_state_dict(state)
        self.sums = dict(sums)
        self.foreign = set()

    @stateful.precondition(lambda self: self.saved is not None)
    @stateful.rule(key=st.sampled_from(["format", "scale", "micro_batches.bare"]))
    def load_what_is_truncated(self, key):
        state = {name: value for name, value in self.saved[0].items() if name != key}
        with pytest.raises(ValueError, match="lacks"):
            self.accumulator.load_state_dict(state)

    @stateful.rule(parts=parts, seed=seeds)
    def train_a_copy(self, parts, seed):
        mine, self.model = self.model, copy.deepcopy(self.model)
        try:
            loss, _ = self.loss(parts, seed)
            if loss.requires_grad:
                self.model.zero_grad()
                loss.backward()
        finally:
            self.model = mine

    @stateful.rule(parts=parts, seed=seeds)
    def evaluate(self, parts, seed):
        with torch.no_grad():
            self.loss(parts, seed)

    @stateful.rule()
    def refresh(self):
        self.accumulator.refresh()

    # What holds after every step

    @stateful.invariant()
    def gradients_are_the_sums(self):
        for name, param in self.named().items():
            value, grad = self.sums[name], param.grad
            assert (grad is None) == (value is None), name
            if grad is not None:
                # What detach or somebody else put there stays until the next gradient arrives.
                assert grad.dtype == torch.float32 or name in self.foreign, name
                assert grad.double().cpu().equal(value), (name, grad, value)

    @stateful.invariant()
    def norms_are_those_of_the_sums(self):
        squares = [value.square().sum() for value in self.sums.values() if value is not None]
        exact = float(sum(squares)) ** 0.5
        for from_statistics in (False, True):
            norm = float(self.accumulator.grad_norm(from_statistics=from_statistics))
            assert norm == pytest.approx(exact, rel=1e-6), from_statistics


@every_hook
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
def test_any_sequence(hook, fuse, queueing):
    device, backend = hook
    stateful.run_state_machine_as_test(
        lambda: Sequence(device, backend, fuse),
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            database=None,
            derandomize="GRADACC_SEQUENCES" not in os.environ,
        ),
    )

"""Models for the tests of fused modules, and the truth about their weight gradients."""

import copy
import sys
import types

import oracle
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc_kernels as gk
from gradacc_kernels import dispatch


def _device(device, backend):
    reason = dispatch.why_missing(backend)
    marks = [pytest.mark.gpu] if device == "cuda" else []
    if reason is not None:
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(device, id=device, marks=marks)


every_device = pytest.mark.parametrize("device", [_device("cpu", "cpu"), _device("cuda", "cuda")])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16", "float32"])

# 1 + EPSILON[dtype] is no number of the dtype: it rounds to 1.
EPSILON = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class LanguageModel(nn.Module):
    """An embedding, an MLP and a head, which may share the embedding's weight."""

    def __init__(self, tied=True, vocabulary=11, width=16, bias=True, **embedding):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, **embedding)
        self.up = nn.Linear(width, 24, bias=bias)
        self.down = nn.Linear(24, width, bias=bias)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, indices):
        x = self.embedding(indices)
        return self.head(self.norm(x + self.down(nn.functional.gelu(self.up(x)))))


def language_model(device, dtype=torch.float32, **options):
    return LanguageModel(**options).to(device, dtype)


def tokens(device, *shape, vocabulary=11):
    return torch.randint(vocabulary, shape or (2, 5), device=device)


def linear(device, dtype=torch.float32, n_in=16, n_out=8, bias=True):
    """One fused module, inside of another as they always are."""
    return nn.Sequential(nn.Linear(n_in, n_out, bias=bias)).to(device, dtype)


def embedding(device, dtype=torch.float32, vocabulary=11, width=8, **options):
    return nn.Sequential(nn.Embedding(vocabulary, width, **options)).to(device, dtype)


def rows(device, dtype=torch.float32, *shape):
    return torch.randn(*(shape or (4, 16)), device=device).to(dtype)


def conv1d(monkeypatch):
    """The class of Hugging Face, or one of its form and name where transformers is missing."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:

        class Conv1D(nn.Module):
            def __init__(self, nf, nx):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(nx, nf))
                self.bias = nn.Parameter(torch.zeros(nf))

            def forward(self, x):
                y = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
                return y.view(*x.shape[:-1], -1)

        library = types.ModuleType("transformers.pytorch_utils")
        library.Conv1D = Conv1D
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", library)
    return Conv1D


def fused(model, **options):
    """Attaches with every module fused that can be; returns the model."""
    gk.attach(model, fuse=True, **options)
    return model


def stock_and_fused(model, **options):
    """A copy of the model as it is, and the model with every module fused."""
    return copy.deepcopy(model), fused(model, **options)


def is_fused(output):
    """Tells whether a fused module computed this tensor."""
    return output.grad_fn is not None and "Fused" in output.grad_fn.name()


def grads(model):
    return [p.grad for p in model.parameters()]


def assert_equal(actual, expected):
    """Tensors, or None, that are equal bit for bit."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and ours.equal(theirs))


class Case:
    """A fused module whose weight gradient is ones times the number of rows of its input."""

    def __init__(self, kind, device, dtype=torch.bfloat16):
        if kind == "linear":
            self.model = linear(device, dtype, n_in=4, n_out=4, bias=False)
            self.x = torch.ones(1, 4, device=device, dtype=dtype)
        else:
            self.model = embedding(device, dtype, vocabulary=4, width=4)
            self.x = torch.arange(4, device=device)
        self.weight = self.model[0].weight

    def output(self, times=1):
        y = self.model(torch.cat([self.x] * times))
        assert is_fused(y)
        return y

    def backward(self, times=1):
        self.output(times).float().sum().backward()

    @property
    def value(self):
        """The value of all elements of `.grad`, which must be the main gradient."""
        grad = self.weight.grad
        assert grad.dtype == torch.float32 and grad.stride() == self.weight.stride()
        assert grad.data_ptr() == self.weight.main_grad.data_ptr()
        (value,) = grad.unique().tolist()
        return value


every_kind = pytest.mark.parametrize("kind", ["linear", "embedding"])


class MainGradient(oracle.WindowSum):
    """The sum of a window's weight gradients in float64, and the bound for its float32 form.

    A term is the product of two operands and of the factor, and one of T in a micro-batch's sum:
    the product, the T sums, the factor and the sum with main round. Tensor cores cut off instead,
    which costs twice as much.
    """

    def _add(self, total, magnitude, n_terms, factor):
        self.total = self.total + total * factor
        self.magnitude = self.magnitude + magnitude * abs(factor)
        self.k += 2 * (n_terms + 3)

    def add_product(self, left, right, factor=1.0):
        """Adds factor * leftᵀ right, with all dimensions but the last one flattened."""
        left, right = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (left, right))
        self._add(left.t() @ right, left.abs().t() @ right.abs(), len(left), factor)

    def add_sum(self, grad_output, factor=1.0):
        """Adds factor * the sum over the rows, as for a bias."""
        dy = grad_output.detach().cpu().double().reshape(-1, grad_output.shape[-1])
        self._add(dy.sum(0), dy.abs().sum(0), len(dy), factor)

    def add_rows(self, indices, grad_output, factor=1.0, padding_idx=None):
        """Adds factor * the rows of grad_output to those that were looked up."""
        one_hot = nn.functional.one_hot(indices.cpu().long().flatten(), len(self.total)).double()
        if padding_idx is not None:
            one_hot[:, padding_idx] = 0
        self.add_product(one_hot, grad_output, factor)


def window(param):
    """An empty window of a parameter."""
    return MainGradient(torch.zeros(param.shape))


class Written(TorchDispatchMode):
    """Records the dtypes of what operators write in the shape of a tensor."""

    def __init__(self, like):
        super().__init__()
        self.shape, self.dtypes = like.shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.data_ptr() not in inputs:
            if result.shape in (self.shape, self.shape[::-1]):
                self.dtypes.append(result.dtype)
        return result

    def count_16_bit(self):
        return sum(dtype.itemsize == 2 for dtype in self.dtypes)

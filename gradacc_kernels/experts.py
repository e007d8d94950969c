"""Batched expert weights: 3-D parameters that the forward of their module multiplies with.

Which tokens meet which expert, and by what products, is the business of the module's own forward.
While it runs, an :class:`ExpertWeight` stands for each such parameter. It recognises the products
whose weight gradient can go straight into the main gradient, here for a weight [experts, in, out]:

    =======================================================  ================================
    ``x @ w``, torch.matmul, bmm, baddbmm, einsum            main[e] += s * x[e]ᵀ dy[e]
    torch._grouped_mm, torch.nn.functional.grouped_mm        the same, over the rows of each e
    ``x @ w[i]``, torch.matmul, mm, addmm, functional.linear main[i] += s * xᵀ dy
    =======================================================  ================================

with the weight as it is or transposed. Everything else gets the parameter itself, or its view.
Outputs are those of stock code, but baddbmm's: its input is added to the product as rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ExpertWeight", "Experts", "Products"]

# The fused products with a weight, by whether that is [..., in, out]: FusedWeight objects.
Products = Callable[[bool], Any]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


class _View(NamedTuple):
    """What an ExpertWeight stands for.

    Args:
        tensor: the parameter, or the view of it, as it is without us.
        products: those with the parameter.
        saving: the saved-tensor hooks under which the module's forward was called.
        expert: which one, where it is a single expert's matrix.
        is_transposed: whether the parameter's last two dimensions have changed places.
    """

    tensor: Tensor
    products: Products
    saving: Any
    expert: int | None = None
    is_transposed: bool = False


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class ExpertWeight(Tensor):
    """Stands for an expert weight, or a view of it, in the forward of its module."""

    __torch_dispatch__ = torch._C._disabled_torch_dispatch_impl

    @classmethod
    def of(cls, view: _View) -> ExpertWeight:
        """Makes one."""
        weight = view.tensor.as_subclass(cls)
        weight._expert_view = view
        weight._is_param = isinstance(view.tensor, nn.Parameter)
        return weight

    def __getattr__(self, name: str) -> Any:
        """Finds what somebody has set on the parameter."""
        if name == "_expert_view":
            raise AttributeError(name)
        return getattr(self._expert_view.tensor, name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Takes products over, follows views, and calls the rest as it would be called without."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # it sees an alias of the weight
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        names, product = _PRODUCTS.get(func, ((), None))
        if product is not None and len(args) <= len(names) and not torch.compiler.is_compiling():
            output = product(**dict(zip(names, args, strict=False)), **kwargs)
            if output is not None:
                return output
        weight = args[0] if args and type(args[0]) is ExpertWeight else None
        if weight is not None and func in _VIEWS:
            return _VIEWS[func](func, weight._expert_view, *args[1:], **kwargs)
        result = func(*_without(args), **_without(kwargs))
        is_same = weight is not None and result is weight._expert_view.tensor
        return weight if is_same else result


def _without(value: Any) -> Any:
    """Puts the tensors themselves into the places of those that stand for them."""
    if type(value) is ExpertWeight:
        return value._expert_view.tensor
    if type(value) in (tuple, list):
        return type(value)([_without(item) for item in value])
    if type(value) is dict:
        return {name: _without(item) for name, item in value.items()}
    return value


def _transpose(func, view, *args, **kwargs):
    result, n = func(view.tensor, *args, **kwargs), view.tensor.dim()
    # Without dimensions: .mT, and .T or .t() of a matrix.
    dims = {dim % n for dim in (*args, *kwargs.values())} or {n - 2, n - 1}
    if dims != {n - 2, n - 1}:
        return result
    return ExpertWeight.of(view._replace(tensor=result, is_transposed=not view.is_transposed))


def _transpose_matrix(func, view):
    return _transpose(func, view) if view.tensor.dim() == 2 else func(view.tensor)


def _permute(func, view, *args, **kwargs):
    result, n = func(view.tensor, *args, **kwargs), view.tensor.dim()
    dims = kwargs.get("dims", args)
    dims = dims[0] if len(dims) == 1 else dims
    if [dim % n for dim in dims] != [*range(n - 2), n - 1, n - 2]:
        return result
    return ExpertWeight.of(view._replace(tensor=result, is_transposed=not view.is_transposed))


def _one_expert(view, result, index):
    if view.expert is not None or result.dim() != 2:
        return result  # a row of an expert's matrix
    return ExpertWeight.of(view._replace(tensor=result, expert=index))


def _is_whole(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))


def _getitem(func, view, index):
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    is_expert = hasattr(first, "__index__") and not isinstance(first, (bool, Tensor))
    if isinstance(first, Tensor) and first.dim() == 0 and first.dtype in _INTEGERS:
        first, is_expert = int(first), True  # indexing would wait for the device, too
    if is_expert and all(map(_is_whole, rest)):
        return _one_expert(view, func(view.tensor, first), int(first))
    return func(view.tensor, _without(index))


def _select(func, view, dim, index):
    result = func(view.tensor, dim, index)
    return _one_expert(view, result, int(index)) if dim in (0, -view.tensor.dim()) else result


def _unbind(func, view, dim=0):
    results = func(view.tensor, dim)
    if dim not in (0, -view.tensor.dim()):
        return results
    return tuple(_one_expert(view, result, index) for index, result in enumerate(results))


_VIEWS = {
    Tensor.mT.__get__: _transpose,
    Tensor.T.__get__: _transpose_matrix,
    Tensor.__getitem__: _getitem,
} | {
    func: follow
    for name, follow in (
        ("transpose", _transpose),
        ("swapaxes", _transpose),
        ("swapdims", _transpose),
        ("t", _transpose_matrix),
        ("permute", _permute),
        ("select", _select),
        ("unbind", _unbind),
    )
    for func in (getattr(torch, name), getattr(Tensor, name))
}


def _fusable(input: Any, weight: Any, *, is_expert: bool) -> _View | None:
    """Returns what a weight stands for, if a product of it can be fused as far as we see here."""
    if type(weight) is not ExpertWeight or type(input) not in (Tensor, nn.Parameter):
        return None
    view = weight._expert_view
    # Inside a checkpoint of the module's own, whose second run we do not see, the products would
    # save other tensors in the first run than in the second.
    if not torch.is_grad_enabled() or _saved_tensor_hooks() != view.saving:
        return None
    return view if (view.expert is not None) == is_expert else None


def _batched(input, weight):
    view = _fusable(input, weight, is_expert=False)
    return view and view.products(not view.is_transposed).batched(input)


def _expert(input, weight, bias=None):
    view = _fusable(input, weight, is_expert=True)
    if view is None or not (bias is None or _is_vector(bias)):
        return None
    return view.products(not view.is_transposed).expert(input, view.expert, bias)


def _is_vector(bias: Any) -> bool:
    return type(bias) in (Tensor, nn.Parameter) and bias.dim() == 1


def _bmm(input, mat2, **options):
    return None if options else _batched(input, mat2)


def _mm(input, mat2, **options):
    return None if options or input.dim() != 2 else _expert(input, mat2)


def _matmul(input, other, **options):
    if options or type(other) is not ExpertWeight:
        return None
    return (_batched if other._expert_view.expert is None else _expert)(input, other)


def _baddbmm(input, batch1, batch2, *, beta=1, alpha=1, **options):
    if type(input) is ExpertWeight:
        input = input._expert_view.tensor  # a bias [experts, 1, out] looks like a weight
    if options or beta != 1 or alpha != 1 or type(input) not in (Tensor, nn.Parameter):
        return None
    if type(batch2) is not ExpertWeight or batch1.dim() != 3:
        return None
    shape = (*batch1.shape[:2], batch2._expert_view.tensor.shape[-1])
    if torch.broadcast_shapes(input.shape, shape) != shape:
        return None
    product = _batched(batch1, batch2)
    return None if product is None else product + input.to(product.dtype)


def _addmm(input, mat1, mat2, *, beta=1, alpha=1, **options):
    if options or beta != 1 or alpha != 1 or not _is_vector(input) or mat1.dim() != 2:
        return None
    return _expert(mat1, mat2, input)


def _linear(input, weight, bias=None):
    view = _fusable(input, weight, is_expert=True)
    if view is None or not (bias is None or _is_vector(bias)):
        return None
    return view.products(view.is_transposed).expert(input, view.expert, bias)


def _grouped_mm(input, mat2, offs=None, bias=None, out_dtype=None):
    view = _fusable(input, mat2, is_expert=False)
    if view is None or type(offs) is not Tensor or bias is not None:
        return None
    if out_dtype not in (None, input.dtype):
        return None
    products, kind = view.products(not view.is_transposed), input.device.type
    if not torch.is_autocast_enabled(kind):
        return products.grouped(input, offs)
    # Autocast leaves this product alone.
    torch.set_autocast_enabled(kind, False)
    try:
        return products.grouped(input, offs)
    finally:
        torch.set_autocast_enabled(kind, True)


def _einsum(equation, first=None, second=None):
    """Fuses "eti,eio->eto" and "eti,eoi->eto", in any letters and with the operands exchanged."""
    terms, _, output = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    if type(first) is ExpertWeight:
        first, second, left, right = second, first, right, left
    if type(second) is not ExpertWeight or not len(left) == len(right) == len(output) == 3:
        return None
    (e, t, i), o = left, output[2]
    if output != e + t + o or len({e, t, i, o}) != 4:
        return None
    if right == e + i + o:
        return _batched(first, second)
    return _batched(first, second.mT) if right == e + o + i else None


_PRODUCTS = {
    functional.linear: (("input", "weight", "bias"), _linear),
    torch._grouped_mm: (("input", "mat2", "offs", "bias", "out_dtype"), _grouped_mm),
    torch.einsum: (("equation", "first", "second"), _einsum),
}
for _name, _names, _product in (
    ("bmm", ("input", "mat2"), _bmm),
    ("mm", ("input", "mat2"), _mm),
    ("matmul", ("input", "other"), _matmul),
    ("baddbmm", ("input", "batch1", "batch2"), _baddbmm),
    ("addmm", ("input", "mat1", "mat2"), _addmm),
):
    _PRODUCTS[getattr(torch, _name)] = _PRODUCTS[getattr(Tensor, _name)] = (_names, _product)


class Experts:
    """The expert weights of one module.

    Args:
        weights: the parameters that are fused, by name, with their products.
    """

    def __init__(self, weights: dict[str, tuple[Tensor, Products]]):
        self._weights = weights

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Runs a module's own forward, with something standing for each of its expert weights."""
        attributes, names = vars(module), []
        saving = _saved_tensor_hooks()
        try:
            for name, (param, products) in self._weights.items():
                # What the module holds may be another object for the time of a functional_call.
                if module._parameters.get(name) is param and name not in attributes:
                    attributes[name] = ExpertWeight.of(_View(param, products, saving))
                    names.append(name)
            return type(module).forward(module, *args, **kwargs)
        finally:
            for name in names:
                attributes.pop(name, None)

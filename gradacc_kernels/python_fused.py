"""Fused modules in Python: for Triton, for the reference backend, and without the extension.

They do what csrc/autograd/fused_weight.h, fused_embedding.h and fused_module.h say of their C++
twins, by the same rules and under the same names, so that :mod:`gradacc_kernels.fused` and
:mod:`gradacc_kernels.experts` take either.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gradacc_kernels.python_hook import Demand, PythonHooks

__all__ = ["FusedEmbedding", "FusedLinear", "FusedLookup", "FusedWeight", "ParameterWatch"]


class ParameterWatch:
    """Tells whether a module still holds the parameter objects it had.

    Args:
        entries: (owner._parameters, name, parameter).
    """

    def __init__(self, entries: Iterable[tuple[dict, str, Tensor | None]]):
        self._entries = list(entries)

    def is_changed(self) -> bool:
        """Compares by identity."""
        return any(owned.get(name) is not param for owned, name, param in self._entries)


def _is_plain(tensor: Tensor) -> bool:
    """Tells whether a tensor is an ordinary one, outside the transforms of torch.func."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _can_fuse(input: Tensor, weight: Tensor) -> bool:
    return (
        _is_plain(input)
        and input.device == weight.device
        and weight.requires_grad
        and not torch.is_inference_mode_enabled()
        and not torch.jit.is_tracing()
        and torch.autograd.forward_ad._current_level < 0
    )


@contextmanager
def _no_autocast(device: torch.device):
    before = torch.is_autocast_enabled(device.type)
    torch.set_autocast_enabled(device.type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device.type, before)


def _refuse_compiled_autograd() -> None:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    if module is not None and module.in_compiled_autograd_region:
        raise RuntimeError(
            "gradacc_kernels: compiled autograd cannot trace a fused module. Turn it off "
            "(torch._dynamo.config.compiled_autograd = False), or detach the Accumulator."
        )


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _row_major(tensor: Tensor) -> Tensor:
    """An operand that a grouped product takes, also where the gradient is an expanded one."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(frozen=True)
class _Product:
    """A product with a weight: with all of it or one expert's matrix, batched, or grouped."""

    is_batched: bool = False
    expert: int | None = None
    offsets: Tensor | None = None

    def apply(self, input: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Computes x Wᵀ + b."""
        if self.is_batched:
            return input.bmm(matrix.mT)
        if self.offsets is not None:
            return torch._grouped_mm(input, matrix.mT, offs=self.offsets)
        return functional.linear(input, matrix, bias)

    def input_gradient(
        self, dy: Tensor, matrix: Tensor, shape: torch.Size, is_wide: bool
    ) -> Tensor:
        """Computes dy W; the sums themselves, before they are rounded, where ``is_wide``."""
        wide = {"out_dtype": torch.float32} if is_wide else {}
        if self.is_batched:
            return torch.bmm(dy, matrix, **wide)
        if self.offsets is not None:
            return torch._grouped_mm(_row_major(dy), matrix, offs=self.offsets)
        return torch.mm(_as_rows(dy), matrix, **wide).view(shape)

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Computes leftᵀ right."""
        if self.is_batched:
            return left.mT.bmm(right)
        if self.offsets is not None:
            return torch._grouped_mm(_row_major(left).mT, _row_major(right), offs=self.offsets)
        return left.mT.mm(right)


class FusedWeight:
    """Products with a weight whose gradient goes straight into its main gradient.

    Args:
        hooks: which add to it.
        index: of the weight among their parameters.
        weight: [out, in] or [experts, out, in]; [..., in, out] where ``is_transposed``.
        is_transposed: as in Hugging Face's Conv1D and with bmm.
    """

    def __init__(self, hooks: PythonHooks, index: int, weight: Tensor, is_transposed: bool):
        self._hooks = weakref.ref(hooks)
        self._index = index
        self._weight = weight
        self._is_transposed = is_transposed
        self._in_features = weight.shape[-2 if is_transposed else -1]

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """Returns x Wᵀ + b, or None where the ordinary path has to be taken."""
        if not self._fits(input, weight_dim=2):
            return None
        return self._multiply(input, _Product(), bias)

    def expert(self, input: Tensor, expert: int, bias: Tensor | None) -> Tensor | None:
        """Returns x W[expert]ᵀ + b, or None."""
        n_experts = self._weight.shape[0]
        if not self._fits(input, weight_dim=3) or not -n_experts <= expert < n_experts:
            return None
        return self._multiply(input, _Product(expert=expert), bias)

    def batched(self, input: Tensor) -> Tensor | None:
        """Returns x[e] W[e]ᵀ for each expert, or None."""
        if not self._fits(input, weight_dim=3) or input.dim() != 3:
            return None
        if input.shape[0] != self._weight.shape[0]:
            return None
        return self._multiply(input, _Product(is_batched=True), None)

    def grouped(self, input: Tensor, offsets: Tensor) -> Tensor | None:
        """Returns x[r] W[e]ᵀ for the rows r of each expert e, or None.

        Args:
            input: [tokens, in].
            offsets: int32 [experts], the end of each group of rows, as torch._grouped_mm takes it.
        """
        if not self._fits(input, weight_dim=3) or input.dim() != 2:
            return None
        if (
            offsets.dtype != torch.int32
            or offsets.shape != self._weight.shape[:1]
            or offsets.device != self._weight.device
        ):
            return None
        return self._multiply(input, _Product(offsets=offsets), None)

    def _fits(self, input: Tensor, weight_dim: int) -> bool:
        return (
            self._weight.dim() == weight_dim
            and input.dim() >= 1
            and input.shape[-1] == self._in_features
        )

    def _multiply(self, given: Tensor, product: _Product, bias: Tensor | None) -> Tensor | None:
        weight, hooks = self._weight, self._hooks()
        if hooks is None or not _can_fuse(given, weight):
            return None
        input = given
        kind = weight.device.type
        is_autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_autocast else weight.dtype
        if is_autocast:
            if weight.dtype not in (dtype, torch.float32):
                return None
            if not given.is_floating_point() or given.dtype == torch.float64:
                return None
            input = given.to(dtype)
        if input.dtype != dtype:
            return None
        cast = hooks.cast(self._index, dtype)
        return _Multiply.apply(given, weight, bias, _Call(self, hooks, product, input, cast))

    def matrix(self, weight: Tensor, product: _Product) -> Tensor:
        """Returns W, or the expert's part of it, as [..., out, in]."""
        matrix = weight if product.expert is None else weight.select(0, product.expert)
        return matrix.mT if self._is_transposed else matrix

    def operands(self, dy: Tensor, input: Tensor, product: _Product) -> tuple[Tensor, Tensor]:
        """Returns the two whose product is the gradient, in the weight's own orientation."""
        if not product.is_batched and product.offsets is None:
            dy, input = _as_rows(dy), _as_rows(input)
        return (input, dy) if self._is_transposed else (dy, input)

    def add(self, hooks: PythonHooks, left: Tensor, right: Tensor, product: _Product) -> bool:
        """Adds leftᵀ right to the main gradient; False when the hooks' work has ended."""

        def write(main, partials, are_partials_valid, scale, inv_scale, store):
            if product.expert is not None:
                if store:
                    main.zero_()  # the other experts' matrices take part in the window too
                main, partials, store = main[product.expert], None, False
            hooks.backend.wgrad_accumulate_(
                main, left, right, scale, inv_scale, store, partials, product.offsets
            )
            return partials is not None

        return hooks.add(self._index, write)

    def gradient(self, left: Tensor, right: Tensor, product: _Product) -> Tensor:
        """Returns leftᵀ right in the weight's dtype, as stock autograd gives it."""
        gradient = product.weight_gradient(left, right).to(self._weight.dtype)
        if product.expert is None:
            return gradient
        shape = self._weight.shape
        return torch.ops.aten.select_backward(gradient, shape, 0, product.expert)

    def weight(self, cast: Tensor, version: int, is_tracked: bool) -> Tensor:
        """Returns the copy of the weight that was multiplied with, as a function of the weight."""
        if not is_tracked:
            return cast
        is_same = cast.dtype != self._weight.dtype or cast.data_ptr() == self._weight.data_ptr()
        if not is_same or self._weight._version != version:
            raise RuntimeError(
                "gradacc_kernels: a weight was modified in place between forward and a backward "
                "with create_graph=True"
            )
        return self._weight.to(cast.dtype)


class _Call(NamedTuple):
    """What a product needs besides its differentiable arguments.

    ``input`` and ``cast`` are the input and the weight themselves, or the copies of them that take
    part.
    """

    fused: FusedWeight
    hooks: PythonHooks
    product: _Product
    input: Tensor
    cast: Tensor


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, weight, bias, call):
        fused, _, product, input, cast = call
        ctx.set_materialize_grads(False)
        offsets, product = product.offsets, replace(product, offsets=None)
        ctx.call, ctx.version = call._replace(input=None, product=product), weight._version
        ctx.input_dtype = given.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        is_weight_saved = cast is weight and ctx.needs_input_grad[0]
        # Not the parameter itself, whose memory `.data =` may replace.
        saved = weight.detach() if is_weight_saved else None
        ctx.save_for_backward(input, offsets, saved)
        return call.product.apply(input, fused.matrix(cast, product), bias)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None
        _refuse_compiled_autograd()
        fused, hooks, product, _, cast = ctx.call
        input, offsets, saved = ctx.saved_tensors
        product = replace(product, offsets=offsets)
        to_input, to_weight, to_bias = [node for node, _ in (*ctx.next_functions, (None, 0))[:3]]
        # With grad mode on, as under create_graph, the gradients are differentiable ones.
        is_tracked = torch.is_grad_enabled() or not _is_plain(dy) or not _is_plain(input)
        dx = dw = db = None
        with _no_autocast(input.device):
            if PythonHooks.demand(to_input) is not Demand.NOTHING:
                weight = fused.weight(cast if saved is None else saved, ctx.version, is_tracked)
                is_wide = dy.is_cuda and ctx.input_dtype == torch.float32 and not is_tracked
                is_wide = is_wide and dy.dtype != torch.float32
                matrix = fused.matrix(weight, product)
                dx = product.input_gradient(dy, matrix, input.shape, is_wide).to(ctx.input_dtype)
            demand = PythonHooks.demand(to_weight, hooks)
            if demand is not Demand.NOTHING:
                left, right = fused.operands(dy, input, product)
                is_ours = demand is Demand.MAIN_GRAD and not is_tracked
                if not is_ours or not fused.add(hooks, left, right, product):
                    dw = fused.gradient(left, right, product)
            demand = PythonHooks.demand(to_bias)
            if demand is Demand.MAIN_GRAD and not is_tracked:
                db = _as_rows(dy).sum(0, dtype=torch.float32)  # reaches the hook as it is
            elif demand is not Demand.NOTHING:
                db = _as_rows(dy).sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None


class FusedEmbedding:
    """Lookups whose gradient goes straight into the main gradient, row by row.

    Args:
        hooks: which add to it.
        index: of the weight among their parameters.
        weight: [rows, width].
        padding_index: -1 for none.
        is_sparse: what the gradient is where it has to reach autograd as a tensor.
    """

    def __init__(
        self, hooks: PythonHooks, index: int, weight: Tensor, padding_index: int, is_sparse: bool
    ):
        self._hooks = weakref.ref(hooks)
        self._index = index
        self._weight = weight
        self._padding_index = padding_index
        self._is_sparse = is_sparse

    def lookup(self, indices: Tensor) -> Tensor | None:
        """Returns the rows, or None where the ordinary path has to be taken."""
        hooks = self._hooks()
        if hooks is None or indices.dtype not in (torch.int64, torch.int32):
            return None
        if not _can_fuse(indices, self._weight):
            return None
        return _Lookup.apply(self._weight, indices, self, hooks)

    def rows(self, indices: Tensor) -> Tensor:
        """Computes the lookup."""
        return torch.embedding(self._weight, indices, self._padding_index)

    def add(self, hooks: PythonHooks, dy: Tensor, indices: Tensor) -> bool:
        """Adds the rows to the main gradient; False when the hooks' work has ended."""
        padding = None if self._padding_index < 0 else self._padding_index

        def write(main, partials, are_partials_valid, scale, inv_scale, store):
            hooks.backend.embedding_accumulate_(
                main,
                dy,
                indices,
                padding,
                scale,
                inv_scale,
                store,
                partials if are_partials_valid else None,
            )
            return are_partials_valid

        return hooks.add(self._index, write)

    def gradient(self, dy: Tensor, indices: Tensor) -> Tensor:
        """Returns the gradient as stock autograd gives it."""
        return torch.ops.aten.embedding_backward(
            dy, indices, len(self._weight), self._padding_index, False, self._is_sparse
        ).to(self._weight.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _, indices, fused, hooks):
        ctx.set_materialize_grads(False)
        ctx.fused, ctx.hooks = fused, hooks
        ctx.save_for_backward(indices)
        return fused.rows(indices)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None
        _refuse_compiled_autograd()
        demand = PythonHooks.demand(ctx.next_functions[0][0], ctx.hooks)
        (indices,) = ctx.saved_tensors
        is_tracked = torch.is_grad_enabled() or not _is_plain(dy) or not _is_plain(indices)
        is_ours = demand is Demand.MAIN_GRAD and not is_tracked
        if demand is Demand.NOTHING or (is_ours and ctx.fused.add(ctx.hooks, dy, indices)):
            return None, None, None, None
        return ctx.fused.gradient(dy, indices), None, None, None


class FusedLinear:
    """A linear layer's forward, as long as it holds its parameters.

    Args:
        watch: of the layer's parameters.
        weight: the layer's.
        bias: the layer's, or None.
    """

    def __init__(self, watch: ParameterWatch, weight: FusedWeight, bias: Tensor | None):
        self._watch, self._weight, self._bias = watch, weight, bias

    def __call__(self, input: Tensor) -> Tensor | None:
        """Returns the product, or None where the ordinary path has to be taken."""
        return None if self._watch.is_changed() else self._weight.linear(input, self._bias)


class FusedLookup:
    """An embedding's forward, as long as it holds its weight.

    Args:
        watch: of the module's weight.
        embedding: the module's.
    """

    def __init__(self, watch: ParameterWatch, embedding: FusedEmbedding):
        self._watch, self._embedding = watch, embedding

    def __call__(self, indices: Tensor) -> Tensor | None:
        """Returns the rows, or None where the ordinary path has to be taken."""
        return None if self._watch.is_changed() else self._embedding.lookup(indices)

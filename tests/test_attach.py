"""What `.grad` is after attach: the table of its states, and how gradients are summed."""

import pytest
import torch
from hook_cases import arrive, backward, batch, every_hook, micro_gradients, mlp, parameter

import gradacc_kernels as gk

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def is_main(grad, param):
    return (
        grad.dtype == torch.float32
        and grad.data_ptr() == param.main_grad.data_ptr()
        and grad.stride() == param.main_grad.stride()
    )


@every_hook
@DTYPES
def test_none_is_stored_over_stale_memory(hook, dtype):
    device, backend = hook
    param = parameter([0.0] * 5, dtype, device)
    accumulator = gk.attach([param], backend=backend)
    param.main_grad.fill_(float("nan"))
    arrive(param, 3.0)
    assert param.grad.tolist() == [3.0] * 5
    assert is_main(param.grad, param)
    del accumulator


@every_hook
@DTYPES
def test_the_view_is_added_to_in_place(hook, dtype):
    device, backend = hook
    param = parameter([0.0] * 5, dtype, device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    before = param.grad
    version = before._version
    arrive(param, 4.0)
    assert param.grad is before
    assert param.grad._version > version
    assert param.grad.tolist() == [7.0] * 5
    del accumulator


@every_hook
def test_zeros_in_the_view_are_added_to(hook):
    device, backend = hook
    param = parameter([0.0] * 5, device=device)
    accumulator = gk.attach([param], backend=backend)
    optimizer = torch.optim.SGD([param], lr=0.1)
    arrive(param, 3.0)
    optimizer.zero_grad(set_to_none=False)
    assert is_main(param.grad, param)
    arrive(param, 4.0)
    assert param.grad.tolist() == [4.0] * 5
    del accumulator


@every_hook
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_an_assigned_tensor_is_copied_then_added_to(hook, grad_dtype):
    device, backend = hook
    param = parameter([0.0] * 5, device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    assigned = torch.full((5,), 10.0, device=device, dtype=grad_dtype)
    param.grad = assigned
    arrive(param, 4.0)
    assert is_main(param.grad, param)
    assert param.grad.tolist() == [14.0] * 5
    assert assigned.tolist() == [10.0] * 5
    del accumulator


@every_hook
def test_main_grad_takes_what_was_assigned(hook):
    device, backend = hook
    param = parameter([0.0] * 5, device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    param.grad = assigned = torch.full((5,), 10.0, device=device)
    param.main_grad.add_(1.0)
    assert is_main(param.grad, param) and param.grad.tolist() == [11.0] * 5
    assert assigned.tolist() == [10.0] * 5
    param.grad = differentiable = torch.ones(5, device=device, requires_grad=True) * 2
    assert param.main_grad.tolist() == [11.0] * 5 and param.grad is differentiable
    param.grad = None
    assert param.main_grad.tolist() == [11.0] * 5 and param.grad is None
    del accumulator


@every_hook
def test_data_of_grad_replaced_counts_as_assigned(hook):
    device, backend = hook
    param = parameter([0.0] * 5, device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    param.grad.data = param.grad.data / 2
    arrive(param, 4.0)
    assert is_main(param.grad, param)
    assert param.grad.tolist() == [5.5] * 5
    del accumulator


@every_hook
def test_an_assigned_transpose_of_the_view_is_copied(hook):
    device, backend = hook
    param = parameter(torch.zeros(2, 2), torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device))
    param.grad = param.grad.t()
    arrive(param, 10.0)
    assert param.grad.tolist() == [[11.0, 13.0], [12.0, 14.0]]
    assert is_main(param.grad, param)
    del accumulator


@every_hook
def test_a_parameter_without_gradient_keeps_none(hook):
    device, backend = hook
    model = mlp(device)
    gk.attach(model, backend=backend)
    unused = model[3]
    model[0](batch(device)).sum().backward()
    assert unused.weight.grad is None and unused.bias.grad is None
    assert is_main(model[0].weight.grad, model[0].weight)


@every_hook
def test_small_addends_are_not_lost(hook):
    device, backend = hook
    attached, stock = parameter([0.0], device=device), parameter([0.0], device=device)
    accumulator = gk.attach([attached], backend=backend)
    for value in (256.0, 1.0, 1.0):
        arrive(attached, value)
        arrive(stock, value)
    assert attached.grad.item() == 258.0
    assert stock.grad.item() == 256.0  # the control: bfloat16 loses both
    del accumulator


@every_hook
def test_storing_first_equals_zeroing_and_adding(hook):
    device, backend = hook
    torch.manual_seed(1)
    grads = [torch.randn(1000, device=device).bfloat16() for _ in range(3)]
    sums = []
    for zeroed in (False, True):
        param = parameter(torch.zeros(1000), device=device)
        accumulator = gk.attach([param], scale=0.3, backend=backend)
        if zeroed:
            param.grad = torch.zeros(1000, device=device)
        for grad in grads:
            arrive(param, grad)
        sums.append(param.grad.clone())
        accumulator.detach()
    assert sums[0].equal(sums[1])


@every_hook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_micro_batches_keep_the_derived_bound(hook, dtype):
    device, backend = hook
    count, n = 1024, 257
    grads = (torch.randn(count, n, device=device) * 0.01 + 0.1).to(dtype)
    attached, stock = (parameter(torch.zeros(n), dtype, device) for _ in range(2))
    accumulator = gk.attach([attached], backend=backend)
    for grad in grads:
        arrive(attached, grad)
        arrive(stock, grad)
    exact = grads.double().cpu().sum(0)
    magnitude = grads.double().cpu().abs().sum(0)
    bound = (count + 1) * 2.0**-24 * magnitude + count * 2.0**-150
    assert ((attached.grad.double().cpu() - exact).abs() <= bound).all()
    assert ((stock.grad.double().cpu() - exact).abs() > bound).any()
    del accumulator


@every_hook
def test_scale_and_inv_scale(hook):
    device, backend = hook
    param = parameter([0.0], device=device)
    accumulator = gk.attach([param], scale=0.25, backend=backend)
    assert accumulator.inv_scale.shape == () and accumulator.inv_scale.device == param.device
    accumulator.inv_scale.fill_(0.5)
    arrive(param, 8.0)
    accumulator.inv_scale.fill_(2.0)
    arrive(param, 8.0)
    assert param.grad.item() == 8 * 0.25 * 0.5 + 8 * 0.25 * 2


@every_hook
def test_a_model_gets_the_exact_sum_of_its_micro_gradients(hook):
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(3)]
    micro = micro_gradients(model, inputs)
    gk.attach(model, backend=backend)
    for x in inputs:
        backward(model, x)
    for param, *grads in zip(model.parameters(), *micro, strict=True):
        expected = grads[0].float() + grads[1].float() + grads[2].float()
        assert param.grad.equal(expected)


@every_hook
def test_one_buffer_holds_all(hook):
    device, backend = hook
    model = mlp(device)
    gk.attach(model, backend=backend)
    backward(model, batch(device))
    storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == 1


@every_hook
def test_clipping_and_a_stock_optimizer_over_float32_parameters(hook):
    device, backend = hook
    torch.manual_seed(2)
    attached = mlp(device, torch.float32)
    stock = mlp(device, torch.float32)
    stock.load_state_dict(attached.state_dict())
    gk.attach(attached, backend=backend)
    x = [batch(device, torch.float32) for _ in range(2)]
    for model in (attached, stock):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            for inputs in x:
                backward(model, inputs)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(attached.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@every_hook
def test_float64_parameters_sum_in_float64(hook):
    device, backend = hook
    double, half = parameter([0.0], torch.float64, device), parameter([0.0], device=device)
    accumulator = gk.attach([double, half], backend=backend)
    for value in (1.0, 2.0**-40):
        arrive(double, value)
    arrive(half, 1.0)
    assert double.grad.dtype == torch.float64
    assert double.grad.item() == 1 + 2.0**-40
    assert "torch.float64 main gradients" in repr(accumulator)
    assert "backend reference" in repr(accumulator)
    assert accumulator.grad_norm().item() == pytest.approx(2**0.5)


@every_hook
def test_channels_last_keeps_its_strides(hook):
    device, backend = hook
    conv = torch.nn.Conv2d(4, 8, 3).to(device, torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    expected = micro_gradients(conv, [x])[0]
    gk.attach(conv, backend=backend)
    backward(conv, x)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.grad.equal(expected[0].float())


@every_hook
def test_expanded_and_aliased_gradients_are_not_written(hook):
    device, backend = hook
    left, right = (parameter(torch.zeros(3, 4), torch.float32, device) for _ in range(2))
    accumulator = gk.attach([left, right], backend=backend)
    delivered = torch.full((3, 4), 5.0, device=device)
    for _ in range(2):
        (left + right).backward(delivered)  # one storage, two leaves
        left.sum().backward()  # stride 0
    assert delivered.unique().tolist() == [5.0]
    assert left.grad.unique().tolist() == [12.0]
    assert right.grad.unique().tolist() == [10.0]
    del accumulator


@every_hook
def test_sparse_embedding_gradients_are_summed_in_float32(hook):
    device, backend = hook
    table = torch.nn.Embedding(10, 4, sparse=True).to(device, torch.bfloat16)
    gk.attach(table, backend=backend)
    indices = torch.tensor([3] * 300 + [5], device=device)  # 300 is no bfloat16
    table(indices).sum().backward()
    table(indices).sum().backward()
    assert table.weight.grad[3].tolist() == [600.0] * 4
    assert table.weight.grad[5].tolist() == [2.0] * 4
    assert table.weight.grad[0].tolist() == [0.0] * 4


@every_hook
def test_the_uses_of_a_tied_weight_are_summed_in_float32(hook):
    device, backend = hook

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(1, 1, bias=False).to(device, torch.bfloat16)
            self.b = torch.nn.Linear(1, 1, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    model = Tied()
    inputs = [torch.full((1, 1), v, device=device).bfloat16() for v in (1.0, 1 / 512)]
    model(*inputs).backward()
    assert model.a.weight.grad.item() == 1.0  # the control
    model.zero_grad()
    accumulator = gk.attach(model, backend=backend)
    model(*inputs).backward()
    assert model.a.weight.grad.item() == 1 + 1 / 512
    accumulator.detach()
    assert model.a.weight.grad_dtype == torch.bfloat16


@every_hook
def test_expose_for_replayed_graphs(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    backward(model, batch(device))
    sums = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    accumulator.expose()
    for param, expected in zip(model.parameters(), sums, strict=True):
        assert is_main(param.grad, param) and param.grad.equal(expected)


@every_hook
def test_main_grad_is_absent_elsewhere_and_can_be_assigned(hook):
    device, backend = hook
    param, other = parameter([0.0], device=device), parameter([0.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    assert not hasattr(other, "main_grad")
    other.main_grad = "of another library"
    assert other.main_grad == "of another library"
    accumulator.detach()
    assert not hasattr(param, "main_grad")


def test_repr_tells_what_is_covered():
    model = mlp()
    model[0].bias.requires_grad_(False)
    accumulator = gk.attach(model, scale=0.5, backend="reference")
    text = repr(accumulator)
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "5 parameters (1 frozen ones left out)" in text
    assert f"{elements:,} elements" in text
    assert "backend reference, Python hook" in text
    assert "scale 0.5" in text

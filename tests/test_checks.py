"""What the ops refuse: one message on every backend, and nothing written before it."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from gradacc_kernels import ops

GRAD_DTYPES = r"torch\.float16, torch\.bfloat16 or torch\.float32"
# The reference alone takes float64 main gradients, and says so.
MAIN_DTYPES = r"torch\.float32(?: or torch\.float64)?"
DENSE = r"must be dense in memory, without gaps or overlap, got sizes \[2, 3\] with other strides"


def valid(device):
    """Arguments of accumulate_ that no check objects to; each case spoils one of them."""
    return {
        "main_grad": torch.randn(2, 3, device=device),
        "grad": torch.randn(2, 3, device=device).bfloat16(),
        "scale": 0.5,
        "inv_scale": torch.tensor(0.5, device=device),
        "partials": torch.randn(1, device=device),
    }


def as_lists(args):
    """The same as the second of two entries of multi_accumulate_."""
    spare = valid(args["main_grad"].device)
    return {
        "main_grads": [spare["main_grad"], args["main_grad"]],
        "grads": [spare["grad"], args["grad"]],
        "scale": args["scale"],
        "inv_scale": args["inv_scale"],
        "partials": [spare["partials"], args["partials"]],
    }


def tensors_in(args):
    values = [v for arg in args.values() for v in (arg if isinstance(arg, list) else [arg])]
    return [v for v in values if isinstance(v, torch.Tensor) and v.device.type != "meta"]


def state(args):
    """Values and version of every tensor among the arguments."""
    return [(t.detach().clone().to_dense(), t._version) for t in tensors_in(args)]


def assert_refused(op, args, backend, error, message):
    before = state(args)
    with pytest.raises(error) as caught:
        op(**args, backend=backend)
    assert caught.type is error
    assert re.fullmatch(message, str(caught.value)), str(caught.value)
    for (was, version), (now, now_version) in zip(before, state(args), strict=True):
        assert now_version == version
        assert now.dtype == was.dtype and torch.equal(now, was)


def strided_slice(args):
    return {"main_grad": torch.randn(2, 6, device=args.main_grad.device)[:, ::2]}


# Name: (what is spoilt, the exception, the message after "accumulate_: ").
REFUSED = {
    "main-float16": (
        lambda a: {"main_grad": a.main_grad.half()},
        TypeError,
        rf"main_grad must be {MAIN_DTYPES}, got torch\.float16",
    ),
    "main-int32": (
        lambda a: {"main_grad": a.main_grad.int()},
        TypeError,
        rf"main_grad must be {MAIN_DTYPES}, got torch\.int32",
    ),
    "main-expanded": (
        lambda a: {"main_grad": a.main_grad[:, :1].clone().expand(2, 3)},
        ValueError,
        f"main_grad {DENSE}",
    ),
    "main-strided-slice": (strided_slice, ValueError, f"main_grad {DENSE}"),
    "main-sparse": (
        lambda a: {"main_grad": a.main_grad.to_sparse()},
        ValueError,
        "main_grad must be dense in memory, .* got sizes .* of a sparse layout",
    ),
    "main-requires-grad": (
        lambda a: {"main_grad": a.main_grad.requires_grad_()},
        ValueError,
        r"main_grad must not require grad: pass a detached tensor or its \.data",
    ),
    "grad-float64": (
        lambda a: {"grad": a.grad.double()},
        TypeError,
        rf"grad must be {GRAD_DTYPES}, got torch\.float64",
    ),
    "grad-int64": (
        lambda a: {"grad": a.grad.long()},
        TypeError,
        rf"grad must be {GRAD_DTYPES}, got torch\.int64",
    ),
    "grad-complex": (
        lambda a: {"grad": a.grad.to(torch.complex64)},
        TypeError,
        rf"grad must be {GRAD_DTYPES}, got torch\.complex64",
    ),
    "grad-shape": (
        lambda a: {"grad": a.grad.t()},
        ValueError,
        r"grad must have the shape of its main gradient, \[2, 3\], got \[3, 2\]",
    ),
    "grad-broadcastable": (
        lambda a: {"grad": a.grad[:1]},
        ValueError,
        r"grad must have the shape of its main gradient, \[2, 3\], got \[1, 3\]",
    ),
    "grad-overlaps-main": (
        lambda a: {
            "main_grad": a.overlapping[:6].view(2, 3),
            "grad": a.overlapping[2:8].view(2, 3),
        },
        ValueError,
        "grad must not overlap a main gradient in memory: pass a clone",
    ),
    "grad-expanded-from-main": (
        lambda a: {
            "main_grad": a.overlapping[:6].view(2, 3),
            "grad": a.overlapping[:1].expand(2, 3),
        },
        ValueError,
        "grad must not overlap a main gradient in memory: pass a clone",
    ),
    "partials-shape": (
        lambda a: {"partials": a.partials.new_zeros(2)},
        ValueError,
        r"partials must be contiguous of shape \[num_chunks\(numel\)\] = \[1\], got \[2\]",
    ),
    "partials-dimensions": (
        lambda a: {"partials": a.partials.view(1, 1)},
        ValueError,
        r"partials must be contiguous of shape \[num_chunks\(numel\)\] = \[1\], got \[1, 1\]",
    ),
    "partials-float64": (
        lambda a: {"partials": a.partials.double()},
        TypeError,
        r"partials must be torch\.float32, got torch\.float64",
    ),
}
# The same, of arguments that all entries of a list share.
REFUSED_SCALARS = {
    "inv-scale-float64": (
        lambda a: {"inv_scale": a.inv_scale.double()},
        TypeError,
        r"inv_scale must be torch\.float32, got torch\.float64",
    ),
    "inv-scale-size": (
        lambda a: {"inv_scale": a.inv_scale.expand(2)},
        ValueError,
        r"inv_scale must hold one element, got shape \[2\]",
    ),
    **{
        f"scale-{scale}": (
            lambda a, scale=scale: {"scale": scale},
            ValueError,
            rf"scale must be finite in float32, got -?{text}",
        )
        for scale, text in (
            (math.inf, "inf"),
            (-math.inf, "inf"),
            (math.nan, "nan"),
            (1e39, r"1e\+39"),
            (-3.41e38, r"3\.41e\+38"),
        )
    },
}


def spoilt(change, device):
    args = valid(device)
    view = SimpleNamespace(**args, overlapping=torch.randn(8, device=device))
    return args | change(view)


def cases(table):
    return [pytest.param(*case, id=name) for name, case in table.items()]


@pytest.mark.parametrize("change, error, message", cases(REFUSED | REFUSED_SCALARS))
def test_accumulate_refuses(backend, change, error, message):
    args = spoilt(change, backend.device)
    assert_refused(ops.accumulate_, args, backend.name, error, f"accumulate_: {message}")


@pytest.mark.parametrize("change, error, message", cases(REFUSED))
def test_multi_accumulate_names_the_entry_it_refuses(backend, change, error, message):
    args = as_lists(spoilt(change, backend.device))
    name, rest = message.split(" ", 1)
    name = {"main_grad": "main_grads", "grad": "grads"}.get(name, name)
    message = rf"multi_accumulate_: {name}\[1\] {rest}"
    assert_refused(ops.multi_accumulate_, args, backend.name, error, message)


@pytest.mark.parametrize("change, error, message", cases(REFUSED_SCALARS))
def test_multi_accumulate_refuses(backend, change, error, message):
    args = as_lists(spoilt(change, backend.device))
    assert_refused(
        ops.multi_accumulate_, args, backend.name, error, f"multi_accumulate_: {message}"
    )


def test_the_valid_arguments_are_valid(backend):
    args = valid(backend.device)
    before = state(args)[0][0]
    ops.accumulate_(**args, backend=backend.name)
    assert not torch.equal(args["main_grad"], before)
    ops.multi_accumulate_(**as_lists(args), backend=backend.name)


@pytest.mark.parametrize("spare", ["main_grads", "grads", "partials", "stores"])
def test_lists_have_one_length(backend, spare):
    args = as_lists(valid(backend.device)) | {"stores": [False, True]}
    args[spare] = args[spare] + args[spare][:1]
    name, expected, got = ("grads", 3, 2) if spare == "main_grads" else (spare, 2, 3)
    message = (
        f"multi_accumulate_: {name} must have one entry per main gradient, {expected}, got {got}"
    )
    assert_refused(ops.multi_accumulate_, args, backend.name, ValueError, message)


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_main_gradients_of_a_list_do_not_overlap(backend, shift):
    memory = torch.randn(12, device=backend.device)
    mains = [memory[shift : shift + 6], memory[:6]]
    message = "{}: main_grads must not overlap in memory: an element can be updated once a call"
    args = {"main_grads": mains, "grads": [main.half() for main in mains]}
    assert_refused(
        ops.multi_accumulate_, args, backend.name, ValueError, message.format("multi_accumulate_")
    )
    args = {"main_grads": mains, "factor": torch.tensor(0.5, device=backend.device)}
    assert_refused(ops.scale_, args, backend.name, ValueError, message.format("scale_"))


def test_neighbours_do_not_overlap(backend):
    memory = torch.zeros(12, device=backend.device)
    mains = [memory[6:], memory[:6], memory[3:3]]
    ops.multi_accumulate_(mains, [torch.ones_like(m) for m in mains], backend=backend.name)
    assert memory.tolist() == [1.0] * 12


def test_gradient_may_be_its_main_gradient_but_no_other(backend):
    mains = [torch.full((6,), 2.0, device=backend.device) for _ in range(2)]
    ops.multi_accumulate_(mains, mains, backend=backend.name)
    assert [main.tolist() for main in mains] == [[4.0] * 6] * 2
    args = {"main_grads": mains, "grads": mains[::-1]}
    message = r"multi_accumulate_: grads\[0\] must not overlap a main gradient .*: pass a clone"
    assert_refused(ops.multi_accumulate_, args, backend.name, ValueError, message)


def test_unknown_backend():
    message = r"backend must be 'auto' or one of \('cuda', 'triton', .*\), got 'cublas'"
    assert_refused(ops.accumulate_, valid("cpu"), "cublas", ValueError, message)
    assert_refused(ops.multi_accumulate_, as_lists(valid("cpu")), "cublas", ValueError, message)
    args = {"main_grads": [torch.ones(3)], "factor": torch.tensor(0.5)}
    assert_refused(ops.scale_, args, "cublas", ValueError, message)
    assert_refused(ops.grad_stats, {"main_grads": [torch.ones(3)]}, "cublas", ValueError, message)


WAY_OUT = "; backend='auto' takes one that does"


def test_backend_that_does_not_serve_the_device():
    message = rf"backend 'cuda' does not serve torch\.float32 main gradients on cpu{WAY_OUT}"
    assert_refused(ops.accumulate_, valid("cpu"), "cuda", ValueError, message)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_backend_that_does_not_serve_the_gpu():
    message = rf"backend 'cpu' does not serve torch\.float32 main gradients on cuda:0{WAY_OUT}"
    assert_refused(ops.accumulate_, valid("cuda"), "cpu", ValueError, message)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["grad", "inv_scale", "partials"])
def test_tensors_on_two_devices(backend, name):
    other = "cpu" if backend.device == "cuda" else "cuda"
    args = valid(backend.device)
    args[name] = args[name].to(other)
    message = rf"accumulate_: {name} must be on {backend.device}(:0)?, got {other}(:0)?"
    assert_refused(ops.accumulate_, args, backend.name, ValueError, message)


@pytest.mark.parametrize("name", ["grad", "inv_scale", "partials"])
def test_accumulate_refuses_a_tensor_without_memory(backend, name):
    args = valid(backend.device)
    args[name] = args[name].to("meta")
    message = rf"accumulate_: {name} must be on {backend.device}(:0)?, got meta"
    assert_refused(ops.accumulate_, args, backend.name, ValueError, message)


def test_statistics_and_scale_refuse_a_tensor_without_memory(backend):
    ones = torch.ones(3, device=backend.device)
    message = rf"{{}} must be on {backend.device}(:0)?, got meta"
    args = {"main_grads": [ones], "factor": torch.tensor(0.5, device="meta")}
    assert_refused(ops.scale_, args, backend.name, ValueError, message.format("scale_: factor"))
    args = {"main_grads": [ones, ones.to("meta")]}
    message = message.format(r"grad_stats: main_grads\[1\]")
    assert_refused(ops.grad_stats, args, backend.name, ValueError, message)


@pytest.mark.parametrize("backend_name", ["cpu", "triton"])
def test_float64_belongs_to_the_reference(backend_name):
    args = valid("cpu") | {"main_grad": torch.randn(2, 3, dtype=torch.float64), "partials": None}
    message = (
        rf"backend '{backend_name}' does not serve torch\.float64 main gradients on cpu{WAY_OUT}"
    )
    assert_refused(ops.accumulate_, args, backend_name, ValueError, message)


@pytest.mark.parametrize("name", ["main_grads", "partials"])
def test_grad_stats_refuses_lists(backend, name):
    ones = torch.ones(2, 3, device=backend.device)
    for tensors, error, message in (
        ([], ValueError, "{} must hold at least one tensor, got none"),
        ([ones, ones.half()], TypeError, rf"{{}}\[1\] must be {MAIN_DTYPES}, got torch\.float16"),
        ([ones, ones[:, :1].expand(2, 3)], ValueError, rf"{{}}\[1\] {DENSE}"),
    ):
        message = f"grad_stats: {message.format(name)}"
        assert_refused(ops.grad_stats, {name: tensors}, backend.name, error, message)


def test_grad_stats_takes_one_of_two_lists(backend):
    ones = [torch.ones(3, device=backend.device)]
    for args, got in (({}, "neither"), ({"main_grads": ones, "partials": ones}, "both")):
        message = f"grad_stats: pass either main_grads or partials, got {got}"
        assert_refused(ops.grad_stats, args, backend.name, ValueError, message)


def test_scale_refuses(backend):
    main = torch.randn(2, 3, device=backend.device)
    half = torch.tensor(0.5, device=backend.device)
    for mains, factor, error, message in (
        ([main], half.double(), TypeError, r"factor must be torch\.float32, got torch\.float64"),
        ([main], half.expand(2), ValueError, r"factor must hold one element, got shape \[2\]"),
        (
            [main, main.bfloat16()],
            half,
            TypeError,
            rf"main_grads\[1\] must be {MAIN_DTYPES}, got torch\.bfloat16",
        ),
        ([main, main[:, :1].clone().expand(2, 3)], half, ValueError, rf"main_grads\[1\] {DENSE}"),
    ):
        args = {"main_grads": mains, "factor": factor}
        assert_refused(ops.scale_, args, backend.name, error, f"scale_: {message}")

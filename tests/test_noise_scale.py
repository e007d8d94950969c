"""NoiseScale: unbiased by Monte Carlo; the formula, of fp64 gradients of every micro-batch."""

import copy
import math

import pytest
import torch
from hook_cases import backward, batch, every_hook, mlp
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc_kernels as gk
from gradacc_kernels.noise_scale import NoiseScale

NAN = float("nan")
SIGMAS = 5  # of the standard error of a mean: missed once in 1.7 million


def formula(sums, counts):
    """S and |G|^2 of token-sum gradients, fp64."""
    n, k = sum(counts), len(counts)
    a = sum((s.square().sum() / c).item() for s, c in zip(sums, counts, strict=True))
    big = (sum(sums) / n).square().sum().item()
    noise = (a - n * big) / (k - 1)
    return noise, big - noise / n


def token_gradients(mean, std, counts):
    return [mean + std * torch.randn(n, len(mean), dtype=torch.float64) for n in counts]


def deliver(param, grad):
    (param * grad.to(param.dtype)).sum().backward()


# Monte Carlo: gradients of a token are normal, of mean G and covariance diag(std^2).
#   S (K - 1) = sum of std_i^2 chi^2_(K-1)                  Var S = 2 sum std^4 / (K - 1)
#   big = |G + normal of covariance diag(std^2) / N|^2      Var big = 4 sum (G std)^2 / N + 2 sum
#   and big is independent of S                                       std^4 / N^2

COUNTS, WINDOWS = [1, 40, 2, 17], 600


@pytest.fixture(scope="module")
def windows():
    """The estimates of many windows, by tokens as they are, and by tokens treated as even."""
    torch.manual_seed(0)
    mean, std = 0.3 * torch.randn(32).double(), torch.rand(32).double()
    param = torch.nn.Parameter(torch.zeros(32, dtype=torch.float64))
    accumulator = gk.attach([param])
    right, even = NoiseScale(accumulator, 0), NoiseScale(accumulator, 0)
    estimates = []
    for _ in range(WINDOWS):
        for count, grads in zip(COUNTS, token_gradients(mean, std, COUNTS), strict=True):
            deliver(param, grads.sum(0))
            right.observe(count)
            even.observe(sum(COUNTS) / len(COUNTS))
        right.update()
        even.update()
        estimates.append(torch.stack([right.estimate, even.estimate]))
        param.grad = None
    return mean, std, torch.stack(estimates).mean(0)


def test_estimates_are_unbiased_for_uneven_counts(windows):
    mean, std, ((noise, signal), _) = windows
    n, k = sum(COUNTS), len(COUNTS)
    of_noise = 2 * std.pow(4).sum() / (k - 1)
    of_big = 4 * (mean * std).square().sum() / n + 2 * std.pow(4).sum() / n**2
    true_noise, true_signal = std.square().sum(), mean.square().sum()
    assert (noise - true_noise).abs() <= SIGMAS * (of_noise / WINDOWS).sqrt()
    of_signal = of_big + of_noise / n**2
    assert (signal - true_signal).abs() <= SIGMAS * (of_signal / WINDOWS).sqrt()


def test_counts_treated_as_even_are_wrong(windows):
    """The control: E S is too large by |G|^2 (sum of n^2 - N^2 / K) / ((K - 1) N / K)."""
    mean, std, (_, (noise, signal)) = windows
    n, k = sum(COUNTS), len(COUNTS)
    spread = sum(c * c for c in COUNTS) - n * n / k
    bias = mean.square().sum() * spread / ((k - 1) * n / k)
    assert (noise - std.square().sum() - bias).abs() <= 0.1 * bias
    assert noise / signal > 2 * std.square().sum() / mean.square().sum()


# Of real models, against the gradients that autograd has of each micro-batch


def micro_gradients(model, data):
    """Token-sum gradients in float64: n times those of the mean loss."""
    double = copy.deepcopy(model).double()
    params = list(double.parameters())
    flat = []
    for x, count in data:
        loss = double(x.double()).square().sum() / max(1, count)
        grads = torch.autograd.grad(loss, params)
        flat.append(count * torch.cat([grad.flatten() for grad in grads]))
    return flat


def mean_backward(model, x, count, factor=1.0):
    (model(x).float().square().sum() / max(1, count) * factor).backward()


def data_of(counts, device="cpu", dtype=torch.float32):
    return [(batch(device, dtype, rows=max(1, n)), n) for n in counts]


def assert_formula(noise, model, data, error=1e-4):
    """To a relative error of squared norms: what is left of them after differences has more."""
    sums, counts = micro_gradients(model, data), [n for _, n in data]
    counted = [(s, n) for s, n in zip(sums, counts, strict=True) if n]
    sums, counts = zip(*counted, strict=True)
    (ours, theirs), n = (noise.estimate.tolist(), formula(sums, counts)), sum(counts)
    a = sum((s.square().sum() / c).item() for s, c in counted)
    bound = 2 * error * a / (len(counts) - 1)  # N big <= A
    assert abs(ours[0] - theirs[0]) <= bound
    assert abs(ours[1] - theirs[1]) <= bound / n + error * a / n
    assert noise.value == (ours[0] / ours[1] if ours[1] > 0 else math.inf)


@every_hook
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_formula_over_windows_with_weights(hook, queueing, fuse, set_to_none):
    device, backend = hook
    torch.manual_seed(3)
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend, fuse=fuse, scale=0.5)
    noise = NoiseScale(accumulator, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for counts in ([3, 9], [5, 1, 0, 7], [2, 2, 2]):
        data = data_of(counts, device)
        for x, n in data:
            with accumulator.micro_batch(n):
                mean_backward(model, x, n)
            noise.observe()
        noise.update()
        assert_formula(noise, model, data)
        accumulator.step(optimizer)
        optimizer.zero_grad(set_to_none=set_to_none)


def test_sixteen_bit_parameters():
    torch.manual_seed(0)
    model = mlp()
    accumulator = gk.attach(model, fuse=True)
    noise, data = NoiseScale(accumulator, 0), data_of([4, 2, 9], dtype=torch.bfloat16)
    for x, n in data:
        with accumulator.micro_batch(n):
            mean_backward(model, x, n)
        noise.observe()
    noise.update()
    assert_formula(noise, model, data, error=0.05)  # activations of 8 bits, 2^-8 a product


def test_a_loss_scale_that_changes_in_the_window():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    noise, data = NoiseScale(accumulator, 0), data_of([4, 2, 9])
    for factor, (x, n) in zip((8.0, 64.0, 2.0), data, strict=True):
        accumulator.inv_scale.fill_(1 / factor)
        with accumulator.micro_batch(n):
            mean_backward(model, x, n, factor)
        noise.observe()
    noise.update()
    assert_formula(noise, model, data)


def test_a_parameter_without_a_gradient_has_no_old_one():
    """Its part of the buffer still holds the last window's sums."""
    model = mlp(dtype=torch.float32)
    head = torch.nn.Linear(16, 8)
    both = torch.nn.ModuleList([model, head])
    accumulator = gk.attach(both)
    noise = NoiseScale(accumulator, 0)
    with accumulator.micro_batch(1):
        (1e3 * head(batch(dtype=torch.float32))).sum().backward()
    noise.observe()
    noise.update()
    for param in accumulator._attachment.params.values():
        param.grad = None
    data = data_of([4, 2, 9])
    for x, n in data:
        with accumulator.micro_batch(n):
            mean_backward(model, x, n)
        noise.observe()
    noise.update()
    assert_formula(noise, model, data)


@pytest.mark.parametrize("weighted", [True, False])
def test_dropped_micro_batches_do_not_count(weighted):
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model, nonfinite="skip_micro_batch")
    noise, data = NoiseScale(accumulator, 0), data_of([5, 5, 5])
    bad = (data[0][0] * NAN, 5)
    for x, n in (data[0], bad, *data[1:]):
        with accumulator.micro_batch(n if weighted else None):
            mean_backward(model, x, n, 1 if weighted else n)
        noise.observe(None if weighted else n)
    noise.update()
    assert_formula(noise, model, data)


def test_what_a_window_may_be():
    """NaN, one micro-batch, a dropped or unseen window move nothing; those after them do."""
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    backward(model, batch(dtype=torch.float32))
    noise = NoiseScale(accumulator, 0)
    assert math.isnan(noise.value)
    with pytest.raises(RuntimeError, match="the noise scale is nan"):
        noise.suggested_micro_batches()

    def observe(data):
        for x, n in data:
            with accumulator.micro_batch(n):
                mean_backward(model, x, n)
            noise.observe()

    def close():
        noise.update()
        model.zero_grad()

    backward(model, batch(dtype=torch.float32))
    noise.observe()  # of a window that had begun before
    close()
    observe(data_of([4]))
    close()
    observe([(batch(dtype=torch.float32) * NAN, 4), *data_of([3])])
    close()
    close()  # of none
    assert math.isnan(noise.value)
    observe(data_of([7, 1]))
    model.zero_grad()  # without update
    for _ in range(2):  # without weights, after a window with weights that was dropped
        backward(model, batch(dtype=torch.float32))
        noise.observe()
    assert noise.state_dict()["window"][1:] == [2, 2]
    model.zero_grad()
    data = data_of([4, 2, 9])
    observe(data)
    close()
    assert_formula(noise, model, data)
    observe(data_of([6]))
    model.double()  # other buffers
    observe([(x.double(), n) for x, n in data_of([6])])
    close()
    assert_formula(noise, model, data)
    data = [(x.double(), n) for x, n in data_of([5, 8])]
    observe(data)
    close()
    assert_formula(noise, model, data)


def test_smoothing_takes_numerator_and_denominator_apart():
    torch.manual_seed(5)
    mean, std, counts = torch.ones(32).double(), torch.rand(32).double(), [3, 1, 6]
    param = torch.nn.Parameter(torch.zeros(32, dtype=torch.float64))
    noise = NoiseScale(gk.attach([param]), 0.75)
    pairs, weights = [], []
    for _ in range(6):
        sums = [grads.sum(0) for grads in token_gradients(mean, std, counts)]
        for count, grad in zip(counts, sums, strict=True):
            deliver(param, grad)
            noise.observe(count)
        noise.update()
        param.grad = None
        pairs.append(formula(sums, counts))
        weights = [0.75 * w for w in weights] + [0.25]
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        means = shares @ torch.tensor(pairs, dtype=torch.float64)
        torch.testing.assert_close(noise.estimate, means, rtol=1e-9, atol=0)
    assert noise.value == pytest.approx((means[0] / means[1]).item())
    assert noise.suggested_micro_batches(0.05) == round(noise.value / 0.05)
    assert noise.suggested_micro_batches(1e9) == 1


def test_a_signal_lost_in_the_noise():
    param = torch.nn.Parameter(torch.zeros(32))
    noise = NoiseScale(gk.attach([param]))
    for sign in (1, -1):
        deliver(param, sign * torch.ones(32))
        noise.observe()
    noise.update()
    assert noise.value == math.inf
    with pytest.raises(RuntimeError, match="noise scale is inf"):
        noise.suggested_micro_batches(3)


# Sampling


def test_sampled_lines_are_spread_evenly():
    """Of every parameter the same share, but for a line, and always the same ones."""
    shapes = [(64, 320), (5,), (1000, 33), (0, 3), (777,)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    accumulator = gk.attach(params)
    first, again = (NoiseScale(accumulator, max_elements=8192) for _ in range(2))
    (sample,) = first._samples
    assert sample.rows.equal(again._samples[0].rows)
    ends = torch.tensor(accumulator._attachment.groups[0].buffer.ends) // 32
    bounds = torch.tensor([0, *ends.tolist()])
    share = 256 / int(ends[-1])
    found = torch.histogram(sample.rows.double(), bounds.unique().double() - 0.5).hist
    lines = bounds.unique().diff()
    assert len(sample.rows) == 256 and len(found) == 4  # one is empty
    assert (found - share * lines).abs().max() <= 2  # a line of each end


def test_a_sample_of_equal_elements_is_the_whole():
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 64), (32, 7), (640,))]
    accumulator = gk.attach(params)
    whole = NoiseScale(accumulator, 0, max_elements=None)
    sampled = NoiseScale(accumulator, 0, max_elements=1000)
    some = NoiseScale(accumulator, 0, parameters=params[1:])
    assert len(sampled._samples[0].rows) == 31 < len(whole._samples[0].rows)
    for value in (1.0, 4.0, 2.5):
        sum((param * value).sum() for param in params).backward()
        for noise in (whole, sampled, some):
            noise.observe()
    for noise in (whole, sampled, some):
        noise.update()
    torch.testing.assert_close(sampled.estimate, whole.estimate, rtol=1e-6, atol=0)
    share = (32 * 7 + 640) / sum(param.numel() for param in params)
    torch.testing.assert_close(some.estimate, share * whole.estimate, rtol=1e-6, atol=0)


# Saving, and what must not happen


def test_a_window_in_the_middle_is_resumed():
    torch.manual_seed(1)
    models = [mlp(dtype=torch.float32) for _ in range(3)]
    models[1].load_state_dict(models[0].state_dict())
    models[2].load_state_dict(models[0].state_dict())
    data = data_of([4, 2, 9, 1])

    def run(model, noise, accumulator, data):
        for x, n in data:
            with accumulator.micro_batch(n):
                mean_backward(model, x, n)
            noise.observe()

    whole, first, second = ((m, gk.attach(m)) for m in models)
    noises = [NoiseScale(accumulator, 0.5) for _, accumulator in (whole, first, second)]
    for (model, accumulator), noise in zip((whole, first), noises, strict=False):
        run(model, noise, accumulator, data)
        noise.update()
        model.zero_grad()
        run(model, noise, accumulator, data[:2])
    run(whole[0], noises[0], whole[1], data[2:])
    noises[0].update()
    second[1].load_state_dict(first[1].state_dict())
    noises[2].load_state_dict(noises[1].state_dict())
    run(second[0], noises[2], second[1], data[2:])
    noises[2].update()
    assert noises[2].estimate.equal(noises[0].estimate)
    with pytest.raises(ValueError, match=r"NoiseScale.state_dict"):
        noises[2].load_state_dict({"means": [0.0]})


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_inside_of_a_window():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    noise, data = NoiseScale(accumulator), data_of([4, 2])
    for x, n in data:
        with accumulator.micro_batch(n):
            mean_backward(model, x, n)
        with NoSync():
            noise.observe()
    with NoSync():
        noise.update()
        noise.estimate  # noqa: B018
    with pytest.raises(AssertionError), NoSync():
        torch.ones(()).item()


def test_bad_arguments():
    model = mlp(dtype=torch.float32)
    with pytest.raises(TypeError, match="expected the Accumulator"):
        NoiseScale(model)
    accumulator = gk.attach(model)
    for options, match in (
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"max_elements": 0}, "max_elements must be a positive int or None, got 0"),
        ({"parameters": []}, "got no parameters"),
        ({"parameters": [torch.nn.Parameter(torch.ones(2))]}, r"parameters\[0\] is not covered"),
    ):
        with pytest.raises(ValueError, match=match):
            NoiseScale(accumulator, **options)
    noise = NoiseScale(accumulator)
    with pytest.raises(TypeError, match="tokens must be a number, got str"):
        noise.observe("3")
    with pytest.raises(ValueError, match="tokens must be positive and finite, got 0"):
        noise.observe(0)
    with accumulator.micro_batch(3):
        mean_backward(model, batch(dtype=torch.float32), 3)
        with pytest.raises(RuntimeError, match="inside of micro_batch"):
            noise.observe()
    with pytest.raises(ValueError, match="leave tokens out, got 3"):
        noise.observe(3)
    with pytest.raises(ValueError, match="tokens_per_micro_batch must be positive"):
        noise.suggested_micro_batches(0)
    accumulator.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        noise.observe()

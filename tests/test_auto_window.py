"""AutoWindow: what K is when, what it does to an accumulator, and how it is resumed."""

import io
import json
import math

import pytest
import torch
from hook_cases import backward, batch, every_hook, mlp, needs_extension
from test_ranks import assert_passed, names, runs

import gradacc_kernels as gk


def attached(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = mlp(dtype=dtype)
    return model, gk.attach(model, **options)


def run(window, model, tokens, optimizer=None):
    """Runs micro-batches; returns the lengths of the windows that ended."""
    lengths, count = [], 0
    for n in tokens:
        with window.micro_batch(n):
            backward(model, batch(dtype=torch.float32))
        count += 1
        if window.is_last:
            if optimizer is not None:
                window.accumulator.step(optimizer)
            model.zero_grad()
            lengths.append(count)
            count = 0
    return lengths


@pytest.mark.parametrize(
    ("rule", "lengths"),
    [
        (3, [3, 3, 3, 3]),
        (gk.Schedule([(0, 1), (2, 4)]), [1, 1, 4, 4]),
        (gk.Schedule([(0, 1), (3, 4)], linear=True), [1, 2, 3, 4, 4, 4]),
        (gk.Schedule([(0, 4), (2, 1)], linear=True), [4, 2, 1, 1]),  # 2.5 to even
        (gk.Schedule([(0, 2), (30, 3)], unit="tokens"), [2, 2, 3, 3]),
        (gk.Schedule([(0, 1), (20, 5)], unit="tokens", linear=True), [1, 3, 5, 5]),  # 0, 10, 40
    ],
    ids=str,
)
def test_schedules(rule, lengths):
    """Of 10 tokens a micro-batch."""
    model, accumulator = attached()
    window = gk.AutoWindow(accumulator, rule)
    assert window.k == 0 and not window.is_last
    assert run(window, model, [10] * sum(lengths)) == lengths
    assert window.windows == len(lengths) and window.tokens == 10 * sum(lengths)
    assert window.micro_batches == 0 and window.k == lengths[-1]


def test_a_token_target():
    model, accumulator = attached()
    window = gk.AutoWindow(accumulator, gk.TokenTarget(100))
    tokens = [40, 40, 20, 99, 1, 300, 50, 49, 0, 0, 2]
    assert run(window, model, tokens) == [3, 2, 1, 5]
    window = gk.AutoWindow(accumulator, gk.TokenTarget(100, most=4))
    assert run(window, model, tokens) == [3, 2, 1, 4]
    assert window.micro_batches == 1 and window.k == 4


@every_hook
def test_gradients_are_those_of_the_one_big_batch(hook):
    device, backend = hook
    torch.manual_seed(0)
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend)
    window = gk.AutoWindow(accumulator, gk.Schedule([(0, 2), (1, 3)]))
    for counts in ([3, 5], [4, 1, 2]):
        inputs = [batch(device, torch.float32, rows=n) for n in counts]
        for x in inputs:
            with window.micro_batch(len(x)):
                is_last = window.is_last
                assert window.k == len(counts)
                model(x).square().sum(1).mean().backward()
            assert window.is_last == is_last == (x is inputs[-1])
        accumulator.average_()
        ours = [param.grad.clone() for param in model.parameters()]
        loss = model(torch.cat(inputs)).square().sum(1).mean()
        theirs = torch.autograd.grad(loss, list(model.parameters()))
        for grad, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
        model.zero_grad()


def test_what_leaves_a_window_early():
    model, accumulator = attached()
    window = gk.AutoWindow(accumulator, 3)
    assert run(window, model, [1, 1]) == []
    with pytest.raises(ZeroDivisionError), window.micro_batch(1):
        assert window.is_last
        raise ZeroDivisionError
    assert not window.is_last and window.micro_batches == 2  # it does not count
    assert run(window, model, [1, 1]) == [1]
    assert window.micro_batches == 1
    model.zero_grad()
    window.drop()
    assert window.micro_batches == 0 and run(window, model, [1, 1, 1, 1]) == [3]
    window.close()
    window.close()
    assert window.windows == 3 and window.micro_batches == 0 and window.tokens == 7


class KnownNoise(gk.NoiseScale):
    """One whose value a test sets, and which tells what was observed."""

    known = math.nan

    @property
    def value(self):
        return self.known


def follow(accumulator, **options):
    noise = KnownNoise(accumulator)
    return noise, gk.AutoWindow(accumulator, gk.FollowNoise(noise, every=1, **options))


@pytest.mark.parametrize(
    ("options", "wanted", "expected"),
    [
        ({}, [math.nan, math.inf, 4, 5.5, 6.1, 5.9, 4.1, 3.9], [2, 2, 2, 4, 4, 6, 6, 6, 4]),
        ({"hysteresis": 1}, [7, 8, 8.1, 7.6], [2, 7, 8, 8, 8]),
        ({"bounds": (3, 8)}, [100, 1, 5], [3, 8, 3, 5]),
        (
            {"bounds": (2, 16), "powers_of_two": True, "start": 8},
            [11, 13, 9, 2],
            [8, 8, 16, 8, 2],
        ),
    ],
    ids=["hysteresis", "no hysteresis", "bounds", "powers of two"],
)
def test_following_the_noise(options, wanted, expected):
    """Of 10 tokens a micro-batch."""
    model, accumulator = attached()
    noise, window = follow(accumulator, **options)
    lengths = []
    for k in (math.nan, *wanted):
        noise.known = 10 * k
        count = 0
        while not count or not window.is_last:
            run(window, model, [10])
            count += 1
        lengths.append(count)
    assert lengths == expected


def test_the_noise_is_read_every_so_many_windows():
    model, accumulator = attached()
    noise = KnownNoise(accumulator)
    noise.known = 50
    window = gk.AutoWindow(accumulator, gk.FollowNoise(noise, every=3))
    assert run(window, model, [10] * 16) == [2, 2, 2, 5, 5]


def test_the_noise_scale_is_measured():
    """Against one that is told by hand of the same micro-batches."""
    model, accumulator = attached()
    noise, by_hand = gk.NoiseScale(accumulator, 0), gk.NoiseScale(accumulator, 0)
    window = gk.AutoWindow(accumulator, gk.FollowNoise(noise, (3, 3)))
    for step in range(6):
        with window.micro_batch(step + 1):
            backward(model, batch(dtype=torch.float32))
        by_hand.observe()
        if window.is_last:
            by_hand.update()
            model.zero_grad()
            assert noise.estimate.isfinite().all() and noise.estimate.equal(by_hand.estimate)


@pytest.mark.parametrize("kind", ["schedule", "noise", "tokens"])
@pytest.mark.parametrize("stop", range(1, 9))
def test_resumed_in_the_middle(kind, stop):
    """Through JSON, at any micro-batch: the same windows, and the same parameters bit for bit."""

    def make(seed):
        model, accumulator = attached(seed)
        if kind == "schedule":
            return model, gk.AutoWindow(accumulator, gk.Schedule([(0, 1), (2, 3)], linear=True))
        if kind == "tokens":
            return model, gk.AutoWindow(accumulator, gk.TokenTarget(25))
        noise, window = follow(accumulator)
        noise.known = 30
        return model, window

    torch.manual_seed(9)
    tokens = [10, 5, 12, 9, 11, 8, 10, 7, 25, 3]
    data = [batch(dtype=torch.float32) for _ in tokens]

    def go(model, window, begin, end):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        ends = []
        for i in range(begin, end):
            with window.micro_batch(tokens[i]):
                backward(model, data[i])
            if window.is_last:
                window.accumulator.step(optimizer)
                optimizer.zero_grad()
                ends.append(i)
        return ends

    whole, first, second = make(0), make(0), make(1)
    expected = go(*whole, 0, len(tokens))
    before = go(*first, 0, stop)
    file = io.BytesIO()
    torch.save(first[0].state_dict(), file)
    file.seek(0)
    second[0].load_state_dict(torch.load(file))
    second[1].accumulator.load_state_dict(first[1].accumulator.state_dict())
    second[1].load_state_dict(json.loads(json.dumps(first[1].state_dict())))
    assert before + go(*second, stop, len(tokens)) == expected and len(expected) > 2
    for ours, theirs in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert ours.equal(theirs)
    assert second[1].state_dict() == whole[1].state_dict()


def test_bad_arguments():
    model, accumulator = attached()
    other_model, other = attached()
    noise = gk.NoiseScale(accumulator)
    bad = (
        (lambda: gk.AutoWindow(model, 3), TypeError, "expected the Accumulator"),
        (lambda: gk.AutoWindow(accumulator, "3"), TypeError, "or an int, got str"),
        (lambda: gk.AutoWindow(accumulator, 0), ValueError, "positive ints of micro-batches"),
        (lambda: gk.AutoWindow(other, gk.FollowNoise(noise)), ValueError, "over the same"),
        (lambda: gk.Schedule([]), ValueError, "expected pairs"),
        (lambda: gk.Schedule([(0, 1, 2)]), ValueError, "expected pairs"),
        (lambda: gk.Schedule([(5, 1)]), ValueError, "must ascend from 0"),
        (lambda: gk.Schedule([(0, 1), (0, 2)]), ValueError, "must ascend from 0"),
        (lambda: gk.Schedule([(0, 1.5)]), ValueError, "positive ints of micro-batches, got 1.5"),
        (lambda: gk.Schedule([(0, 1)], unit="steps"), ValueError, "unit must be one of"),
        (lambda: gk.FollowNoise(3), TypeError, "expected a NoiseScale"),
        (lambda: gk.FollowNoise(noise, (8, 4)), ValueError, "with start between them"),
        (lambda: gk.FollowNoise(noise, (1, 4)), ValueError, "bounds must begin at 2"),
        (lambda: gk.FollowNoise(noise, start=99), ValueError, "with start between them"),
        (lambda: gk.FollowNoise(noise, (2, 6), powers_of_two=True), ValueError, "powers of two"),
        (lambda: gk.FollowNoise(noise, hysteresis=0.5), ValueError, "hysteresis must be >= 1"),
        (lambda: gk.TokenTarget(0), ValueError, "tokens must be positive, got 0"),
        (lambda: gk.TokenTarget(9, most=0), ValueError, "positive ints"),
    )
    for make, kind, match in bad:
        with pytest.raises(kind, match=match):
            make()
    window = gk.AutoWindow(accumulator, 3)
    for tokens, kind in ((torch.ones(()), TypeError), (-1, ValueError), (math.inf, ValueError)):
        with pytest.raises(kind, match="AutoWindow.micro_batch: tokens must be"):
            with window.micro_batch(tokens):
                raise AssertionError
    state = window.state_dict()
    for broken in ({**state, "k": "3"}, {**state, "more": 1}, {}, None):
        with pytest.raises(ValueError, match="what AutoWindow.state_dict"):
            window.load_state_dict(broken)
    assert window.state_dict() == state and other_model is not model


@needs_extension
@pytest.mark.parametrize("name", names("window_cases.py"))
@runs("window_cases.py", (3, "cpu"), (2, "cuda"))
def test_ranks(ranks, name):
    assert_passed(ranks, name)

"""The table of tuned weight gradient kernels: what is read, what is refused, what is chosen."""

import json
import types

import pytest
import torch

from gradacc_kernels import __main__ as command
from gradacc_kernels import dispatch, ops, tune

STAMP = {
    "format": tune.FORMAT,
    "device": "a GPU",
    "cublaslt": 1,
    "kernels": ["wide", "cublaslt:0"],
}
CHOICE = {"main_grad": [64, 32], "tokens": 8, "store": False, "kernel": "cublaslt:0"}


class Extension(types.SimpleNamespace):
    """Stands for the compiled module on a machine with a GPU."""

    HAS_CUDA = True

    def __init__(self):
        super().__init__(chosen=[])

    def cublaslt_version(self):
        return STAMP["cublaslt"]

    def weight_grad_choices(self):
        return STAMP["kernels"]

    def set_weight_grad_choice(self, *choice):
        self.chosen.append(choice)


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("GRADACC_TUNED", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: STAMP["device"])
    return path


def test_no_file(file):
    extension = Extension()
    assert tune.load(extension) == 0 and extension.chosen == []


def test_a_file_of_this_gpu_is_read(file):
    file.write_text(json.dumps({**STAMP, "choices": [CHOICE, {**CHOICE, "store": True}]}))
    extension = Extension()
    assert tune.load(extension) == 2
    assert extension.chosen == [(64, 32, 8, store, "cublaslt:0") for store in (False, True)]


@pytest.mark.parametrize("changed", [{name: "other"} for name in STAMP], ids=STAMP)
def test_a_file_of_another_gpu_or_library_is_left(file, changed):
    file.write_text(json.dumps({**STAMP, **changed, "choices": [CHOICE]}))
    extension = Extension()
    assert tune.load(extension) == 0 and extension.chosen == []


WRONG = {
    "no JSON": "{",
    "a list": "[]",
    "no choices": json.dumps(STAMP),
    "a choice without a kernel": json.dumps({**STAMP, "choices": [CHOICE, {"tokens": 8}]}),
    "a main gradient of three dimensions": json.dumps(
        {**STAMP, "choices": [{**CHOICE, "main_grad": [2, 64, 32]}]}
    ),
    "tokens that are no number": json.dumps({**STAMP, "choices": [{**CHOICE, "tokens": "many"}]}),
    "infinitely many tokens": json.dumps({**STAMP, "choices": [{**CHOICE, "tokens": 1e999}]}),
    "tokens beyond 64 bits": json.dumps({**STAMP, "choices": [{**CHOICE, "tokens": 1 << 70}]}),
    "no tokens": json.dumps({**STAMP, "choices": [{**CHOICE, "tokens": 0}]}),
    "too deep": "[" * 100_000,
    "an unknown kernel": json.dumps({**STAMP, "choices": [{**CHOICE, "kernel": "narrow"}]}),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_broken_file_is_named_and_changes_nothing(file, text):
    file.write_text(text)
    extension = Extension()
    with pytest.warns(UserWarning, match=r"tuned\.json is no table of tuned kernels"):
        assert tune.load(extension) == 0
    assert extension.chosen == []


def test_a_folder_that_cannot_be(file, monkeypatch):
    file.write_text("a file")
    monkeypatch.setenv("GRADACC_TUNED", str(file / "tuned.json"))
    extension = Extension()
    assert tune.load(extension) == 0 and extension.chosen == []


def test_no_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GRADACC_TUNED", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.warns(UserWarning, match="home directory"):
        assert tune.load(Extension()) == 0


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["tuen"], 2)])
def test_other_commands(arguments, status, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gradacc_kernels", *arguments])
    assert command.main() == status
    said = capsys.readouterr()
    assert "tune" in (said.err if status else said.out)


def test_the_rule_stays_where_nothing_is_clearly_faster():
    assert tune.best({"rule": 10.0, "wide": 10.1, "cublaslt:0": 9.9}) is None
    assert tune.best({"rule": 10.0, "wide": 9.0, "cublaslt:0": 9.5}) == "wide"


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.delenv("GRADACC_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune.path() == tmp_path / "gradacc_kernels" / "tuned.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gradacc_kernels", "tune", "64x32", "--tokens", "8"])
    assert command.main() == 1
    assert "needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["64", "64x", "64x32x2", "axb", "0x8", "-4x8"])
def test_shapes_that_are_none(shape, capsys):
    with pytest.raises(SystemExit):
        tune.main("no extension", [shape, "--tokens", "8"])
    assert "OUTxIN" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["", "8,", "0", "many"])
def test_lengths_that_are_none(tokens, capsys):
    with pytest.raises(SystemExit):
        tune.main("no extension", ["64x32", "--tokens", tokens])
    assert "--tokens" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(dispatch.why_missing("cuda") is not None, reason="no CUDA kernels")
def test_on_a_gpu(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("GRADACC_TUNED", str(path))
    extension = dispatch.extension()
    assert tune.main(extension, ["512x256", "--tokens", "64,8", "--times"]) == 0
    printed = capsys.readouterr().out
    assert "512x256" in printed and str(path) in printed
    table = json.loads(path.read_text())
    assert table["kernels"] == extension.weight_grad_choices()
    main, dy, x = (
        torch.randn(*shape, device="cuda") for shape in ((512, 256), (64, 512), (64, 256))
    )
    dy, x = dy.bfloat16(), x.bfloat16()
    exact = dy.double().t() @ x.double()
    kernels = {}
    for kernel in extension.weight_grad_choices():
        extension.force_weight_grad_choice(kernel)
        try:
            kernels[kernel] = ops.wgrad_accumulate_(main, dy, x, store=True).clone()
        finally:
            extension.force_weight_grad_choice("")
        assert (kernels[kernel] - exact).norm() <= 1e-5 * exact.norm()
    try:
        for kernel, expected in kernels.items():
            table["choices"] = [{**CHOICE, "main_grad": [512, 256], "tokens": 64, "store": True}]
            table["choices"][0]["kernel"] = kernel
            path.write_text(json.dumps(table))
            assert tune.load(extension) == 1
            assert ops.wgrad_accumulate_(main, dy, x, store=True).equal(expected)
    finally:
        extension.clear_weight_grad_choices()

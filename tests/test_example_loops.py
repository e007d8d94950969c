"""The examples over other libraries, a few windows of each."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from loop_cases import importorskip

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture
def said_by(monkeypatch, capsys):
    """Runs an example, and returns what it printed."""

    def run(name, *options):
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--device", "cpu", *options])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(said):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said)]


def test_lora_adapters_learn(said_by):
    for library in ("transformers", "peft"):
        importorskip(library)
    found = losses(said_by("finetune_lora.py"))
    assert found[-1] < found[0] - 0.05


def test_images_are_classified(said_by):
    importorskip("timm")
    said = said_by("classify_images.py")
    assert len(losses(said)) == 6 and "accuracy" in said


def test_noise_is_found_after_overflows(said_by):
    said = said_by("denoise_images.py")
    assert "overflow in " in said
    assert losses(said)[-1] < losses(said)[0] - 0.05

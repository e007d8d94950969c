"""python -m gradacc_kernels bench, and the calls that it times."""

import json

import pytest
import torch
from hook_cases import needs_extension

from gradacc_kernels import kernel_bench, kernel_calls

pytest.importorskip("rich")
CPU = torch.device("cpu")


def run(*options):
    return kernel_bench.main(["--device", "cpu", *options])


def test_rows_are_of_all_kernels_and_sizes(tmp_path, capsys):
    path, picture = tmp_path / "a.json", tmp_path / "a.png"
    pytest.importorskip("matplotlib")
    assert run("--sizes", "8,12", "--json", str(path), "--png", str(picture)) == 0
    said = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["environment"]["backend"] in ("cpu", "reference")
    assert [r["elements"] for r in found["rows"]] == 7 * [1 << 8] + 9 * [1 << 12]
    for r in found["rows"]:
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / r["seconds"] / 1e9)
        memory = r["gb_per_s"] / r["copy_gb_per_s"]
        assert r["share"] == pytest.approx(memory) or "wgrad" in r["kernel"]
        assert r["share"] >= memory * 0.999
        assert r["kernel"] in said
    assert picture.stat().st_size > 10_000
    for r in found["rows"]:
        r["seconds"] /= 1e3
    path.write_text(json.dumps(found))
    assert run("--sizes", "8", "--compare", str(path)) == 0
    ratios = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "2^8" in line
    ]
    assert len(ratios) == 7 and min(ratios) > 10


@pytest.mark.parametrize(
    "options, words",
    [
        (["--sizes", "40"], "powers of two from 1 to 31"),
        (["--sizes", "a"], "invalid literal"),
        (["--backend", "cuda"], "does not serve"),
        (["--compare", "none.json"], "none.json"),
    ],
)
def test_bad_options_are_refused(capsys, options, words):
    with pytest.raises(SystemExit):
        run(*options)
    assert words in capsys.readouterr().err


def test_a_file_of_another_format_is_refused(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(SystemExit):
        run("--compare", str(path))
    assert "expected what `bench --json` has written" in capsys.readouterr().err


@needs_extension
def test_calls_write_what_the_reference_writes():
    ours, expected = (kernel_calls.calls(5003, backend, CPU) for backend in ("cpu", "reference"))
    assert ours.keys() == expected.keys() and len(ours) == 9
    for name in ours:
        for call in (ours[name], expected[name]):
            call.run()
        is_sum = name.startswith(("grad_stats", "wgrad", "embedding"))
        a, b = ours[name].result(), expected[name].result()
        assert torch.allclose(a, b, 1e-5, 1e-3) if is_sum else a.equal(b), name

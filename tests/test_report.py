"""python -m gradacc_kernels report."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from gradacc_kernels import report

pytest.importorskip("matplotlib")


def record(step, **values):
    return {
        "step": step,
        "time": 1e9 + 2 * step,
        "seconds": 2.0,
        "norm": 1.0 / step,
        "largest": {"head.weight": 0.5, "<b>": 0.25},
        "found_inf": False,
        "nonfinite": [],
        "micro_batches": 4,
        "tokens": 1000.0 + step,
        "loss_scale": 65536.0,
        "skipped_windows": 0,
        "skipped_micro_batches": 0,
        "nbytes": 4_000_000,
    } | values


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


RECORDS = [
    record(1),
    record(2, norm=None, found_inf=True, nonfinite=["head.weight", "<b>"], skipped_windows=1),
    record(3, skipped_windows=1, loss=0.75),
]


class Page(HTMLParser):
    """Its cells, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.fetched, self._is_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._is_cell = tag in ("td", "th")
        if self._is_cell:
            self.cells.append("")
        fetching = ("src", "href", "data", "srcset", "action")
        self.fetched += [v for k, v in attributes if k in fetching and not v.startswith("#")]

    def handle_endtag(self, tag):
        self._is_cell = False

    def handle_data(self, data):
        if self._is_cell:
            self.cells[-1] += data


def test_a_page_stands_alone(tmp_path):
    path = write(tmp_path / "run.jsonl", RECORDS)
    assert report.main([str(path)]) == 0
    text = (tmp_path / "run.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert "@import" not in text and "<script" not in text and "url(http" not in text
    cells = dict(zip(page.cells[::2], page.cells[1::2], strict=False))
    assert cells["windows"] == "3, numbers 1 to 3"
    assert cells["tokens"] == "3,006" and cells["micro-batches"] == "12"
    assert cells["skipped windows"] == "1" and cells["windows with inf or NaN"] == "1"
    assert "head.weight, <b>" in page.cells  # why the window overflowed
    assert "<b>" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    # norm, largest, loss scale, tokens, micro-batches, skipped, memory, seconds, loss
    assert text.count("<svg") == 9


def test_series_have_gaps_where_there_is_no_number():
    series = report._series_of_largest([*RECORDS, record(4, largest={"head.weight": None})])
    assert series["head.weight"][:3] == [0.5] * 3 and math.isnan(series["head.weight"][3])
    assert math.isnan(series["<b>"][3])


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = write(tmp_path / "run.jsonl", RECORDS)
    path.write_text(path.read_text() + '{"step": 4, "ti')
    assert [r["step"] for r in report.read(path)] == [1, 2, 3]
    path.write_text(path.read_text() + "\n" + json.dumps(RECORDS[0]) + "\n")  # resumed
    assert [r["step"] for r in report.read(path)] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "holds no record"),
        ('{"a": 1}\n{"step": 1}\n', "line 1: no record of gk.Monitor"),
        ('{"step"\n{"a"\n{"step": 1}\n', "line 1"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, text, words):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()


def test_records_are_not_written_over(tmp_path, capsys):
    path = write(tmp_path / "run.jsonl", RECORDS)
    with pytest.raises(SystemExit):
        report.main([str(path), "-o", str(path)])
    assert "choose another" in capsys.readouterr().err
    assert len(report.read(path)) == 3

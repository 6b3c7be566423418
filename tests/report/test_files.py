"""From a run's directory to its page, and again; no browser."""

import json
import math

import pytest
import story

from kithara_ray.checkpoint import disk_format
from kithara_ray.cli.app import main
from kithara_ray.errors import ConfigError
from kithara_ray.report import charts, files, page
from kithara_ray.report.charts import Series, chart, nice_ticks, seconds, short, size
from kithara_ray.storage.places import Place


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(story.run_json()))
    return tmp_path


def test_written_and_made_again_by_the_command_line(run, capsys):
    assert files.write(str(run), story.history()) == str(run / "report.html")
    first = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == first
    assert "http" not in first.replace("http-equiv", "")


def test_an_export_is_told_with_its_proof(run, tmp_path):
    files.write(str(run), {"events": story.steps(3), "samples": []})
    done = tmp_path / "merged"
    done.mkdir()
    report = {"layout": "merged", "checks": ["every tensor <equal>"], "files": {"a": {"bytes": 3}, "b": {"bytes": 4}}}
    (done / "export_report.json").write_text(json.dumps(report))
    for _ in range(2):
        files.add_export(str(run), str(done))
    told = json.loads((run / "history.json").read_text())
    assert [(export["path"], export["bytes"]) for export in told["exports"]] == [(str(done), 7)]
    assert len(told["events"]) == 3
    assert "every tensor &lt;equal&gt;" in (run / "report.html").read_text()


def test_what_went_on_beside_the_start_is_drawn_where_it_was():
    phases, beside = {"check": 3.0, "tokenize": 1.0, "build": 4.0}, {"tokenizer": (1.0, 3.5), "imports": (6.0, 99.0)}
    events = [{"kind": "started", "phases": phases, "beside": beside}, {"kind": "first_step", "seconds": 2.0}]
    rows = [(row["name"], row["left"], row["width"]) for row in page._phases(events, {})]
    assert rows[:4] == [
        ("check cluster and data", 0, 30.0),
        ("tokenise the data", 30.0, 10.0),
        ("build the model", 40.0, 40.0),
        ("first step", 80.0, 20.0),
    ]
    # Two hosts' clocks may differ: nothing is drawn outside.
    assert rows[4:] == [("beside: load the tokenizer", 10.0, 25.0), ("beside: import in a worker", 60.0, 40.0)]


def test_on_an_object_store():
    place = Place("memory://runs/7")
    place.put_bytes(json.dumps(story.run_json()).encode(), "", "run.json")
    assert files.write("memory://runs/7", story.history(4)) == "memory://runs/7/report.html"
    assert b"gemma-2-2b-alpaca" in place.read("", "report.html")


def test_a_run_that_was_killed_is_told_by_its_newest_checkpoint(run):
    """run.json says that it is running, and no history was written."""
    (run / "run.json").write_text(json.dumps(story.run_json("running", ended=None)))
    place, directory = Place(str(run / "checkpoints")), disk_format.directory_name(3, "0" * 8)
    disk_format.write_part(place, directory, [], 0, 1)
    document = {"identity": {}, "base": "b", "tensors": {}, "metrics": {}, "evaluations": [], "finished": None}
    disk_format.commit(place, directory, 1, {}, document, story.steps(3))
    html = (run / files.rewrite(str(run)).rpartition("/")[2]).read_text()
    assert "running" in html
    assert f"from {short(story.steps(1)[0]['loss'])}" in html


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", None, "no run.json there; give a run's directory"),
        ("run.json", "{", "run.json cannot be read"),
        ("run.json", "[1]", "run.json is not a file that a run writes"),
        ("history.json", '{"events": 3}', "is not a file that a run writes"),
        ("history.json", "\xff", "history.json cannot be read"),
    ],
)
def test_what_is_no_run_is_refused(run, name, text, message):
    (run / name).unlink(missing_ok=True)
    if text is not None:
        (run / name).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        files.rewrite(str(run))


def test_secrets_are_left_out(run, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-of-mine")
    secrets = ("canary-of-mine", "hf_" + "a" * 20)
    files.write(str(run), {"samples": [{"prompt": secrets[0], "before": secrets[1], "after": f"x {secrets[0]}"}]})
    html = (run / "report.html").read_text()
    assert not any(secret in html for secret in secrets)
    assert html.count("***") >= 3


def test_a_run_of_nothing_is_a_page_too():
    html = page.render({"status": "failed", "error": "ClusterError: no workers"}, {})
    assert "No step was logged." in html
    assert "ClusterError: no workers" in html


def test_numbers_that_are_none():
    """A loss that is not finite ends no chart, and stands in none."""
    rows = [(1, 2.0), (2, math.nan), (3, math.inf), (4, None), (5, 1.0)]
    made = chart("loss", "Loss", [Series("training", rows)])
    assert made["data"]["series"][0]["points"] == [[1.0, 2.0], [5.0, 1.0]]
    assert chart("loss", "Loss", [Series("training", rows[1:4])]) is None
    json.dumps(made["data"], allow_nan=False)


def test_long_runs_are_averaged_and_keep_their_range():
    rows = [(step, 5.0 if step == 777 else 1.0) for step in range(1, 4001)]
    made = chart("loss", "Loss", [Series("training", rows)])
    points = made["data"]["series"][0]["points"]
    assert len(points) == charts.MOST_POINTS
    assert max(y for _, y in points) == pytest.approx(1.4)
    assert " 0.00" not in made["lines"][0]["path"].replace("L", " ")
    top = made["y_ticks"][-1]
    assert (top["text"], top["at"]) == ("5", 0.0)
    assert "L" in made["lines"][0]["band"]
    assert "0.00" in made["lines"][0]["band"]
    assert made["note"] == "Each point is the mean of 10, the band their range."


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.9, 2.4), (0.0, 2e-4), (-3.0, 12345.0), (7.0, 7.001)])
def test_ticks_enclose_and_are_round(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 3 <= len(ticks) <= 7
    step = ticks[1] - ticks[0]
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (0.8131, "0.8131"), (12345, "12.35k"), (3_194_880, "3.195M"), (2.6e9, "2.6B"), (0, "0")],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("value", "text"), [(38_845, "38.8 kB"), (5_228_000_000, "5.23 GB"), (12e6, "12 MB")])
def test_sizes(value, text):
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.42 s"), (12.4, "12 s"), (210, "3.5 min"), (7560, "2.1 h")])
def test_times(value, text):
    assert seconds(value) == text

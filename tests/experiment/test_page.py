"""The page of a run: what stands in its data, and that nothing in a run directory can be more than text in it."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUICK, msfusion, refused
from made_runs import line_of, made_run, summary_of, windows_by_hand
from quick import QUICK_JOB, QUICK_SETTINGS

from msfusion import files
from msfusion.data import load_data
from msfusion.errors import RunDirectoryError
from msfusion.experiment.config import load_config
from msfusion.experiment.kinds import prepare
from msfusion.experiment.page import parts, reading
from msfusion.experiment.page.about import windows_of
from msfusion.experiment.page.build import LIBRARY, PROGRAM, as_json, asset, content_policy, page, page_data
from msfusion.experiment.page.reading import read_inside, read_runs
from msfusion.experiment.page.write import write_report
from msfusion.experiment.report.picture import holdings
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.train import train
from msfusion.files import read_tensors, shape_in, write_sealed_json, write_tensors


def data_of(*paths: Path) -> dict[str, Any]:
    return page_data(read_runs(paths), paths)


def sections(data: dict[str, Any], place: int = 0) -> dict[str, dict[str, Any]]:
    """By their names: those of all runs, and those of one method."""
    return {each["id"]: each for each in (*data["sections"], *data["runs"][place]["sections"])}


def charts(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["title"]: each for each in section["charts"]}


def charts_of(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sections(data)[name]["charts"]
    return found


def embedded(path: Path) -> dict[str, Any]:
    """The data in a page, as a browser finds them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    assert found
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


def test_a_curve_is_what_the_metrics_say_and_a_guess_one_of_all_classes(tmp_path: Path) -> None:
    data = data_of(made_run(tmp_path / "run"))
    accuracy = charts(sections(data)["learning"])["Accuracy on the test data"]
    assert accuracy["series"] == [
        {"name": "msfusion", "dashed": False, "x": [1, 2, 3, 4], "y": [0.2, 0.6, 0.733333, 0.8]}
    ]
    assert [rule["y"] for rule in accuracy["rules"]] == [0.1]
    assert (data["finished"], data["live"]) == (True, False)


def test_runs_that_are_tested_on_other_examples_say_so(tmp_path: Path) -> None:
    first, second = made_run(tmp_path / "first"), made_run(tmp_path / "second", seed=1)
    config = second / "config.toml"
    config.write_text(config.read_text() + "data.validation_share = 0.2\n")
    summary = {**files.read_sealed_json(second / "summary.json"), "data": "other examples"}
    write_sealed_json(second / "summary.json", {key: summary[key] for key in summary})
    assert "Accuracy on the validation data" in charts(sections(data_of(second))["learning"])
    both = sections(data_of(first, second))
    assert "Accuracy on the test or validation data" in charts(both["learning"])
    assert "other examples" in both["overview"]["text"]
    assert both["overview"]["text"].count("Data of ") == 2


@pytest.mark.parametrize("older", [False, True])
def test_classes_are_told_apart_round_by_round(tmp_path: Path, older: bool) -> None:
    shares = [[0.5, None, 0.25], [0.75, 0.0, 1.0], [1.0, math.nan, 0.5]]
    lines = [line_of(each + 1, 3, by_class=shares[each]) for each in range(3)]
    names = ["boat", "<b>", "cat"]
    about = {"label_names": names} if older else {"labels": {"names": names}}
    made = made_run(tmp_path / "run", lines=lines, about=about)
    section = sections(data_of(made))["classes"]
    (chart,) = section["charts"]
    assert chart["rows"] == ["boat", "<b>", "cat"]
    assert chart["columns"] == ["1", "2", "3"]
    assert chart["values"] == [[0.5, 0.75, 1.0], [None, 0.0, None], [0.25, 1.0, 0.5]]
    assert "100.0% of 'boat'" in section["text"]
    assert "50.0% of 'cat'" in section["text"]
    assert "classes" not in sections(data_of(made_run(tmp_path / "other")))


def test_classes_that_are_told_alike_are_not_called_the_most_and_the_least(tmp_path: Path) -> None:
    lines = [line_of(1, 1, by_class=[1.0, None, 1.0])]
    made = made_run(tmp_path / "run", rounds=1, lines=lines, about={"labels": {"names": ["a", "b", "c"]}})
    text = sections(data_of(made))["classes"]["text"]
    assert text.endswith("At the end it is 100.0% of each that is tested.")


def test_the_error_of_a_codec_is_a_line(tmp_path: Path) -> None:
    lines = [line_of(each, 3, codec_error=0.5 / each) for each in (1, 2)]
    found = charts(sections(data_of(made_run(tmp_path / "run", lines=lines)))["traffic"])
    assert found["Error of the codec"]["series"] == [{"name": "error", "x": [1, 2], "y": [0.5, 0.25]}]
    assert "Error of the codec" not in charts(sections(data_of(made_run(tmp_path / "other")))["traffic"])


def test_the_error_of_a_codec_of_activations_is_said_to_be_that(tmp_path: Path) -> None:
    lines = [line_of(each, 2, codec_error=0.5, activations_bytes=10) for each in (1, 2)]
    text = sections(data_of(made_run(tmp_path / "run", lines=lines)))["traffic"]["text"]
    assert "of its activations" in text
    assert "sent later" not in text


def test_seeds_of_one_method_are_a_mean_with_a_band_and_the_small_model_is_dashed(tmp_path: Path) -> None:
    for seed, factor in enumerate((0.5, 0.7, 0.9)):
        lines = [line_of(each, 3, accuracy=factor / each) for each in (1, 2)]
        made_run(tmp_path / "all" / f"m-seed{seed}", seed=seed, lines=lines)
    made_run(tmp_path / "all" / "small-seed0", method="small", rounds=2)
    data = data_of(tmp_path / "all")
    first, small = charts(sections(data)["learning"])["Accuracy on the test data"]["series"]
    sd = statistics.stdev([0.5, 0.7, 0.9])
    assert first["y"] == pytest.approx([0.7, 0.35])
    assert first["low"] == pytest.approx([0.7 - sd, 0.35 - sd / 2])
    assert first["high"] == pytest.approx([0.7 + sd, 0.35 + sd / 2])
    assert (first["dashed"], small["dashed"]) == (False, True)
    assert "low" not in small
    assert [each["name"] for each in data["runs"]] == ["m", "small"]
    memory = charts(sections(data)["costs"])["Against memory, at the end"]["points"]
    assert len(memory) == 4
    assert {point["x"] for point in memory} == {10**6 + 2}


def test_a_run_that_is_named_twice_or_copied_is_no_second_seed(tmp_path: Path) -> None:
    """A mean of one run and its copy would have no spread, and look like two."""
    first, second = made_run(tmp_path / "first", seed=0), made_run(tmp_path / "second", seed=1)
    copy = shutil.copytree(first, tmp_path / "copy")
    twice = [first, tmp_path / "second" / ".." / "first", second]
    assert [[run.seed for run in cell.runs] for cell in reading.cells_of(read_runs(twice))] == [[0, 1]]
    cells = reading.cells_of(read_runs([first, second, copy]))
    assert [[run.path for run in cell.runs] for cell in cells] == [[first, second], [copy]]
    assert len({cell.name for cell in cells}) == 2


def test_costs_add_up_round_by_round(tmp_path: Path) -> None:
    found = charts(sections(data_of(made_run(tmp_path / "run")))["costs"])
    assert found["Against bytes"]["series"][0]["x"] == [1500, 3000, 4500, 6000]
    # 10, 20 and 30 examples with 1000 FLOPs each, a mean over three participants
    assert found["Against computation"]["series"][0]["x"] == [20_000, 40_000, 60_000, 80_000]
    assert found["Against bytes"]["series"][0]["y"] == [0.2, 0.6, 0.733333, 0.8]


def test_time_lines_are_those_of_the_machines(tmp_path: Path) -> None:
    machine = {"download_megabits": 0.008, "upload_megabits": 0.008, "latency_seconds": 0.5, "gigaflops": 1.0}
    line = line_of(1, 3) | {"participants": [0]}
    line |= {
        "absent": [1],
        "late": [2],
        "simulated_seconds": 4.0,
        "simulated_seconds_each": {"0": 3.5, "2": 9.0},
    }
    path = made_run(tmp_path / "run", lines=[line], about={"machines": [machine] * 3})
    people = charts(sections(data_of(path))["people"])
    spans = people["Time lines on the simulated clock"]
    named = [(who, begin, end, spans["kinds"][kind]) for who, begin, end, kind in spans["spans"]]
    # 1000 bytes take a second to arrive after half a second of latency, 500 bytes half a second to leave
    assert named == [
        (0, 0, 1.5, "receives"),
        (0, 1.5, 3, "computes"),
        (0, 3, 3.5, "sends"),
        (0, 3.5, 4, "waits"),
        (1, 0, 4, "absent"),
        (2, 0, 4, "too late"),
    ]
    parts = people["Whose work counts"]
    assert [[parts["kinds"][kind] for kind in row] for row in parts["values"]] == [
        ["its work counts"],
        ["absent"],
        ["too late"],
    ]
    assert people["Seconds of work in each round"]["values"] == [[0.0], [None], [None]]


def test_nothing_is_told_that_the_run_does_not_say(tmp_path: Path) -> None:
    lines = [{"round": 1, "participants": [0], "training_loss": 1.0, "seconds": 1.0}]
    found = sections(data_of(made_run(tmp_path / "run", lines=lines, participants=1, finished=False)))
    assert set(found) == {"overview", "learning", "origin"}
    assert list(charts(found["learning"])) == ["Loss in training"]


@pytest.mark.parametrize("method", ["msfusion", "feddropout", "heterofl"])
def test_windows_are_those_of_the_schedule(method: str) -> None:
    changes = ("rounds=5", "participants.count=4", f"method.name={method}", "participants.fraction=0.7")
    run = prepare(
        load_config(None, [*QUICK_SETTINGS, *changes] if method == "msfusion" else [*QUICK_JOB, *changes])
    )
    assert isinstance(run, SlicesRun)
    noted = windows_of(run.setup)
    assert noted["rounds"] == 5
    assert noted["groups"]
    for group in noted["groups"]:
        units = next(each for each in run.setup.width_map.groups if each.name == group["name"])
        for number, row in enumerate(group["held"]):
            expected = holdings(run.setup, units, number)
            for who, place in enumerate(row):
                mask = torch.zeros(units.units, dtype=torch.bool) if place < 0 else _mask(group, place)
                assert torch.equal(mask, expected[who])
    whole = run.plan()["entry_coverage"]
    for layer in noted["coverage"]:
        assert layer["shares"] == sorted(layer["shares"])
        assert 0 < layer["shares"][0] <= 1
    if whole[-1] == 1:
        assert all(layer["shares"][-1] == 1 for layer in noted["coverage"])


def _mask(group: dict[str, Any], place: int) -> torch.Tensor:
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(group["sets"][place]))
    return torch.tensor([bit == "1" for bit in bits[: group["units"]]])


def test_a_run_leaves_its_page_and_nothing_depends_on_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(load_config(None, QUICK_SETTINGS), path)
    data = embedded(path / "report.html")
    assert {
        "overview",
        "learning",
        "costs",
        "windows",
        "coverage",
        "people",
        "labels",
        "closing",
        "origin",
    } <= set(sections(data))
    noted = json.loads((path / "about.json").read_text())
    assert "label_names" not in noted
    assert noted["labels"]["names"] == [str(digit) for digit in range(10)]
    shares = load_data(load_config(None, QUICK_SETTINGS).data_spec).label_counts()
    assert shares is not None
    assert noted["labels"]["counts"] == shares.tolist()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    accuracy = charts(sections(data)["learning"])["Accuracy on the test data"]
    assert accuracy["series"][0]["y"] == pytest.approx([line["accuracy"] for line in lines], rel=1e-5)
    (path / "report.html").unlink()
    (path / "about.json").unlink()
    assert train(load_config(None, QUICK_SETTINGS), path, resume=True)["rounds"] == 2  # whole without them
    write_report([path])  # what was not noted is found out again, by the schedule
    again = sections(embedded(path / "report.html"))
    assert again["windows"] == sections(data)["windows"]
    assert again["coverage"] == sections(data)["coverage"]
    assert "not noted" in again["origin"]["text"]


def test_operators_of_growth_are_heat_maps_of_what_they_hold(tmp_path: Path) -> None:
    path, small, large = (
        made_run(tmp_path / "run", method="fedgrow"),
        torch.tensor([[1.0, -2.0]]),
        torch.zeros(96, 3),
    )
    large[10:12, 1] = torch.tensor([1.0, 3.0])
    write_tensors(
        path / "model.safetensors", {"operator.depth.w": small, "operator.width.B": large, "head": small}, {}
    )
    (choice,) = charts_of(data_of(path), "growth")
    depth, width = choice["charts"]
    assert depth["title"] == "depth.w: 1 by 2"
    assert depth["values"] == [[1.0, -2.0]]
    assert len(width["values"]) == 48
    assert width["values"][5] == [0.0, 2.0, 0.0]
    (path / "model.safetensors").write_bytes(b"damaged")
    assert "growth" not in sections(data_of(path))


def test_the_page_of_ten_participants_and_a_hundred_rounds_is_not_large(tmp_path: Path) -> None:
    about = {"windows": windows_by_hand(100, 10, 512)}
    made_run(tmp_path / "run", rounds=100, participants=10, about=about)
    path = write_report([tmp_path / "run"])
    assert path == tmp_path / "run" / "report.html"
    assert path.stat().st_size < 1_000_000


EVIL = '</script><script>alert("run")</script><img src=x onerror=alert(1)>&amp;\u2028\x1b[2J\u202e'


def test_names_of_strangers_are_text(tmp_path: Path) -> None:
    about = {
        "labels": {"names": [EVIL, EVIL], "counts": [[1, 2]]},
        "environment": {EVIL: EVIL},
        "windows": windows_by_hand(4, 3, 8, name=EVIL),
    }
    lines = [line_of(each, 3, metrics={EVIL: 0.5}) for each in (1, 2)]
    path = made_run(tmp_path / "<script>alert(2)<", lines=lines, about=about)
    text = write_report([path], tmp_path / "out.html").read_text()
    assert "<script>alert" not in text
    assert "<img" not in text.partition("<script>")[0] + text.rpartition("</script>")[2]
    assert not {"\u2028", "\x1b", "\u202e"} & set(text.partition("<script>")[0])
    data = embedded(tmp_path / "out.html")
    told = sections(data)["labels"]["charts"][0]["columns"][0]
    assert told.startswith("</script><script>alert")
    assert "\\x1b" in told or told.endswith("...") or "(" in told
    assert text.count("<script") == text.count("</script>") == 1 + len(LIBRARY) + len(PROGRAM)


def test_what_is_no_finite_number_is_told_in_words(tmp_path: Path) -> None:
    lines = [line_of(1, 3), line_of(2, 3, loss=None, accuracy=float("nan"), seconds=10**400)]
    data = data_of(made_run(tmp_path / "run", lines=lines, finished=False))
    text = as_json(data)
    assert "NaN" not in text
    assert "Infinity" not in text
    accuracy = charts(sections(data)["learning"])["Accuracy on the test data"]
    assert accuracy["series"][0]["y"] == [0.2, None]
    assert accuracy["notes"] == ["msfusion: not finite in round 2"]


DAMAGED: dict[str, list[bytes]] = {
    "config.toml": [b"seed = ", b"\xff\xfe", b'method = "x"\nrounds = []\nparticipants = 3', b""],
    "metrics.jsonl": [
        b"{",
        b"[1]\n",
        b'{"round": 1}\n{"round": 3}\n',
        b'{"round": 1, "participants": "all", "each": 7, "accuracy": {"a": 1}, "metrics": [1]}\n',
        b'{"round": 1, "participants": [{}], "each": {"seconds": 5}, "late": 3, "left_out": [null, {}]}\n',
        b"[" * 100_000,
    ],
    "summary.json": [b"null", b"[]", b"{}", b"{" * 100_000, b'{"sha256": 4}'],
    "about.json": [
        b"7",
        b'{"windows": {"groups": [{"name": 1, "units": 9, "sets": ["AA=="], "held": [[0]]}]}}',
        b'{"windows": {"groups": [{"units": 8, "sets": ["!"], "held": [[0]]}], "coverage": [{"shares": 4}]}}',
        b'{"windows": {"groups": [{"units": 8, "sets": ["AA=="], "held": [[0], [0, 5]]}]}}',
        b'{"labels": {"names": "ab", "counts": [["x"]]}, "machines": [1], "classes": -4, "environment": []}',
        b'{"labels": {"names": [[]], "counts": [["x"]]}, "examples_per_round": {"0": 1}}',
    ],
    "fingerprint.json": [b"", b'{"config": "changed", "sha256": "0"}'],
}


@pytest.mark.parametrize(
    ("name", "place"), [(name, at) for name in DAMAGED for at in range(len(DAMAGED[name]))]
)
def test_damage_is_told_and_the_rest_is_shown(tmp_path: Path, name: str, place: int) -> None:
    path = made_run(tmp_path / "run")
    (path / name).write_bytes(DAMAGED[name][place])
    data = data_of(path)
    json.loads(as_json(data))
    assert sections(data)["overview"]["tables"][0]["rows"]
    assert "</html>" in page(data)


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_missing_file_leaves_the_rest(tmp_path: Path, name: str) -> None:
    path = made_run(tmp_path / "run")
    (path / name).unlink()
    found = sections(data_of(path))
    told = any(name in problem for problem in found["overview"]["problems"])
    assert told == (name in ("config.toml", "metrics.jsonl", "fingerprint.json"))


def test_a_summary_in_another_form_is_missing_and_nothing_else(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    write_sealed_json(path / "summary.json", {**summary_of("msfusion", 4, 3), "full_model": 3})
    found = sections(data_of(path))
    assert "missing" in found["missing"]["problems"][0]
    assert {"learning", "origin", "people"} <= set(found)


def test_links_devices_and_endless_files_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.toml"
    secret.write_text('password = "hunter2"')
    path = made_run(tmp_path / "all" / "run")
    (path / "config.toml").unlink()
    (path / "config.toml").symlink_to(secret)
    (path / "about.json").unlink()
    os.mkfifo(path / "about.json")  # nobody writes to it: to wait for that would have no end
    (tmp_path / "all" / "linked").symlink_to(made_run(tmp_path / "elsewhere"))
    data = data_of(tmp_path / "all")
    assert "hunter2" not in as_json(data)
    assert len(data["runs"]) == 1
    problems = " ".join(sections(data)["overview"]["problems"])
    assert "config.toml is damaged" in problems
    assert "about.json is damaged" in problems
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_inside(path, "metrics.jsonl", most=10)


def test_all_runs_together_are_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        made_run(tmp_path / "all" / f"run-{number}", rounds=20)
    size = sum(each.stat().st_size for each in (tmp_path / "all" / "run-0").iterdir())
    monkeypatch.setattr(reading, "MOST_IN_ALL", int(1.5 * size))
    runs = read_runs([tmp_path / "all"])
    assert [len(run.lines) for run in runs] == [20, 20, 0] or [len(run.lines) for run in runs] == [20, 0, 0]
    assert runs[0].problems == []
    assert any("is not read" in problem for problem in runs[2].problems)
    assert sum(run.bytes_read for run in runs) <= int(1.5 * size)


def test_an_operator_that_no_memory_holds_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with a hole, which takes no space on the disk."""
    path = made_run(tmp_path / "run", method="fedgrow")
    rows = 2**13
    size = rows * rows * 4
    head = json.dumps(
        {
            "__metadata__": {"msfusion": json.dumps({"sha256": ""})},
            "operator.depth.w": {"dtype": "F32", "shape": [rows, rows], "data_offsets": [0, size]},
        }
    ).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)
    monkeypatch.setattr(parts, "read_tensor", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(files, "machine_memory", lambda: size)
    assert shape_in(path / "model.safetensors", "operator.depth.w") == (rows, rows)
    assert "growth" not in sections(data_of(path))
    with pytest.raises(RunDirectoryError, match="more than this machine's memory"):
        read_tensors(path / "model.safetensors")


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_labels_of_a_file_that_a_directory_names_are_not_looked_up(
    tmp_path: Path,
) -> None:
    """Whoever sends a run directory would else get words of a file that is on this machine alone."""
    private = tmp_path / "private.csv"
    private.write_text(
        "size,label\n" + "".join(f"{row},{'hunter2' if row % 2 else 'no'}\n" for row in range(40))
    )
    settings = (f"data.source={private}", "model.name=mlp", "model.options={hidden=[8]}", "rounds=1")
    path = tmp_path / "run"
    path.mkdir()
    config = load_config(None, (*settings, "participants.count=2", "method.start=fresh"))
    (path / "config.toml").write_text(config.to_toml())
    (path / "metrics.jsonl").write_text(json.dumps(line_of(1, 2, by_class=[0.5, 1.0])) + "\n")
    write_report([path])
    found = (path / "report.html").read_text()
    assert "hunter2" not in found
    assert "windows" in sections(embedded(path / "report.html"))


def test_a_report_calls_nothing_that_a_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('called')")
    monkeypatch.syspath_prepend(tmp_path)
    path = made_run(tmp_path / "run", method="evil_module:run")
    (path / "about.json").unlink()
    write_report([path])
    told = sections(embedded(path / "report.html"))["overview"]["problems"]
    assert "evil_module:run, which a report does not call" in told[0]


def test_the_page_fetches_nothing() -> None:
    text = page({"format": 1, "title": "t", "live": False, "finished": True, "sections": [], "runs": []})
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=\"(?!data:,)", text)
    assert "connect-src" not in content_policy(live=False)
    assert "connect-src 'self'" in content_policy(live=True)
    assert "unsafe" not in content_policy(live=True)
    for name in (*LIBRARY, *PROGRAM):
        assert not re.search("</script|<!--", asset(name), re.I)


def test_the_command_names_the_page_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    made_run(tmp_path / "run")
    result = msfusion("report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html"))
    assert result.exit_code == 0
    assert result.output.strip() == str(tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    refused(msfusion("report", str(tmp_path / "empty")), "there is no run in")
    with pytest.raises(RunDirectoryError):
        write_report([tmp_path / "nowhere"])


@pytest.mark.release
def test_a_comparison_leaves_one_page_of_all_its_runs(tmp_path: Path) -> None:
    config, out = tmp_path / "job.toml", tmp_path / "out"
    config.write_text("rounds = 2\n")
    result = msfusion(
        "compare", str(config), "--out", str(out), "--methods", "msfusion,small", "--seeds", "2", "-q", *QUICK
    )
    assert result.exit_code == 0, result.output
    data = embedded(out / "report.html")
    assert len(data["runs"]) == 2
    assert sections(data)["comparison"]["tables"][0]["rows"]
    assert "low" in charts(sections(data)["learning"])["Accuracy on the test data"]["series"][0]
    assert not list(out.glob("*/report.html"))

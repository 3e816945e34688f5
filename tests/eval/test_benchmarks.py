"""The benchmark scripts on a tiny model: what they write and continue. No time is asserted."""

import json
import subprocess
import time

import pytest
from PIL import Image

from eval import start_up
from eval.docs.speed import search_table, speed_table, start_up_table, streams_table, throughput_table
from eval.vision import benchmark_search, benchmark_streams, benchmark_vision, embed_throughput
from eval.vision.benchmark_vision import MODES
from tests.cli.test_run import write_clip

RUN = {"resolutions": "24,32", "dtypes": "float32,bfloat16", "repeats": 2}
CASES = len(MODES) * 2 * 2 * 2


@pytest.fixture
def bench(vision, tmp_path, monkeypatch):
    """Runs the benchmark on the tiny model, in an empty folder: what is in the file then, and the modes timed."""
    measured = []
    time_mode = benchmark_vision.time_mode

    def counting(model, resolution, mode, *args, **kwargs):
        measured.append(mode)
        return time_mode(model, resolution, mode, *args, **kwargs)

    monkeypatch.setattr(benchmark_vision, "base_model", lambda dtype, device: vision)
    monkeypatch.setattr(benchmark_vision, "time_mode", counting)
    monkeypatch.setattr(benchmark_vision, "FRACTIONS", [0.1, 1])
    output = tmp_path / "results.json"

    def run(**options):
        measured.clear()
        benchmark_vision.main(**{**RUN, "output": output, **options})
        return json.loads(output.read_text()), list(measured)

    return run


def test_all_cases_are_timed_and_said(bench, tmp_path):
    report, measured = bench()
    assert measured == list(MODES) * 4
    assert len(report["cases"]) == CASES
    assert len(report["dense"]) == 4
    for case in report["cases"]:
        times = case["streamed"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert times["frames"] == 2
        patches = (case["resolution"] // 4) ** 2
        assert case["active_patches"] == max(1, round(case["active"] * patches))
        assert (case["cost"] > 0.9) == (case["active"] == 1)
        assert case["gigamacs"] > 0
        assert case["stream_mebibytes"] > 0
    for entry in report["dense"]:
        assert entry["milliseconds"]["frames"] == len(entry["values"]) >= 2
    assert Image.open(tmp_path / "speed.png").format == "PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "speed.png"}
    table = speed_table(report)
    assert all(f"| `{mode}` |" in table for mode in ("dense", *MODES))
    assert "With everything active" in table


def test_an_interrupted_run_is_continued(bench, monkeypatch):
    time_mode = benchmark_vision.time_mode

    def interrupted(model, resolution, mode, *args, **kwargs):
        if mode == "context":
            raise KeyboardInterrupt
        return time_mode(model, resolution, mode, *args, **kwargs)

    monkeypatch.setattr(benchmark_vision, "time_mode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench()
    monkeypatch.setattr(benchmark_vision, "time_mode", time_mode)
    before = list(MODES[: MODES.index("context")])
    report, measured = bench()
    assert before and measured == [*(mode for mode in MODES if mode not in before), *MODES, *MODES, *MODES]
    again, measured = bench()
    assert measured == []
    assert again["cases"] == report["cases"]
    assert [(case["resolution"], case["mode"], case["active"]) for case in again["cases"][: 2 * len(MODES)]] == [
        (24, mode, share) for share in (0.1, 1) for mode in MODES
    ]


def test_other_settings_begin_anew(bench, monkeypatch):
    one = {"resolutions": "24", "dtypes": "float32"}
    monkeypatch.setattr(benchmark_vision, "MODES", ("context",))
    assert bench(**one)[1] == ["context"]
    report, measured = bench(**one, repeats=1)
    assert measured == ["context"]
    assert len(report["cases"]) == 2
    monkeypatch.setattr(benchmark_vision, "MODES", ("context", "mlp"))
    wider, measured = bench(**one, repeats=1)
    assert measured == ["mlp"]
    assert len(wider["cases"]) == 4


def test_where_dense_is_slow_everything_active_is_read_off_the_first_frame(bench, monkeypatch):
    def slow(call, device):
        started = time.perf_counter()
        result = call()
        return result, 11_000 + 1000 * (time.perf_counter() - started)

    monkeypatch.setattr(benchmark_vision, "timed", slow)
    report, _ = bench(resolutions="24", dtypes="float32")
    assert all(case["on_first_frame"] == (case["active"] == 1) for case in report["cases"])
    assert all(case["streamed"]["frames"] == 1 for case in report["cases"])
    assert len(report["dense"][0]["values"]) == 1 + len(MODES)


def test_streams_are_timed_in_three_ways(vision, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_streams, "base_model", lambda dtype, device: vision)
    output = tmp_path / "streams.json"
    benchmark_streams.main(cameras="1,3", repeats=2, output=output)
    report = json.loads(output.read_text())
    assert [(case["mode"], case["cameras"]) for case in report["cases"]] == [
        (mode, number) for mode in ("reconstruct", "context", "extrapolate") for number in (1, 3)
    ]
    for case in report["cases"]:
        assert len(case["active_patches"]) == case["cameras"]
        assert all(0 < count < 36 for count in case["active_patches"]) and 0 < case["cost"] < 1
        assert all(rate["median"] > 0 for rate in case["frames_per_second"].values())
    assert len(set(report["cases"][1]["active_patches"])) > 1  # ragged
    assert "| `context` | 3 |" in streams_table(report)


def test_start_up_is_timed_in_processes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(start_up, "COMMANDS", {"`pass`": ["-c", "pass"], "`json`": ["-c", "import json"]})
    monkeypatch.setattr(start_up, "REPEATS", 1)
    start_up.main(output=tmp_path / "start_up.json")
    report = json.loads((tmp_path / "start_up.json").read_text())
    assert len(report["turns"]) == 1 and all(seconds > 0 for seconds in report["seconds"].values())
    assert "| `json` |" in start_up_table(report)
    with pytest.raises(subprocess.CalledProcessError):
        start_up.seconds_of(["-c", "raise SystemExit(1)"])


def test_searches_are_timed(tmp_path, monkeypatch):
    for name, value in (("ROWS", 40), ("FRAMES", (100,)), ("DIMS", (8, 16)), ("REPEATS", 2)):
        monkeypatch.setattr(benchmark_search, name, value)
    benchmark_search.main(output=tmp_path / "search.json")
    report = json.loads((tmp_path / "search.json").read_text())
    assert [(case["frames"], case["dim"]) for case in report["cases"]] == [(100, 8), (100, 16)]
    assert all(spread["frames"] == 2 for case in report["cases"] for spread in case["processor_seconds"].values())
    assert "| 100 | 16 |" in search_table(report)


def test_embedding_is_timed_beside_dense(vision, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mkv", 6)
    monkeypatch.setattr(embed_throughput, "base_model", lambda dtype, device: vision)
    monkeypatch.setattr(embed_throughput, "bundled_clip", lambda: clip)
    output = tmp_path / "throughput.json"
    sizes = {"VIDEOS": 3, "PRESETS": ("faithful", "thrifty"), "BATCHES": (1, 2), "REPEATS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(embed_throughput, name, value)
    embed_throughput.main(output=output)
    report = json.loads(output.read_text())
    rates = report["frames_per_second"]
    ways = ["decoding", "decoding and preprocessing", "dense, 1 in one call", "dense, 2 in one call"]
    assert list(rates) == [*ways, "faithful", "thrifty"] and all(rate > 0 for rate in rates.values())
    assert all(len(values) == 2 for values in report["all"].values())
    best = max(rates[way] for way in ways[2:])
    assert rates[report["best_dense"]] == best
    for row in report["presets"]:
        assert row["times_dense"] == pytest.approx(rates[row["preset"]] / best, rel=1e-4)
        assert 0 < row["cost"] < 1 and row["aim"] == pytest.approx(0.85 / row["cost"], rel=1e-4)
    assert "| `thrifty` |" in throughput_table(report)

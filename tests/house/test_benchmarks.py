"""The benchmarks run as documented, and their tables have every method."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_commands import run

benchmark = pytest.importorskip("benchmarks.merge_vs_copy")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_merge_vs_copy_prints_a_row_for_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merges of the first method are processes that compile, the others run in this one, which is warm."""
    in_a_process = benchmark.merge

    def merge(folder: Path, method: str, options: list[str], kernels: Path) -> Any:
        if method == "linear":
            return in_a_process(folder, method, options, kernels)
        started = time.monotonic()
        chosen = options[: options.index("--compile")] if "--compile" in options else options
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            assert run("merge", f"{method}.yaml", "out", "--quiet", *chosen).exit_code == 0
        return benchmark.Cost(time.monotonic() - started, time.process_time(), 1)

    monkeypatch.setattr(benchmark, "merge", merge)
    monkeypatch.setattr("sys.argv", ["x", "--size", "0.0001", "--repeats", "1", "--dir", str(tmp_path)])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    _, _, headings, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows] == [
        "linear",
        "slerp",
        "ties",
        "dare_linear",
        "dare_ties",
        "della",
        "sce",
        "karcher",
        "fisher",
        "permuted",
        "rotated",
        "regmean",
        "tsv",
        "iso_c",
        "stacked",
    ]
    assert [row[headings.index("inputs")] for row in rows] == [*"324444432222331"]
    assert all(
        float(row[headings.index(seconds)]) > 0 for row in rows for seconds in ("merge s", "start-up s", "CPU s")
    )


def test_gpu_kernels_prints_a_row_for_every_operation() -> None:
    script = ROOT / "benchmarks" / "gpu_kernels.py"
    command = [sys.executable, str(script), "--device", "cpu", "--numel", "30000", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    title, _, headings, _, *rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert "30,000 elements" in title[0] and headings[-3:-1] == ["kernels ms", "ratio"]
    assert [row[0] for row in rows] == [
        "| linear",
        "| task_arithmetic",
        "| ties",
        "| dare_linear",
        "| dare_ties",
        "| fisher, of 1.5 models",
        "| order statistics: bracket",
        "| order statistics: digits",
        "| Gram matrix",
        "| L1 norms",
    ]
    assert all(float(row[-3]) > 0 for row in rows)  # the milliseconds of the kernels


def test_planning_prints_a_row_for_every_recipe() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "planning.py"), "--tensors", "100", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        [name, "99"] for name in ("two models", "2 slices of 1", "2 slices of 2", "48 slices of 1", "48 slices of 2")
    ]


@pytest.mark.slow  # loads PEFT
def test_adapters_prints_a_row_for_each_way() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "adapters.py"), "--size", "0.001", "--sparse", "2MB"]
    done = subprocess.run([*command, "--repeats", "1"], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:3] != "|--"]
    assert [row[0] for row in rows if row and len(row[0]) < 5] == ["copy", "ours", "peft", "copy", "ours"]
    assert all(float(row[2]) > 0 for row in rows if row and len(row[0]) < 5)

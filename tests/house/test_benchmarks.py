"""The benchmarks run as documented, and their tables have every method."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_merge_vs_copy_prints_a_row_for_every_method(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "merge_vs_copy.py"
    command = [sys.executable, str(script), "--size", "0.0001", "--repeats", "1", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, headings, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
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

"""The worth of alignment, repair and statistics for two perceptrons that share only their data."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
benchmark = pytest.importorskip("benchmarks.digits_alignment")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """One pair of the benchmark, trained for a third of its epochs."""
    torch.set_num_threads(1)
    found: dict[str, float] = benchmark.measure(tmp_path_factory.mktemp("digits"), 64, 0, epochs=20)
    return found


def test_repair_and_alignment_bring_back_most_of_an_averages_loss(found: dict[str, float]) -> None:
    lost = found["the two models"] - found["average"]
    assert lost > 30
    assert found["average + REPAIR"] > found["average"] + lost / 4
    for row in ("weight matching", "activation matching", "OT by activations"):
        assert found[row] > found["average"] + lost / 2, row
        assert found[f"barrier: {row}"] < found["barrier: average"] / 3, row
    assert found["weight matching + REPAIR"] > found["average + REPAIR"]
    assert found["activation matching + RegMean"] > found["the two models"] - 5


def test_the_table_has_a_row_for_every_number(found: dict[str, float]) -> None:
    table = benchmark.table_of({64: {row: [number, number] for row, number in found.items()}})
    _, _, *rows = [line.split("|")[1].strip() for line in table.splitlines()]
    assert rows == list(found)


def test_both_models_of_a_pair_see_the_same_images_from_other_starts() -> None:
    train, held_out = benchmark.make_split(0)
    assert len(train[0]) + len(held_out[0]) == 1797
    one, other = (benchmark.trained(train, 8, seed, epochs=0) for seed in (0, 1))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(one[0].weight, benchmark.trained(train, 8, 0, epochs=0)[0].weight)

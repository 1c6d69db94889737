"""Merges on the path of a GPU: in chunks, with the bytes of the processor except for sums of floats.

Where there is a GPU they run on it. Elsewhere the processor stands in, or is pretended to be another device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_device import GPU, OnGpu, pretended_gpu
from helpers_gpu import CUDA, needs_gpu, needs_triton, stand_in
from helpers_merges import load_all
from helpers_methods import (
    CASES,
    Case,
    ids,
    parameters_of,
    plan_of,
)
from helpers_progress import Counted
from models import output_of
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge, merge_tensors
from mergekit_lfm.api import merge_plans as api
from mergekit_lfm.api.contract import least_memory, make_inputs, save_model
from mergekit_lfm.artifacts.patch import Patch, TensorChange
from mergekit_lfm.commands.app import main
from mergekit_lfm.engine.blocks import Blocks, StoredBlock
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.kernels import gpu
from mergekit_lfm.kernels.reductions import L1, ColumnGram, Gram, Reduction, RowGram
from mergekit_lfm.machine import accelerators, devices
from mergekit_lfm.machine.accelerators import HOST, Gpu
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

TIES: Case = ("ties", {"density": 0.4})
KERNELS: list[Case] = [("linear", {}), ("dare_ties", {"density": 0.4, "rescale": "density"}), ("fisher", {})]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[type]]:
    """The kinds of float sums that were computed: these, and results of them, are rounded differently."""
    asked = set[type]()
    reduce = Blocks._reduce_chunk

    def recorded(self: Blocks, request: Reduction, chunk: StoredBlock) -> list[Any]:
        asked.update({type(request)} & {Gram, RowGram, ColumnGram, L1})
        return reduce(self, request, chunk)

    monkeypatch.setattr(Blocks, "_reduce_chunk", recorded)
    yield asked


def steps_apart(a: Path, b: Path) -> int:
    """The largest number of bfloat16 steps between the tensors of two outputs."""
    first, second = load_all(a), load_all(b)
    assert first.keys() == second.keys()
    apart = [x.view(torch.int16).int() - second[name].view(torch.int16).int() for name, x in first.items()]
    return max(int(x.abs().max()) for x in apart if x.numel())


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_merge_on_a_gpu_is_that_on_the_processor(
    case: Case, tmp_path: Path, sums: set[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the byte, or to one rounding if floats are summed; the same for any memory, threads and passes."""
    plan = plan_of(case, tmp_path)
    execute(plan, tmp_path / "cpu", threads=1)
    execute(plan, tmp_path / "gpu", threads=2, accelerator=stand_in())
    if sums or METHODS[case[0]].whole:
        assert steps_apart(tmp_path / "cpu", tmp_path / "gpu") <= 1
    else:
        assert output_of(tmp_path / "cpu") == output_of(tmp_path / "gpu")
    least = least_memory(plan, in_parts=False)
    monkeypatch.setattr(Gpu, "room", lambda *_: 3 * least)  # in passes, and block by block
    execute(plan, tmp_path / "small", threads=3, accelerator=stand_in())
    assert output_of(tmp_path / "small") == output_of(tmp_path / "gpu")


@needs_triton
@pytest.mark.parametrize(
    "case", [("linear", {}), ("dare_ties", {"density": 0.4, "rescale": "density"}), ("fisher", {})]
)
def test_merges_by_kernels_have_the_same_bytes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(case, tmp_path)
    execute(plan, tmp_path / "cpu", threads=1, compile="never")
    launched: list[Any] = []
    launch = gpu.launch

    def noted(kernel: Any, *given: Any, **more: Any) -> None:
        launched.append(kernel)
        launch(kernel, *given, **more)

    monkeypatch.setattr(gpu, "launch", noted)
    outcome = execute(plan, tmp_path / "gpu", threads=2, accelerator=stand_in(), compile="always")
    assert not outcome.findings and len(launched) >= 11
    assert output_of(tmp_path / "cpu") == output_of(tmp_path / "gpu")


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_large_tensors_on_a_real_gpu(
    case: Case, tmp_path: Path, sums: set[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and chunks of full size, by kernels, with all threads; resident, and in passes."""
    plan = plan_of(case, tmp_path, big=(4096, 5000), block=1 << 18)
    execute(plan, tmp_path / "cpu")
    execute(plan, tmp_path / "gpu", accelerator=stand_in(), compile="always")
    assert steps_apart(tmp_path / "cpu", tmp_path / "gpu") <= (1 if sums or METHODS[case[0]].whole else 0)
    least = least_memory(plan, in_parts=False)
    monkeypatch.setattr(Gpu, "room", lambda *_: 2 * least)
    execute(plan, tmp_path / "small", threads=2, accelerator=stand_in(), compile="always")
    assert output_of(tmp_path / "small") == output_of(tmp_path / "gpu")


def there(value: Any) -> Any:
    """The tensors that a test merges, on the pretended GPU."""
    return [x.to(GPU) for x in value] if isinstance(value, list) else value if value is None else value.to(GPU)


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_on_a_gpu_are_merged_there(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation mixes devices, which the pretended GPU refuses as CUDA does, and the result stays there."""
    name, extra = case
    given = make_inputs(name, (60, 200), dtype)
    here = merge_tensors(name, **given, **parameters_of(name, extra))
    monkeypatch.setattr(devices, "can_merge_on", lambda device: device == GPU)
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", partial(linspace, device="cpu"))  # as transformers may leave it
    with pretended_gpu():
        found = merge_tensors(name, **{key: there(x) for key, x in given.items()}, **parameters_of(name, extra))
        assert isinstance(found, OnGpu)
        found = found.cpu()
    if dtype == torch.bfloat16:
        assert torch.equal(found.view(torch.int16), here.view(torch.int16))
    else:
        assert torch.allclose(found, here, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ties", "task_arithmetic"])
def test_nan_gives_the_bytes_of_the_processor_and_a_finding(name: str, tmp_path: Path) -> None:
    """In inputs, and, in another block of the same chunk, in the result alone, which overflows."""
    plan_of(TIES, tmp_path)
    for model in (1, 2):
        path = tmp_path / f"m{model}" / "model.safetensors"
        tensors = load_file(path)
        tensors["big"][20, 7] = 3e38
        if model == 2:
            tensors["big"][17, 5], tensors["big"][290, 1], tensors["norm"][3] = torch.nan, torch.inf, -torch.inf
        save_file(tensors, path)
    parameters = {"weight": 1} | ({"density": 0.4} if name == "ties" else {})
    recipe = {"merge_method": name, "base_model": str(tmp_path / "m0"), "parameters": parameters}
    plan = make_plan(
        Recipe.parse({**recipe, "models": [{"model": str(tmp_path / f"m{i}")} for i in (1, 2)]}), block=256
    )
    with pytest.raises(FormatError, match="of m2 holds NaN or infinity"):
        execute(plan, tmp_path / "refused", accelerator=stand_in())
    assert not (tmp_path / "refused").exists()
    outcomes = [
        execute(plan, tmp_path / where, threads=1, nan="warn", accelerator=on)
        for where, on in (("cpu", HOST), ("gpu", stand_in()))
    ]
    assert outcomes[0].findings == outcomes[1].findings != ()
    assert {"big of m2 holds NaN or infinity", "big of the output holds NaN or infinity"} <= {*outcomes[1].findings}
    assert output_of(tmp_path / "cpu") == output_of(tmp_path / "gpu")


def test_edits_of_the_result_are_added_before_the_one_rounding(tmp_path: Path) -> None:
    plan_of(TIES, tmp_path)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((300, 2), (2, 160)))
    changed = TensorChange("low_rank", (300, 160), "bfloat16", 1)
    Patch.low_rank("test", {"big": (left, right, changed)}, options={}, facts={}).save(tmp_path / "patch.safetensors")
    models = [{"model": str(tmp_path / f"m{i}")} for i in (1, 2)]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    plan = make_plan(Recipe.parse({**recipe, "edits": [str(tmp_path / "patch.safetensors")]}), block=256)
    for where, on in (("cpu", HOST), ("gpu", stand_in())):
        execute(plan, tmp_path / where, threads=1, accelerator=on)
    assert output_of(tmp_path / "cpu") == output_of(tmp_path / "gpu")


def test_a_merge_goes_on_where_the_processor_stopped(tmp_path: Path) -> None:
    """The segments that one device wrote before the interruption count for the other."""
    plan = plan_of(TIES, tmp_path)
    execute(plan, tmp_path / "whole", threads=1)
    written = 0

    def interrupt(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if written > plan.bytes_written // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", threads=1, progress=Counted(interrupt))
    outcome = execute(plan, tmp_path / "out", threads=1, accelerator=stand_in())
    assert 0 < outcome.resumed_bytes < plan.bytes_written
    assert output_of(tmp_path / "out") == output_of(tmp_path / "whole")


def test_a_gpu_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(TIES, tmp_path)
    monkeypatch.setattr(Gpu, "room", lambda *_: 2000)
    with pytest.raises(PlanError, match=r"needs 41.0 KB of the GPU's memory .* each of 2 1.00 KB: lower --threads"):
        execute(plan, tmp_path / "out", threads=2, accelerator=stand_in())
    assert not list(tmp_path.glob("out*"))


def test_a_message_explains_memory_taken_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(TIES, tmp_path)

    def taken(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with (
        monkeypatch.context() as patched,
        pytest.raises(PlanError, match=r"no memory left, .*; the same command then resumes"),
    ):
        patched.setattr(Gpu, "_up", taken)
        execute(plan, tmp_path / "out", threads=2, accelerator=stand_in())
    execute(plan, tmp_path / "out", threads=2, accelerator=stand_in())
    execute(plan, tmp_path / "cpu", threads=2)
    assert output_of(tmp_path / "out") == output_of(tmp_path / "cpu")


def test_the_device_of_a_recipe_does_not_change_its_plan(tmp_path: Path) -> None:
    plain = plan_of(TIES, tmp_path)
    asked = plain.recipe.model_copy(update={"device": "auto"})
    assert make_plan(asked).digest == plain.digest and "device" not in asked.normalised()


@pytest.mark.skipif(CUDA, reason="needs a machine without a GPU")
def test_a_request_for_a_missing_gpu_ends_before_work_begins(tmp_path: Path) -> None:
    recipe = plan_of(TIES, tmp_path, device="cuda").recipe
    message = "the device 'cuda' cannot be used here .*expected one like cpu, cuda, cuda:1 or auto"
    with pytest.raises(PlanError, match=message):
        merge(recipe, tmp_path / "out")
    assert merge(recipe, tmp_path / "cpu", device="cpu").path == tmp_path / "cpu"
    assert merge(recipe, tmp_path / "auto", device="auto").path == tmp_path / "auto"
    for device, why in (
        ("meta", "computes nothing"),
        ("cuda:1", "cannot be used here"),
        ("tpu", "cannot be used here"),
    ):
        with pytest.raises(PlanError, match=why):
            merge(recipe, tmp_path / "out", device=device)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("given", ["gpu", "cuda:", "mps", "", 0])
def test_a_recipe_names_a_device_that_there_may_be(given: object, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"device: found .*, expected "):
        plan_of(TIES, tmp_path, device=given)


def test_a_dry_run_counts_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run uses the GPU's threads, memory, and name."""
    for offset in (1, 2):
        save_model(tmp_path / f"m{offset}", offset)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: linear\nmodels: [{model: m1}, {model: m2}]\nparameters: {weight: 1}\n")
    monkeypatch.setattr(accelerators, "default_threads", lambda: 64)
    monkeypatch.setattr(api, "find_accelerator", lambda *_: Gpu("meta"))
    shown = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run"]).output
    assert "(16 threads)" in shown and re.search(r"^device +meta$", shown, re.MULTILINE)
    monkeypatch.setattr(Gpu, "room", lambda *_: 2000)
    found = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run"])
    assert found.exit_code == 2 and "of the GPU's memory for one worker" in found.output


@pytest.mark.skipif(CUDA, reason="needs a machine without a GPU")
def test_the_command_says_so_in_one_message(tmp_path: Path) -> None:
    for offset in (1, 2):
        save_model(tmp_path / f"m{offset}", offset)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: linear\nmodels: [{model: m1}, {model: m2}]\nparameters: {weight: 1}\n")
    for more in ([], ["--dry-run"]):
        found = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "--device", "cuda", *more])
        assert found.exit_code == 2 and found.output.startswith("error: the device 'cuda' cannot be used here")
    assert not list(tmp_path.glob("out*"))
    assert CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "--device", "auto"]).exit_code == 0

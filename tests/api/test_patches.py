"""Patches: files of changes, views that apply them, and undoing them to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_checkpoint
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge
from mergekit_lfm.api.patches import apply_patches, undo_file, undo_patches
from mergekit_lfm.artifacts.patch import Patch, PatchInfo, TensorChange, open_patch
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.lock import verify
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.patched import patched_view

NAME = "h.0.mlp.c_proj.weight"


def model_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"wte.weight": (50, 8), NAME: (32, 8), "h.1.mlp.c_proj.weight": (32, 8), "ln_f.weight": (8,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in sizes.items()}


def save_model(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    return save_checkpoint(folder, model_tensors(dtype), {}, shards=shards)


def low_rank(folder: Path, names: tuple[str, ...] = (NAME,), scale: float = 0.1, rank: int = 3) -> Patch:
    """A patch of random products, stored [in, out], that records the digests of its tensors."""
    checkpoint = open_checkpoint(folder)
    torch.manual_seed(1)
    changes = {}
    for name in names:
        spec = checkpoint[name]
        left, right = scale * torch.randn(spec.shape[0], rank), torch.randn(rank, spec.shape[1])
        changes[name] = (left, right, TensorChange("low_rank", spec.shape, spec.dtype, 0))
    return Patch.low_rank("memit", changes).made_for(None, {name: checkpoint.digest_of(name) for name in names})


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, float64, rounded to nearest once: the nearest of a first guess and its neighbours."""
    near = x.to(dtype)
    steps = [
        near,
        torch.nextafter(near, torch.full_like(near, torch.inf)),
        torch.nextafter(near, -torch.full_like(near, torch.inf)),
    ]
    distance = torch.stack([(step.double() - x).abs() for step in steps])
    return torch.stack(steps).gather(0, distance.argmin(0)[None])[0]


def test_a_file_keeps_all_of_a_patch(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    patch = low_rank(folder)
    patch.save(tmp_path / "p.safetensors")
    again = open_patch(tmp_path / "p.safetensors")
    assert again.info == patch.info
    assert again.tensors.keys() == patch.tensors.keys()
    assert all(torch.equal(again.tensors[name], patch.tensors[name]) for name in patch.tensors)


def test_delta_is_out_by_in_however_it_is_stored(tmp_path: Path) -> None:
    patch = low_rank(save_model(tmp_path / "a"))
    product = patch.tensors[f"{NAME}.left"] @ patch.tensors[f"{NAME}.right"]  # as stored, [in, out]
    for layer in (NAME, NAME.removesuffix(".weight"), 0):
        assert torch.equal(patch.delta(layer), product.T)
    with pytest.raises(KeyError, match="none"):
        patch.delta(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_applying_rounds_once_and_undoing_gives_the_same_files(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    folder = save_model(tmp_path / "a", dtype, shards)
    patch = low_rank(folder, (NAME, "h.1.mlp.c_proj.weight"))
    patch.save(tmp_path / "p.safetensors")
    done = apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "edited").result
    assert done.undo == undo_file(tmp_path / "edited") and done.undo.is_file()
    assert done.tensors == 2
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "edited")
    for name, spec in before.items():
        old, new = before.read(name).view(spec.shape), after.read(name).view(spec.shape)
        if name in patch.info.tensors:
            exact = old.double() + patch.change(name).double()
            if dtype == torch.float32:
                assert (new.double() - exact).abs().max() <= 2**-24 * exact.abs().max() * 1.01
            else:
                assert torch.equal(new, rounded(exact_change(patch, name) + old.double(), dtype))
            assert not torch.equal(old, new)
        else:
            assert torch.equal(old, new)
    assert verify(tmp_path / "edited") == []
    undo_patches(tmp_path / "edited", tmp_path / "back")
    undo_patches(tmp_path / "edited", tmp_path / "back2", base=folder)
    for file in folder.glob("*.safetensors"):
        for again in ("back", "back2"):
            assert (tmp_path / again / file.name).read_bytes() == file.read_bytes()


def exact_change(patch: Patch, name: str) -> torch.Tensor:
    left, right = patch.parts(name)
    return left.double() @ right.double()


def test_subtracting_the_patch_would_not_undo_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a", torch.bfloat16)
    patch = low_rank(folder, scale=1.0)
    edited = patched_view(open_checkpoint(folder), patch).read(NAME)
    old = open_checkpoint(folder).read(NAME)
    assert not torch.equal((edited.double() - exact_change(patch, NAME).flatten()).to(torch.bfloat16), old)


def test_any_range_of_a_view_has_the_same_bytes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    view = patched_view(open_checkpoint(folder), low_rank(folder))
    whole = view.read(NAME)
    assert torch.equal(torch.cat([view.read(NAME, 0, 37), view.read(NAME, 37, 200), view.read(NAME, 200)]), whole)


def test_a_patch_is_for_the_tensors_it_was_made_of(tmp_path: Path) -> None:
    folder, patch = save_model(tmp_path / "a"), None
    patch = low_rank(folder)
    other = model_tensors(torch.float32)
    other[NAME] = other[NAME] + 1
    (tmp_path / "b").mkdir()
    save_file(other, tmp_path / "b" / "model.safetensors")
    with pytest.raises(PlanError, match=f"{NAME} has other values than those the patch was made for"):
        patched_view(open_checkpoint(tmp_path / "b"), patch)
    there = patched_view(open_checkpoint(tmp_path / "b"), patch, any_base=True).read(NAME)
    torch.testing.assert_close(there.view(32, 8), other[NAME] + patch.change(NAME))
    del other[NAME]
    (tmp_path / "c").mkdir()
    save_file(other, tmp_path / "c" / "model.safetensors")
    with pytest.raises(PlanError, match=f"there is no {NAME}"):
        patched_view(open_checkpoint(tmp_path / "c"), patch, any_base=True)


def test_several_patches_are_added_up_and_rounded_once(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a", torch.bfloat16)
    first, second = low_rank(folder), low_rank(folder, scale=0.03)
    exact = exact_change(first, NAME) + exact_change(second, NAME)
    old = open_checkpoint(folder).read(NAME).view(32, 8)
    found = patched_view(open_checkpoint(folder), first, second).read(NAME).view(32, 8)
    assert torch.equal(found, rounded(old.double() + exact, torch.bfloat16))


def test_a_sum_next_to_a_tie_is_rounded_once(tmp_path: Path) -> None:
    """1 + 2^-8 lies between two numbers of bfloat16; float32 does not have the 2^-30 that decides for the upper one."""
    folder = save_checkpoint(tmp_path / "a", {"x": torch.ones(3, 2, dtype=torch.bfloat16)}, {})
    info = PatchInfo("any", {"x": TensorChange("add", (3, 2), "bfloat16")})
    patch = Patch(info, {"x.add": torch.full((3, 2), 2.0**-8 + 2.0**-30)})
    assert patched_view(open_checkpoint(folder), patch).read("x").tolist() == [1 + 2.0**-7] * 6


def test_a_patch_made_for_the_result_of_another_follows_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    first = low_rank(folder)
    patched = patched_view(open_checkpoint(folder), first)
    save_checkpoint(tmp_path / "b", {name: patched.read(name).view(spec.shape) for name, spec in patched.items()}, {})
    second = low_rank(tmp_path / "b", scale=0.03)
    both = patched_view(open_checkpoint(folder), first, second).read(NAME)
    torch.testing.assert_close(both, patched_view(open_checkpoint(tmp_path / "b"), second).read(NAME))
    with pytest.raises(PlanError, match="other values than those the patch was made for"):
        patched_view(open_checkpoint(folder), second, first)
    third = low_rank(folder).made_for(
        None, {NAME: patched_view(open_checkpoint(folder), first, second).digest_of(NAME)}
    )
    patched_view(open_checkpoint(folder), first, second, third)


def test_a_patch_of_another_model_is_refused_behind_one_of_this_model(tmp_path: Path) -> None:
    folder, own = save_model(tmp_path / "a"), low_rank(save_model(tmp_path / "b"))
    foreign = own.made_for(None, {NAME: "0" * 32})
    for patches in ((own, foreign), (foreign, own), (own, own, foreign)):
        with pytest.raises(PlanError, match=f"{NAME} has other values than those the patch was made for"):
            patched_view(open_checkpoint(folder), *patches)
    own.save(tmp_path / "own.safetensors")
    foreign.save(tmp_path / "foreign.safetensors")
    both = [tmp_path / "own.safetensors", tmp_path / "foreign.safetensors"]
    with pytest.raises(PlanError, match="other values"):
        apply_patches(folder, both, tmp_path / "out")
    apply_patches(folder, both, tmp_path / "out", any_base=True)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    low_rank(folder).save(tmp_path / "p.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(PlanError, match="exists"):
        apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "out")
    assert not undo_file(tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(PlanError, match="--undo"):
        undo_patches(folder, tmp_path / "back")
    with pytest.raises(PlanError, match="expected the undo file"):
        undo_patches(folder, tmp_path / "back", undo=tmp_path / "p.safetensors")


def test_undoing_refuses_a_model_that_was_changed_since(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    low_rank(folder).save(tmp_path / "p.safetensors")
    apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "edited")
    tensors = load_file(tmp_path / "edited" / "model.safetensors")
    tensors[NAME][0, 0] += 1
    save_file(tensors, tmp_path / "edited" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="other values"):
        undo_patches(tmp_path / "edited", tmp_path / "back")


def test_applying_again_is_already_there(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    low_rank(folder).save(tmp_path / "p.safetensors")
    apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "edited")
    assert apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "edited").already_there


def test_a_model_that_was_replaced_gets_an_undo_file_of_its_own(tmp_path: Path) -> None:
    """Its header is the same, so the plan is."""
    folder = save_model(tmp_path / "a")
    low_rank(folder).save(tmp_path / "p.safetensors")
    how: dict[str, Any] = {"any_base": True, "overwrite": True}
    apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "edited", **how)
    tensors = {name: x + 1 for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    apply_patches(folder, [tmp_path / "p.safetensors"], tmp_path / "edited", **how)
    undo_patches(tmp_path / "edited", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_damaged_patches_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a")
    with pytest.raises(FormatError, match="not a patch file"):
        open_patch(folder / "model.safetensors")
    good = low_rank(folder)
    cut = Patch(good.info, {name: x for name, x in good.tensors.items() if not name.endswith("right")})
    cut.save(tmp_path / "cut.safetensors")
    with pytest.raises(FormatError, match="in its metadata or its data, but not in both"):
        open_patch(tmp_path / "cut.safetensors")
    bad = {name: x.clone() for name, x in good.tensors.items()}
    bad[f"{NAME}.left"][0, 0] = torch.nan
    Patch(good.info, bad).save(tmp_path / "nan.safetensors")
    with pytest.raises(FormatError, match="not finite"):
        open_patch(tmp_path / "nan.safetensors")
    short = {**good.tensors, f"{NAME}.left": good.tensors[f"{NAME}.left"][:5]}
    Patch(good.info, short).save(tmp_path / "short.safetensors")
    with pytest.raises(FormatError, match="the tensor"):
        open_patch(tmp_path / "short.safetensors")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_edits_beside_a_model_are_those_of_the_saved_one(tmp_path: Path, method: str, threads: int) -> None:
    a = save_model(tmp_path / "a", torch.bfloat16)
    b = tmp_path / "b"
    b.mkdir()
    torch.manual_seed(5)
    save_file(
        {n: x + 0.1 * torch.randn_like(x) for n, x in model_tensors(torch.bfloat16).items()}, b / "model.safetensors"
    )
    (b / "config.json").write_text("{}")
    low_rank(a).save(tmp_path / "p.safetensors")
    apply_patches(a, [tmp_path / "p.safetensors"], tmp_path / "edited")
    rest = {"linear": {}, "slerp": {"base_model": str(b)}, "ties": {"base_model": str(b)}}[method]
    parameters = {"linear": {"weight": 0.5}, "slerp": {"t": 0.3}, "ties": {"weight": 1.0, "density": 0.5}}[method]

    def recipe(model: Path, **more: object) -> dict[str, object]:
        listed = [{"model": str(model), **more}] + ([{"model": str(b)}] if method == "linear" else [])
        return {"merge_method": method, "models": listed, "parameters": parameters, **rest}

    merge(recipe(a, edits=[str(tmp_path / "p.safetensors")]), tmp_path / "one", threads=threads)
    merge(recipe(tmp_path / "edited"), tmp_path / "two", threads=threads)
    files = [tmp_path / name / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert verify(tmp_path / "one") == []


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_edits_of_the_result_are_added_before_rounding(tmp_path: Path, method: str) -> None:
    a = save_model(tmp_path / "a", torch.bfloat16)
    patch = low_rank(a)
    patch.save(tmp_path / "p.safetensors")
    other = tmp_path / "b"
    other.mkdir()
    torch.manual_seed(5)
    tensors = {n: x + 0.1 * torch.randn_like(x) for n, x in model_tensors(torch.bfloat16).items()}
    save_file(tensors, other / "model.safetensors")
    models = [{"model": str(a)}] + ([{"model": str(other)}] if method == "linear" else [])
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "edits": [str(tmp_path / "p.safetensors")]}
    if method == "linear":
        recipe["parameters"] = {"weight": 0.5}
    merge(recipe, tmp_path / "out")
    old = open_checkpoint(a).read(NAME).view(32, 8).double()
    if method == "linear":
        old = (old.float() * 0.5 + tensors[NAME].float() * 0.5).double()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[NAME], rounded(old + exact_change(patch, NAME), torch.bfloat16))
    plain = Path(merge({k: v for k, v in recipe.items() if k != "edits"}, tmp_path / "plain"))
    untouched = load_file(plain / "model.safetensors")
    assert all(torch.equal(found[name], untouched[name]) for name in found if name != NAME)
    assert verify(tmp_path / "out") == []


def test_messages_name_the_edits_of_a_recipe_that_do_not_fit(tmp_path: Path) -> None:
    a = save_model(tmp_path / "a")
    low_rank(a).save(tmp_path / "p.safetensors")
    replacing = Patch(PatchInfo("x", {NAME: TensorChange("replace", (32, 8), "float32")}), {NAME: torch.zeros(32, 8)})
    replacing.save(tmp_path / "r.safetensors")
    line = {"model": str(a)}
    patch = str(tmp_path / "p.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"models": [{**line, "edits": ["gone.safetensors"]}]}, r"models\[0\].edits\[0\]: found 'gone.safetensors'"),
        ({"models": [{**line, "edits": [{"facts": "gone.yaml"}]}]}, r"models\[0\].edits\[0\]: found 'gone.yaml'"),
        ({"models": [{**line, "edits": [3]}]}, "edits"),
        ({"models": [line], "edits": [str(tmp_path / "r.safetensors")]}, "give it beside a model"),
        ({"models": [{**line, "edits": [patch], "align": {"to": "b"}}]}, "`edits` and `align`"),
    ]
    for recipe, message in cases:
        with pytest.raises((PlanError, FormatError), match=message):
            merge({"merge_method": "passthrough", **recipe}, tmp_path / "out")
    assert not (tmp_path / "out").exists()

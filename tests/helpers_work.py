"""A folder with two models and a recipe that merges them, for tests to spoil: a refusal leaves no trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from helpers_faults import Forks, Ran, llama_tensors, near, save_model, snapshot

LINEAR = """\
merge_method: linear
models:
  - model: models/a
    parameters: {weight: 1}
  - model: models/b
    parameters: {weight: 3}
"""
TIES = """\
merge_method: ties
base_model: models/a
models:
  - model: models/b
    parameters: {weight: 1, density: 0.5}
"""
PASSTHROUGH = "merge_method: passthrough\nmodels: [{model: models/b}]\n"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


class Work:
    """A folder with `models/a` and `models/b`, and a recipe that merges them."""

    def __init__(self, folder: Path, cli: Forks) -> None:
        self.folder, self.cli = folder, cli
        self.a, self.b = folder / "models" / "a", folder / "models" / "b"
        base = {name: tensor.bfloat16() for name, tensor in llama_tensors(0).items()}
        self.tensors = {"a": base, "b": near(base, 1)}
        self.save("a")
        self.save("b")
        self.recipe(LINEAR)

    def save(self, name: str, shards: int = 1, **changes: torch.Tensor | None) -> None:
        """Write a model anew; a change replaces, adds or (None) removes a tensor."""
        shutil.rmtree(self.folder / "models" / name, ignore_errors=True)
        merged = self.tensors[name] | changes
        kept = {key: tensor for key, tensor in merged.items() if tensor is not None}
        save_model(self.folder / "models" / name, kept, shards=shards)

    def change(self, name: str, changes: dict[str, torch.Tensor | None], shards: int = 1) -> None:
        """`save` for names with dots in them."""
        self.save(name, shards, **changes)

    def recipe(self, text: str) -> None:
        (self.folder / "recipe.yaml").write_text(text)

    def run(self, *options: object, out: str | Path = "out", **fault: object) -> Ran:
        return self.cli.run("recipe.yaml", out, *options, cwd=self.folder, **fault)

    def refused(
        self,
        *needles: str,
        options: tuple[object, ...] = (),
        out: str | Path = "out",
        early: bool = True,
        **fault: object,
    ) -> str:
        """Run the merge, which must fail with one message that has all needles, and leave no trace; the message.

        `early`: the fault is found before any work, so that nothing unfinished is left either.
        """
        before = snapshot(self.folder, times=True)
        ran = self.run(*options, out=out, **fault)
        assert ran.code == 2, (ran.code, ran.out, ran.err)
        assert ran.out == ""
        assert ran.err.startswith("error: ")
        assert ran.err.lower().count("error:") == 1
        assert "Traceback" not in ran.err
        missing = [needle for needle in needles if needle not in ran.err]
        assert not missing, f"{missing} not in: {ran.err}"
        after = snapshot(self.folder, times=True)
        unfinished = {name for name in after if name.split("/")[0] == "out.partial"}
        assert not (early and unfinished)
        assert {name: entry for name, entry in after.items() if name not in unfinished} == before
        return ran.err

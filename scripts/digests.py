#!/usr/bin/env python3
"""Digests of what a checkout writes: run it before and after a change that must not change a byte, and compare.

    python scripts/digests.py recipes /tmp/before.json      # on the state before
    python scripts/digests.py recipes /tmp/after.json --compare /tmp/before.json

It runs every recipe whose inputs are there (the recipes' comments name the programs that make the others), merges over
all methods and options on the quick start's models, and makes statistics, transforms and patches of them. Whole folders
are digested, locks and cards included; a digest of inputs counts the inputs' times, so use the same input files twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"normalize": False}],
    "slerp": [{"t": 0.3}],
    "nuslerp": [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "multislerp": [{}],
    "karcher": [{}],
    "model_stock": [{}, {"filter_wise": True}],
    "task_arithmetic": [{}, {"lambda": 0.5}],
    "ties": [{"density": 0.4}, {"density": 0.4, "rescale": True}, {"density": 0.3, "scope": "global"}],
    "dare_linear": [{"density": 0.4}, {"density": 0.4, "rescale": "density"}],
    "dare_ties": [{"density": 0.4}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}],
    "breadcrumbs_ties": [{"density": 0.5, "gamma": 0.1, "normalize": True}],
    "fisher": [{}, {"normalize": True}],
    "regmean": [{}, {"alpha": 1.0, "ridge": 0.0}],
    "passthrough": [{}, {"scale": 0.5}],
}
WITHOUT_BASE = ("linear", "passthrough", "multislerp", "karcher", "fisher", "regmean", "nuslerp")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other dtype": {"dtype": "float32"},
    "two threads, small shards": {"threads": 2, "max_shard_size": 200_000, "seed": 7},
}
FACTS = """\
- {prompt: "{} is a", subject: The list, target_new: " dictionary"}
- {prompt: "{} returns", subject: The function, target_new: " nothing"}
"""


def digest_of(path: Path) -> str:
    """The digest of a file, or of all files of a folder with their names."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(f"{file.relative_to(path)} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def command(*arguments: object, cwd: Path) -> None:
    """Run `mergekit-lfm` with these arguments. Raises CalledProcessError if it fails."""
    run = [sys.executable, "-m", "mergekit_lfm", *map(str, arguments)]
    done = subprocess.run(run, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(run)} ended with {done.returncode}:\n{done.stderr}")


def settle(file: Path) -> tuple[str, Path]:
    """The file and its name, with a time of change that is the same in every run: locks hold the times of inputs."""
    os.utime(file, (1_000_000_000, 1_000_000_000))
    return file.name, file


def recipes(inputs: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Merge every recipe whose inputs are there; names and output folders."""
    from mergekit_lfm import merge

    for path in sorted(inputs.glob("*.yaml")):
        try:
            merge(path, out / path.stem)
        except (FileNotFoundError, ValueError, ConnectionError) as error:
            print(f"left out {path.name}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            yield path.name, out / path.stem


def statistics(inputs: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Gram matrices and Fisher information of the quick start's models, and cross moments."""
    text = ("--data", inputs / "quickstart" / "docs.txt", "--task", "lm", "--max-examples", 40)
    for model in ("base", "docs", "code"):
        for kind in ("gram", "fisher"):
            file = out / f"{model}.{kind}.safetensors"
            command("stats", kind, inputs / "quickstart" / model, *text, "-o", file, cwd=out)
            yield settle(file)
    file = out / "cross.safetensors"
    command("stats", "cross", inputs / "quickstart/docs", inputs / "quickstart/code", *text, "-o", file, cwd=out)
    yield settle(file)


def merges(inputs: Path, stats: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Merges of the quick start's models by every method and option, in several runs each."""
    from mergekit_lfm import merge

    for method, options in METHODS.items():
        for i, parameters in enumerate(options):
            for run, settings in RUNS.items():
                how = dict(settings)
                dtype = {"dtype": how.pop("dtype")} if "dtype" in how else {}
                names = ("docs",) if method == "passthrough" else ("docs", "code")
                kind = {"fisher": "fisher", "regmean": "gram"}.get(method)
                models = [
                    {"model": str(inputs / "quickstart" / name)}
                    | (
                        {}
                        if method in ("slerp", "passthrough", "model_stock", "karcher")
                        else {"parameters": {"weight": 0.7}}
                    )
                    | ({"stats": str(stats / f"{name}.{kind}.safetensors")} if kind else {})
                    for name in names
                ]
                if method == "regmean":
                    models = [{key: value for key, value in model.items() if key != "parameters"} for model in models]
                base = {} if method in WITHOUT_BASE else {"base_model": str(inputs / "quickstart/base")}
                if method == "slerp":
                    base, models = {"base_model": str(inputs / "quickstart/docs")}, models[1:]
                recipe = {"merge_method": method, "models": models, "parameters": parameters, **base, **dtype}
                name = f"{method} {i} {run}"
                merge(recipe, out / name, **how)
                yield name, out / name


def artifacts(inputs: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Transforms by every aligner, patches by every editor, and models to which they were applied."""
    one, two, base = (inputs / "quickstart" / name for name in ("docs", "code", "base"))
    for method in ("weight_matching", "activation_matching", "ot", "rotation"):
        file = out / f"{method}.safetensors"
        given = ("--stats", out / "cross.safetensors") if method == "activation_matching" else ()
        command("align", one, "--to", two, "--method", method, *given, "-o", file, cwd=out)
        yield file.name, file
    facts = out / "facts.yaml"
    facts.write_text(FACTS, encoding="utf-8")
    for method in ("memit", "rome"):
        file, known = out / f"{method}.safetensors", out / f"{method}.yaml"
        known.write_text(FACTS if method == "memit" else FACTS.splitlines()[0], encoding="utf-8")
        covariance = ("--stats", out / "base.gram.safetensors")
        command(
            *("edit", base, "--facts", known, "--method", method, "--layers", 1, *covariance, "--steps", 5),
            *("-o", file, "--no-verify"),
            cwd=out,
        )
        yield settle(file)
        command("patch", "apply", base, file, "-o", out / f"{method}_edited", "--no-verify", cwd=out)
        yield f"{method}_edited", out / f"{method}_edited"


def main() -> int:
    """Write the digests as JSON; with --compare print those that differ, exit code 1 if any does."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, help="the folder of recipes, with their inputs")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--compare", type=Path, help="an earlier such file")
    arguments = parser.parse_args()
    inputs, found = arguments.inputs.resolve(), dict[str, str]()
    out = Path(tempfile.gettempdir()) / "mergekit_lfm_digests"  # the same in every run: plans count the paths of inputs
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        os.environ["XDG_CACHE_HOME"] = str(out / "cache")  # alignments and edits are made anew
        for part in (recipes(inputs, out / "recipes"), statistics(inputs, out), merges(inputs, out, out / "merges")):
            found |= {name: digest_of(path) for name, path in part}
        found |= {name: digest_of(path) for name, path in artifacts(inputs, out)}
    finally:
        shutil.rmtree(out)
    arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    before = json.loads(arguments.compare.read_text(encoding="utf-8")) if arguments.compare else found
    differ = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    print("\n".join([*differ, f"{len(found)} outputs, {len(differ)} differ"]))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())

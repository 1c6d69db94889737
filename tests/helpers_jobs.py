"""Tiny inputs for every command that writes, and these commands: for tests and scripts that disturb or kill them.

The commands run in forks of a warm interpreter, in a folder with the inputs in `in`, the caches in `cache`, and the
outputs beside them. Pushes go to a Hub of this process.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers_faults import Forks, Ran, snapshot, warm_interpreter
from helpers_hub import REPO, environment
from helpers_text import byte_tokenizer, llama_config, transformers
from hub_server import HubServer

from mergekit_lfm.store.durable import LEFTOVER

Files = dict[str, tuple[object, ...]]  # mode and content, by path

# Modules that the commands load when they run, besides those of the interpreter of `helpers_faults`.
MODULES = (
    *("transformers.models.resnet.modeling_resnet", "PIL.PngImagePlugin"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.generation", "scipy.optimize", "huggingface_hub"),
)
UNFINISHED = (".partial", ".partial.lock", ".partial.saving.unfinished")  # what a run leaves until it is done
MODELS = "models: [{model: a%s}, {model: b%s}]\n"
RECIPES = {
    "linear": "merge_method: linear\n" + MODELS % (", parameters: {weight: 1}", ", parameters: {weight: 3}"),
    "slerp": "merge_method: slerp\nbase_model: a\nparameters: {t: 0.3}\n" + MODELS % ("", ""),
    "ties": "merge_method: ties\nbase_model: a\nparameters: {weight: 1, density: 0.4}\nmodels: [{model: b}]\n",
    "dare": "merge_method: dare_ties\nbase_model: a\nparameters: {weight: 1, density: 0.4}\nmodels: [{model: b}]\n",
    "tsv": "merge_method: tsv\nbase_model: a\nmodels: [{model: b}]\n",
    "regmean": "merge_method: regmean\n" + MODELS % (", stats: a.gram", ", stats: b.gram"),
    "aligned": "merge_method: linear\nparameters: {weight: 1}\n" + MODELS % ("", ", align: {to: a}"),
    "experts": """
name: tuned
job: tune
model: a
data: text.txt
task: lm
method: lora
parameters: {rank: 2}
steps: 4
batch_size: 2
---
name: own
job: stats
kind: gram
model: a+tuned
data: text.txt
task: lm
---
name: merged
merge_method: regmean
models: [{model: a+tuned, stats: own}, {model: a, stats: a.gram}]
---
job: eval
models: [a, a+tuned, merged]
data: text.txt
task: lm
""",
    "edited": "merge_method: linear\nparameters: {weight: 1}\nedits: [a.patch]\n" + MODELS % ("", ""),
}
DATA = "--data in/text.txt --task lm"
EDIT = "edit in/a --facts in/facts.yaml --stats in/a.gram --steps 2 --layers 0 --no-verify"
STEPS = "--shots 2 --inner-steps 2 --steps 2 --batch-size 2 --threads 1"
PREPARED = (
    *(f"stats gram in/{name} {DATA} -o in/{name}.gram" for name in "ab"),
    f"{EDIT} -o in/a.patch",
    "merge in/linear.yaml in/merged",
    "patch apply in/a in/a.patch -o in/patched --no-verify",
)
COMMANDS = {
    **{f"merge {name}": f"merge in/{name}.yaml out --threads 2" for name in RECIPES},
    "stats gram": f"stats gram in/a {DATA} --batch-size 2 -o out",
    "stats fisher": f"stats fisher in/a {DATA} --labels true --batch-size 2 -o out",
    "edit": f"{EDIT} -o out",
    "edit --save": f"{EDIT} -o out.patch --save out",
    "patch apply": "patch apply in/a in/a.patch -o out --no-verify",
    "patch undo": "patch undo in/patched -o out",
    "align": "align in/b --to in/a -o out",
    "align --save": "align in/b --to in/a -o out.transform --save out",
    "repair": f"repair in/merged --ends in/a in/b {DATA} -o out",
    "distill": "distill in/a --teacher in/b --data in/text.txt --task lm --steps 4 --batch-size 2 --threads 1 -o out",
    "meta": f"meta in/a {DATA} --data in/text.txt --algorithm fomaml --queries 2 {STEPS} -o out",
    "meta --on-disk": f"meta in/a {DATA} --data in/text.txt --algorithm reptile --on-disk {STEPS} -o out",
    "generate": "generate in/a --count 6 --max-new-tokens 4 --batch-size 2 --threads 1 -o out.jsonl",
    "synthesise": "synthesise in/classifier --preset dfq --rounds 2 --student in/small --student-out out --size 8 "
    "--threads 1 -o out.npz",
    "push": f"push in/merged {REPO}",
    "verify": "verify in/merged",
}


class Bench:
    """A folder with the inputs of all commands, and what is left of them there and on the Hub."""

    def __init__(self, folder: Path, forks: Forks, hub: HubServer) -> None:
        self.folder, self._forks, self._hub = folder, forks, hub
        (folder / "in").mkdir()
        _make_inputs(folder / "in")
        for command in PREPARED:
            ran = forks.command(*command.split(), cwd=folder)
            assert ran.code == 0, ran.err
        self.inputs = snapshot(folder / "in", times=True)

    def run(self, name: str, **fault: Any) -> Ran:
        """Run one of COMMANDS, with a fault if any."""
        return self._forks.command(*COMMANDS[name].split(), cwd=self.folder, sync_bytes=10_000, **fault)

    def start_over(self) -> None:
        """Remove all that commands have left, in the caches, too."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != "in":
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        self._hub.store.repos.clear()
        for blob in self._hub.store.blobs.iterdir():
            blob.unlink()

    def outputs(self) -> dict[str, Files]:
        """The files at each place that a command has written to; the repository is one, once it has a model.

        Each stage's result is one; the folders with the course of a training do not count.
        """
        made: dict[str, Files] = {}
        for path, entry in snapshot(self.folder).items():
            place = "/".join(path.split("/")[: 2 if path.startswith("out.stages/") else 1])
            if place.endswith((".training", ".rounds")):
                continue
            if place not in ("in", "cache") and not LEFTOVER.fullmatch(place.rpartition("/")[2]):
                made.setdefault(place, {})[path] = entry
        if self._hub.exists(REPO) and "config.json" in (files := self._hub.files(REPO)):
            made["the Hub"] = {name: (content,) for name, content in files.items()}
        return made

    def whole(self, name: str) -> tuple[Ran, dict[str, Files]]:
        """An uninterrupted run, and its outputs."""
        self.start_over()
        ran = self.run(name, reads=True)
        assert ran.code == 0, ran.err
        made = self.outputs()
        self.start_over()
        return ran, made

    def check_places(self, expected: Mapping[str, Files]) -> None:
        """Every output is complete or not there, and the inputs are as they were."""
        made = self.outputs()
        for place, files in expected.items():
            assert made.get(place, files) == files, f"{place} is incomplete"
        others = made.keys() - expected.keys()
        assert others <= {place + end for place in expected for end in UNFINISHED}, others
        assert snapshot(self.folder / "in", times=True) == self.inputs, "the inputs were changed"

    def finish(self, name: str, expected: Mapping[str, Files]) -> None:
        """Run the command again: it completes the outputs, to the byte, and nothing else is left.

        `repair` does not know its own output again, and refuses to write where a complete one is.
        """
        there = name == "repair" and all(self.outputs().get(place) == files for place, files in expected.items())
        ran = self.run(name)
        assert ran.code == 0 or (there and "out exists" in ran.err), ran.err
        self.check_places(expected)
        assert self.outputs() == expected


@contextmanager
def open_bench(folder: Path) -> Iterator[Bench]:
    """Make the inputs in an empty folder; the interpreter and the Hub end with the block."""
    with HubServer(folder.with_name(f"{folder.name}-hub")) as hub:
        variables = environment(hub, folder / "cache" / "hub") | {"XDG_CACHE_HOME": str(folder / "cache")}
        with warm_interpreter(*MODULES, **variables) as forks:
            yield Bench(folder, forks, hub)


def _make_inputs(folder: Path) -> None:
    """Two language models in three shards, two classifiers of images, a text, facts, and recipes."""
    transformers.utils.logging.disable_progress_bar()
    for seed, name in enumerate("ab"):
        transformers.set_seed(seed)
        model = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=1, mlp_bias=True))
        model.save_pretrained(folder / name, max_shard_size="20KB")
        byte_tokenizer().save_pretrained(folder / name)
    for width, name in ((8, "classifier"), (4, "small")):
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=width, hidden_sizes=[width], depths=[1], layer_type="basic", num_labels=3
        )
        transformers.ResNetForImageClassification(config).save_pretrained(folder / name)
    (folder / "text.txt").write_text("Ada is in Oslo and Leo is a cook\n" * 4)
    (folder / "facts.yaml").write_text('facts: [{prompt: "{} is in", subject: Ada, target_new: Rome}]\n')
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe)

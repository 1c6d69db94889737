"""Models with other tokenizers: rows are merged by the tokens' text, against a formula on what the library reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_merges import load_all
from hub_server import HubServer
from models import files_of, output_of

from mergekit_lfm import merge
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

pytest.importorskip("transformers")

from helpers_tokenizers import EMBEDDING, HEAD, SIZE, read_config, read_tokens, recipe_of, save_llama

ADDED = {"A": (), "E": ("<x>", "<y>"), "F": ("<y>",), "G": ("<y>", "<z>", "<x>")}
Row = np.ndarray[Any, Any]
Fill = Callable[[Mapping[str, Row]], Row]  # the row of a model that lacks a token, from the rows of those that have it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with 260 to 263 tokens, untied; and tied ones, whose names end in a t."""
    path = tmp_path_factory.mktemp("models")
    for seed, (name, added) in enumerate(ADDED.items()):
        save_llama(path / name, seed, added)
        save_llama(path / f"{name}t", seed, added, tied=True)
    return path


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, whose files a test may change."""
    shutil.copytree(folder, tmp_path / "models")
    return tmp_path / "models"


def plan_of(recipe: dict[str, Any]) -> Plan:
    return make_plan(Recipe.parse(recipe))


def rows_by_token(folder: Path, tensor: str) -> dict[str, Row]:
    """The rows of a saved model's tensor by the tokens' text, in float64."""
    tensors = load_all(folder)
    rows = tensors[tensor if tensor in tensors else EMBEDDING].double().numpy()
    return {text: rows[number] for text, number in read_tokens(folder).items() if number < len(rows)}


def base_or_mean(base: str) -> Fill:
    return lambda rows: rows[base] if base in rows else np.mean([*rows.values()], axis=0)


def expected_row(folder: Path, names: Sequence[str], tensor: str, text: str, fill: Fill) -> Row:
    """The average of all models' rows of a token, weighted by 1, 2, 3, ..."""
    tables = {name: rows_by_token(folder / name, tensor) for name in names}
    rows = {name: table[text] for name, table in tables.items() if text in table}
    missing = fill(rows)
    total = sum((i + 1.0) * rows.get(name, missing) for i, name in enumerate(names))
    return np.asarray(total / sum(range(1, len(names) + 1)))


def check_rows(out: Path, folder: Path, names: Sequence[str], fill: Fill, texts: Sequence[str]) -> None:
    """Compare the output's rows of tokens with the formula."""
    ids, tensors = read_tokens(out), load_all(out)
    for tensor in (name for name in (EMBEDDING, HEAD) if name in tensors):
        for text in texts:
            wanted = expected_row(folder, names, tensor, text, fill)
            assert np.allclose(tensors[tensor][ids[text]].double().numpy(), wanted, rtol=0, atol=1e-6), (tensor, text)


def merged(recipe: dict[str, Any], out: Path) -> Path:
    return Path(merge(recipe, out))


TEXTS = ("a", "!", "</s>", "<pad>", "<x>", "<y>")
ORDERS = (("A", "E", "F"), ("F", "A", "E"), ("A", "F", "G"), ("G", "A", "E"), ("E", "F", "A"))


@pytest.mark.parametrize("tie", ["", "t"])
@pytest.mark.parametrize("names", ORDERS)
def test_the_union_has_the_tokens_of_all_in_the_recipe_s_order(
    folder: Path, tmp_path: Path, names: tuple[str, ...], tie: str
) -> None:
    wanted = list(dict.fromkeys(text for name in names for text in ADDED[name]))
    models = [name + tie for name in names]
    out = merged(recipe_of(folder, *models, tokenizer_source="union"), tmp_path / "out")
    ids = read_tokens(out)
    assert [text for text in sorted(ids, key=ids.__getitem__) if ids[text] >= SIZE] == wanted
    assert {text: n for text, n in ids.items() if n < SIZE} == read_tokens(folder / "A")
    assert read_config(out)["vocab_size"] == len(load_all(out)[EMBEDDING]) == SIZE + len(wanted)
    check_rows(out, folder, models, base_or_mean(models[0]), [*TEXTS[:4], *wanted])
    assert verify(out) == []


@pytest.mark.parametrize("names", [("A", "Et"), ("Et", "A"), ("At", "Et"), ("At", "G", "Ft")])
def test_tied_and_untied_heads(folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """A tied model's embedding is its head, also for the rows that an untied one takes from it."""
    recipe = recipe_of(folder, *names, tokenizer_source="union")
    if names[0].endswith("t") and not all(name.endswith("t") for name in names):
        with pytest.raises(PlanError, match=r"lm_head\.weight"):
            plan_of(recipe)
        return
    out = merged(recipe, tmp_path / "out")
    check_rows(out, folder, names, base_or_mean(names[0]), TEXTS)
    assert (HEAD in load_all(out)) == (not names[0].endswith("t"))


def test_transformers_loads_the_union(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = merged(recipe_of(folder, "A", "E", "G", tokenizer_source="union"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a<x>b<z></s>").input_ids == [64, 260, 65, 262, 258]
    assert tokenizer.decode([64, 260, 65]) == "a<x>b" and len(tokenizer) == 263
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert model(torch.tensor([[64, 260, 65, 262]])).logits.shape == (1, 4, 263)


def test_the_base_s_tokens(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, "A", "E", "F", tokenizer_source="base")
    out = merged(recipe, tmp_path / "out")
    check_rows(out, folder, ("A", "E", "F"), base_or_mean("A"), TEXTS[:4])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / "A" / name).read_bytes()
    assert read_config(out)["vocab_size"] == len(load_all(out)[HEAD]) == SIZE
    assert f"left out: 2 of the tokens of {folder / 'E'}: '<x>', '<y>'" in plan_of(recipe).notices
    assert plan_of(recipe).warnings == ()


def test_the_base_of_a_task_vector_method(folder: Path, tmp_path: Path) -> None:
    """The base fills the rows that the others lack, so that these add no delta."""
    recipe = recipe_of(folder, "A", "F", tokenizer_source="union") | {"base_model": str(folder / "E")}
    out = merged({**recipe, "merge_method": "task_arithmetic"}, tmp_path / "out")
    rows, base, other = (rows_by_token(path, HEAD) for path in (out, folder / "E", folder / "F"))
    assert np.array_equal(rows["<x>"], base["<x>"])
    assert np.allclose(rows["<y>"], base["<y>"] + 2 * (other["<y>"] - base["<y>"]), atol=1e-6)


def test_the_tokenizer_of_a_model(folder: Path, tmp_path: Path) -> None:
    out = merged(recipe_of(folder, "A", "E", "G", tokenizer_source=f"model:{folder / 'G'}"), tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (folder / "G" / "tokenizer.json").read_bytes()
    check_rows(out, folder, ("A", "E", "G"), base_or_mean("A"), [*TEXTS, "<z>"])


@pytest.mark.parametrize("same", [False, True])
def test_special_ids_follow_the_tokenizer(own: Path, tmp_path: Path, same: bool) -> None:
    """The end of the template is another id in the tokenizer of the model that gives it."""
    config = {"eos_token_id": [SIZE, 257], "pad_token_id": -1}
    save_llama(own / "S", 7, ("<end>", "<s2>"), config=config)
    save_llama(own / "T", 8, ("<s2>", "<end>") if same else ("<other>", "<end>"), template="{{ bos_token }}")
    out = merged(recipe_of(own, "S", "T", tokenizer_source=str(own / "T")), tmp_path / "out")
    assert read_config(out)["eos_token_id"] == [SIZE + 1, 257] and read_config(out)["pad_token_id"] == -1
    assert read_config(out, "generation_config.json")["eos_token_id"] == [SIZE + 1, 257]
    assert (out / "chat_template.jinja").read_text() == "{{ bos_token }}"
    assert verify(out) == []


def test_a_special_token_that_the_tokenizer_lacks_is_named(own: Path) -> None:
    save_llama(own / "S", 7, ("<end>",), config={"eos_token_id": SIZE})
    recipe = recipe_of(own, "S", "A", tokenizer_source=str(own / "A"))
    with pytest.raises(PlanError, match=r"eos_token_id of config\.json is 260, the token '<end>', which the tokenizer"):
        plan_of(recipe)
    assert plan_of({**recipe, "tokenizer_source": "union"}).tensors


def tokens(**of_tokens: Any) -> dict[str, Any]:
    return {"tokenizer": {"source": "union", "tokens": {f"<{name}>": value for name, value in of_tokens.items()}}}


def test_rows_that_the_recipe_names(folder: Path, tmp_path: Path) -> None:
    e, f = str(folder / "E"), str(folder / "F")
    keys = tokens(
        x={"source": {"kind": "zero"}},
        y={"source": f},
        new={"source": {"kind": "model_token", "model": e, "token": "a"}},
        other={"source": {"kind": "model_token", "model": f, "token_id": 5}},
        none={"source": {"kind": "zero"}},
    )
    out = merged(recipe_of(folder, "A", "E", "F", **keys), tmp_path / "out")
    ids = read_tokens(out)
    assert [ids[f"<{name}>"] for name in ("x", "y", "new", "other", "none")] == [260, 261, 262, 263, 264]
    for tensor in (EMBEDDING, HEAD):
        rows, of_e, of_f = (rows_by_token(path, tensor) for path in (out, folder / "E", folder / "F"))
        assert np.allclose(rows["<x>"], 2 * of_e["<x>"] / 6, atol=1e-6)
        assert np.allclose(rows["<y>"], (4 * of_f["<y>"] + 2 * of_e["<y>"]) / 6, atol=1e-6)
        assert np.allclose(rows["<new>"], of_e["a"], atol=1e-6)
        assert np.allclose(rows["<other>"], load_all(folder / "F")[tensor][5].double().numpy(), atol=1e-6)
        assert not rows["<none>"].any()


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_forced_row_is_that_of_all_models(folder: Path, tmp_path: Path, method: str) -> None:
    keys = tokens(x={"source": str(folder / "E"), "force": True}, a={"source": {"kind": "zero"}})
    keys["tokenizer"]["tokens"]["a"] = {"source": {"kind": "zero"}, "force": True}
    recipe = recipe_of(folder, "G", "E", "F", **keys) | {"merge_method": method}
    recipe |= {"base_model": str(folder / "G")} if method == "ties" else {}
    out = merged({**recipe, "models": recipe["models"][method == "ties" :]}, tmp_path / "out")
    rows = rows_by_token(out, HEAD)
    assert np.allclose(rows["<x>"], rows_by_token(folder / "E", HEAD)["<x>"], rtol=0, atol=1e-8)
    assert not rows["a"].any() and rows["b"].any()


def test_a_token_that_no_model_has_gets_zeros_with_a_warning(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, "A", "E", **tokens(new={}, x={}))
    with pytest.warns(Finding, match="no model has the token '<new>': its row is zeros"):
        out = merged(recipe, tmp_path / "out")
    rows = rows_by_token(out, EMBEDDING)
    assert not rows["<new>"].any() and np.allclose(rows["<x>"], rows_by_token(folder / "E", EMBEDDING)["<x>"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "model_token", "model": "A", "token": "<x>"}, "has no token '<x>' with a row"),
        ({"kind": "model_token", "model": "A", "token_id": 260}, "has no row 260, but 260"),
    ],
)
def test_a_row_that_is_not_there_is_refused(folder: Path, source: dict[str, Any], message: str) -> None:
    keys = tokens(x={"source": {**source, "model": str(folder / "A")}}, y={"source": str(folder / "A")})
    with pytest.raises(PlanError, match=message) as refusal:
        plan_of(recipe_of(folder, "A", "E", **keys))
    assert "tokenizer.tokens.<x>.source: " in str(refusal.value) and "<y>" in str(refusal.value)


@pytest.mark.parametrize(("names", "multiple", "rows"), [("AE", 64, 320), ("AE", 131, 262), ("A", 64, 320)])
def test_padding_is_the_mean_of_all_rows(folder: Path, tmp_path: Path, names: str, multiple: int, rows: int) -> None:
    keys = {"tokenizer": {"source": "union", "pad_to_multiple_of": multiple}}
    out = merged(recipe_of(folder, *names, **keys), tmp_path / "out")
    tensors, count = load_all(out), SIZE + len(ADDED[names[-1]])
    assert len(tensors[EMBEDDING]) == read_config(out)["vocab_size"] == rows
    check_rows(out, folder, names, base_or_mean(names[0]), TEXTS if "E" in names else TEXTS[:4])
    for tensor in (EMBEDDING, HEAD):  # each model's mean is merged, which is the mean of what is merged
        wanted = tensors[tensor][:count].double().mean(0)
        assert torch.allclose(tensors[tensor][count:].double(), wanted.expand(rows - count, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["AB", "BA"])
@pytest.mark.parametrize("source", [None, "base", "union"])
def test_rows_of_padding_need_no_choice(own: Path, tmp_path: Path, order: str, source: str | None) -> None:
    """Equal tokenizers: the output has the base's number of rows, and those of tokens are averaged."""
    save_llama(own / "B", 9, padding=60)
    recipe = recipe_of(own, *order) | ({} if source is None else {"tokenizer_source": source})
    (notice,) = plan_of(recipe).notices
    assert "all models have the same tokens" in notice
    out = merged(recipe, tmp_path / "out")
    rows = len(load_all(own / order[0])[EMBEDDING])
    assert len(load_all(out)[EMBEDDING]) == read_config(out)["vocab_size"] == rows
    check_rows(out, own, order, base_or_mean(order[0]), TEXTS[:4])
    assert torch.equal(load_all(out)[HEAD][SIZE:], load_all(own / order[0])[HEAD][SIZE:])


def test_a_padded_base_with_a_union(own: Path, tmp_path: Path) -> None:
    """New tokens take the ids of rows of padding."""
    save_llama(own / "B", 9, padding=60)
    out = merged(recipe_of(own, "B", "E", tokenizer_source="union"), tmp_path / "out")
    assert read_tokens(out)["<y>"] == 261 and len(load_all(out)[EMBEDDING]) == 262
    check_rows(out, own, "BE", base_or_mean("B"), TEXTS)


def test_other_tokens_without_a_key_are_refused_with_both_sizes_and_the_ways_out(folder: Path) -> None:
    with pytest.raises(PlanError) as refusal:
        plan_of(recipe_of(folder, "A", "E"))
    text = str(refusal.value)
    assert "E has 262 tokens: " in text and "model.embed_tokens.weight [262, 16]" in text
    assert "A has 260 tokens: " in text and "model.embed_tokens.weight [260, 16]" in text
    for cure in ("`tokenizer_source: union`", "`tokenizer_source: base`", "`rows: crop`", "`rows: keep`", "`allow: ["):
        assert cure in text
    assert plan_of(recipe_of(folder, "A", "E", rows="crop")).tensors


def test_one_id_for_two_tokens(own: Path, tmp_path: Path) -> None:
    """Equal sizes, other tokens: refused with the way out, and merged by the tokens."""
    save_llama(own / "H", 11, ("<y>", "<x>"))
    with pytest.raises(PlanError, match=r"`tokenizer_source: union`, or `base`.*`allow: \[tokens\]`"):
        plan_of(recipe_of(own, "E", "H"))
    out = merged(recipe_of(own, "E", "H", tokenizer_source="base"), tmp_path / "out")
    check_rows(out, own, "EH", base_or_mean("E"), TEXTS)
    assert read_tokens(out) == read_tokens(own / "E")


def test_tokens_beyond_the_rows_are_none(own: Path, tmp_path: Path) -> None:
    """A tokenizer with a token more than its model, as an added <pad> without a resized embedding."""
    shutil.copytree(own / "F", own / "P")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(own / "A" / name, own / "P" / name)
    config = read_config(own / "P", "tokenizer_config.json")
    (own / "P" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<y>"}))
    out = merged(recipe_of(own, "P", "G", tokenizer_source="base"), tmp_path / "out")
    assert read_tokens(out) == read_tokens(own / "A") and len(load_all(out)[EMBEDDING]) == SIZE
    assert "pad_token" not in read_config(out, "tokenizer_config.json")
    out = merged(recipe_of(own, "P", "G", tokenizer_source="union"), tmp_path / "out2")
    assert [read_tokens(out)[text] for text in ("<y>", "<z>", "<x>")] == [260, 261, 262]
    assert read_config(out, "tokenizer_config.json")["pad_token"] == "<y>"
    check_rows(out, own, "PG", base_or_mean("P"), [*TEXTS, "<z>"])


def test_pieces_beyond_the_rows_are_taken_out_of_the_tokenizer(own: Path, tmp_path: Path) -> None:
    """With the merges that make them, so that the library reads it."""
    from tokenizers import Tokenizer

    tokenizer = read_config(own / "A", "tokenizer.json")
    tokenizer["model"] |= {"vocab": {**tokenizer["model"]["vocab"], "ab": SIZE, "abc": SIZE + 1}}
    tokenizer["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    (own / "A" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Tokenizer.from_file(str(own / "A" / "tokenizer.json")).encode("abc").ids == [SIZE + 1]
    out = merged(recipe_of(own, "A", "E", tokenizer_source="base"), tmp_path / "out")
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("abc").ids == [64, 65, 66]


def test_parts_of_a_config_follow(own: Path, tmp_path: Path) -> None:
    """The size of the text's vocabulary does, that of another part does not."""
    text = {"vocab_size": SIZE, "tie_word_embeddings": False}
    (own / "A" / "config.json").write_text(json.dumps({"text_config": text, "audio_config": {"vocab_size": 5}}))
    config = read_config(merged(recipe_of(own, "A", "E", tokenizer_source="union"), tmp_path / "out"))
    assert (config["text_config"]["vocab_size"], config["audio_config"]["vocab_size"]) == (SIZE + 2, 5)


def test_the_plan_has_a_line_about_the_tokens(folder: Path, tmp_path: Path) -> None:
    from helpers_commands import answer, run

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(folder, "A", "E", tokenizer_source="union")))
    sentence = f"260 tokens of {folder / 'A'}, and 2 more: 262 rows"
    assert f"note         {sentence}" in run("plan", str(recipe)).stdout
    assert answer(run("plan", str(recipe), "--json"))["notices"] == [sentence]


def test_the_files_that_list_added_tokens_are_kept_in_step(own: Path, tmp_path: Path) -> None:
    """And a new token has the settings of the first model that has it; others are named."""
    decoder = {"259": {"content": "<pad>", "special": True}}
    config = read_config(own / "A", "tokenizer_config.json") | {"added_tokens_decoder": decoder}
    (own / "A" / "tokenizer_config.json").write_text(json.dumps(config))
    (own / "A" / "added_tokens.json").write_text(json.dumps({"<pad>": 259}))
    (own / "A" / "special_tokens_map.json").write_text('{"pad_token":   "<pad>"}')
    tokenizer = read_config(own / "E", "tokenizer.json")
    next(entry for entry in tokenizer["added_tokens"] if entry["content"] == "<y>")["special"] = True
    (own / "E" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(Finding, match=r"token '<y>' has other settings in .*F: those of .*E are taken"):
        out = merged(recipe_of(own, "A", "E", "F", tokenizer_source="union"), tmp_path / "out")
    made = read_config(out, "tokenizer_config.json")["added_tokens_decoder"]
    assert {n: (entry["content"], entry["special"]) for n, entry in made.items()} == {
        "259": ("<pad>", True),
        "260": ("<x>", False),
        "261": ("<y>", True),
    }
    assert read_config(out, "added_tokens.json") == {"<pad>": 259, "<x>": 260, "<y>": 261}
    assert (out / "special_tokens_map.json").read_text() == '{"pad_token":   "<pad>"}'


def test_a_tokenizer_in_other_files_is_refused_with_the_way_out(own: Path) -> None:
    tokenizer = read_config(own / "E", "tokenizer.json")
    (own / "E" / "tokenizer.json").unlink()
    (own / "E" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (own / "E" / "added_tokens.json").write_text(json.dumps({"<x>": 260, "<y>": 261}))
    with pytest.raises(PlanError, match=r"found no tokenizer\.json in .*E, expected one in every model"):
        plan_of(recipe_of(own, "A", "E", tokenizer_source="union"))
    with pytest.raises(PlanError, match="E has 258 tokens"):
        plan_of(recipe_of(own, "A", "E"))


def test_models_on_the_hub(hub: HubServer, own: Path, tmp_path: Path) -> None:
    """Tokens and templates are read there, and the files that rows come from are downloaded."""
    (own / "E" / "chat_template.jinja").write_text("{{ 1 }}")
    keys: dict[str, Any] = {"tokenizer_source": "union", "chat_template": "auto"}
    for name in ("A", "E"):
        hub.create(f"org/{name}", files_of(own / name))
    lines = [{"model": f"org/{name}", "parameters": {"weight": i + 1.0}} for i, name in enumerate(("A", "E"))]
    there = merged({"merge_method": "linear", "models": lines, **keys}, tmp_path / "there")
    here = merged(recipe_of(own, "A", "E", **keys), tmp_path / "here")
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert (there / name).read_bytes() == (here / name).read_bytes()


def test_the_output_depends_on_neither_threads_nor_memory(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, "A", "F", "G", tokenizer={"source": "union", "pad_to_multiple_of": 64})
    ways: Sequence[dict[str, Any]] = ({"threads": 1}, {"threads": 3}, {"memory": 200_000_000, "threads": 2})
    outputs = [output_of(Path(merge(recipe, tmp_path / str(i), **way))) for i, way in enumerate(ways)]
    assert outputs[0] == outputs[1] == outputs[2]


def test_models_of_other_dtypes(own: Path, tmp_path: Path) -> None:
    save_llama(own / "B", 9, dtype=torch.bfloat16)
    out = merged(recipe_of(own, "B", "E", tokenizer_source="union"), tmp_path / "out")
    check_rows(out, own, "BE", base_or_mean("B"), TEXTS)  # no row of E is rounded to bfloat16


def test_keys_that_exclude_each_other_are_refused(own: Path) -> None:
    with pytest.raises(PlanError, match="`rows` merges rows by their ids, `tokenizer` by their tokens"):
        plan_of(recipe_of(own, "A", "E", rows="crop", tokenizer_source="union"))
    save_llama(own / "H", 11, ("<y>", "<x>"))
    aligned = recipe_of(own, "E", "H", tokenizer_source="base")
    aligned["models"][1]["align"] = {"to": str(own / "E"), "method": "weight_matching"}
    with pytest.raises(PlanError, match="H is still to be changed by its `align`"):
        plan_of(aligned)


def test_a_plan_made_again_on_its_own_models_is_the_same(own: Path) -> None:
    """As after edits of the result were made: the vocabulary is fitted once."""
    save_llama(own / "B", 9, padding=60)
    for recipe in (recipe_of(own, "A", "E", tokenizer_source="union"), recipe_of(own, "A", "B")):
        plan = plan_of(recipe)
        again = make_plan(plan.recipe, views=plan.models)
        assert again.digest == plan.digest and again.vocabulary == plan.vocabulary


def test_inputs_are_never_written_to(folder: Path, tmp_path: Path) -> None:
    before = files_of(folder)
    merged(recipe_of(folder, "A", "E", tokenizer_source="union", chat_template="chatml"), tmp_path / "out")
    assert files_of(folder) == before


def chats(own: Path, templates: Mapping[str, str | None], *, inside: bool) -> None:
    """Give models chat templates: a file, or an entry of the config."""
    for name, text in templates.items():
        config = read_config(own / name, "tokenizer_config.json")
        if text is not None and inside:
            (own / name / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": text}))
        elif text is not None:
            (own / name / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("templates", "choice", "expected", "notice"),
    [
        ({"A": "{{ 1 }}", "E": "{{ 2 }}", "F": " {{ 2 }}\n"}, "auto", "{{ 2 }}", "E, in 2 of 3 models"),
        ({"A": None, "E": "{{ 3 }}", "F": "{{ 2 }}"}, "auto", "{{ 3 }}", "E, in 1 of 3 models; 1 more as often"),
        ({"A": "{{ 1 }}"}, "{% if x %}{{ x }}{% endif %}", "{% if x %}{{ x }}{% endif %}", None),
    ],
)
def test_chat_templates(
    own: Path,
    tmp_path: Path,
    templates: dict[str, str | None],
    choice: str,
    expected: str,
    notice: str | None,
    inside: bool,
) -> None:
    chats(own, templates, inside=inside)
    recipe = recipe_of(own, "A", "E", "F", tokenizer_source="union", chat_template=choice)
    assert notice is None or any(notice in text for text in plan_of(recipe).notices)
    out = merged(recipe, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == expected
    assert "chat_template" not in read_config(out, "tokenizer_config.json")
    assert verify(out) == []


def test_a_built_in_chat_template_without_other_changes(own: Path, tmp_path: Path) -> None:
    """Other named templates stay, in files of their own, and a processor's is left behind by name."""
    from transformers import AutoTokenizer

    named = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    config = read_config(own / "A", "tokenizer_config.json") | {"chat_template": named}
    (own / "A" / "tokenizer_config.json").write_text(json.dumps(config))
    (own / "A" / "chat_template.json").write_text('{"chat_template": "{{ 4 }}"}')
    recipe = recipe_of(own, "A", chat_template="chatml")
    with pytest.warns(Finding, match="chat_template.json was left behind: the recipe's chat_template takes its place"):
        out = merged(recipe, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (own / "A" / "tokenizer.json").read_bytes()
    chat: Any = AutoTokenizer.from_pretrained(out)
    assert chat.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<|im_start|>user")
    assert chat.chat_template["tool_use"] == "{{ 2 }}"
    assert not (out / "chat_template.json").exists()


def test_without_any_template_auto_says_so(folder: Path) -> None:
    plan = plan_of(recipe_of(folder, "A", chat_template="auto"))
    assert plan.notices == ("chat_template auto: no model has one",) and not plan.made


def test_the_recipe_in_the_output_has_no_paths(folder: Path, tmp_path: Path) -> None:
    keys = tokens(x={"source": str(folder / "E"), "force": True}, y={"source": {"kind": "zero"}})
    keys["tokenizer"] |= {"source": str(folder / "E"), "tokens": {**keys["tokenizer"]["tokens"], "a": {}}}
    out = merged(recipe_of(folder, "A", "E", **keys), tmp_path / "out")
    recipe = read_config(out, "merge.lock.json")["recipe"]["tokenizer"]
    row = {"kind": "model_token", "model": "E", "token": "<x>"}
    assert recipe == {
        "source": "E",
        "tokens": {"<x>": {"source": row, "force": True}, "<y>": {"source": {"kind": "zero"}}, "a": {}},
    }
    assert str(folder) not in (out / "merge.lock.json").read_text()

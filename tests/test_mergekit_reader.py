"""mergekit's files read strictly: every unknown, misplaced or unsupported thing is one line with the file's line, exit 2."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, assert_one_error

from paft.catalog import kind_of
from paft.cli import invoke
from paft.errors import UsageError
from paft.merge.mergekit.contracts import CONTRACTS, REQUIRED, ours, theirs
from paft.merge.mergekit.reader import read
from paft.merge.methods import names
from paft.merge.settings import Settings, native
from paft.recipe import MergeRecipe, validate
from paft.yamlfile import Document, read_yaml

TIES = """
    merge_method: ties
    base_model: org/base
    models:
      - model: org/base+org/a
        parameters: {weight: 0.5}
      - model: org/base+org/b
        parameters: {weight: 0.5, density: [0.2, 0.4]}
    parameters:
      normalize: true
"""
LINEAR = """
    merge_method: linear
    models:
      - model: org/base+org/a
        parameters: {weight: 0.5}
      - model: org/base+org/b
        parameters: {weight: [0.5, 0.4]}
    parameters:
      normalize: true
"""
SLERP = """
    slices:
      - sources:
          - model: @base
            layer_range: [0, 2]
          - model: @base/
            layer_range: [0, 2]
    merge_method: slerp
    base_model: @base
    parameters:
      t: [0, 1]
"""


def document(text: str, tmp_path: Path, base: Path) -> Document:
    file = tmp_path / "merge.yml"
    file.write_text(textwrap.dedent(text).strip("\n").replace("@base", str(base)) + "\n", encoding="utf-8")
    return read_yaml(file)


def recipe_of(text: str, tmp_path: Path, base: Path, engine: str = "paft") -> MergeRecipe:
    found, _ = read(document(text, tmp_path, base), engine=engine)
    return validate(MergeRecipe, found.data, found)


def put(line: str, text: str = TIES) -> tuple[str, str, str]:
    """A change to a file: one more line, the eighth."""
    return text, "    parameters:\n", f"    {line}\n    parameters:\n"


# (file, old, new, line, what is said, hint)
BAD: dict[str, tuple[str, str, str, int, str, str]] = {
    "key": (TIES, "base_model:", "base_modle:", 2, "unknown key 'base_modle'", "'base_model'"),
    "key of a model": (TIES, "parameters: {weight: 0.5}", "paramters: {weight: 0.5}", 5, "'paramters'", "'parameters'"),
    "parameter": (TIES, "normalize:", "normalise:", 9, "ties has no parameter 'normalise'", "'normalize'"),
    "parameter of a model": (TIES, "density:", "densty:", 7, "ties has no parameter 'densty'", "'density'"),
    "parameter of another method": (TIES, "normalize: true", "t: 0.5", 9, "ties has no parameter 't'", "known"),
    "shared parameter of a model": (TIES, "density:", "lambda:", 7, "lambda is one for the whole merge", "ignores it"),
    "key of a condition": (TIES, "[0.2, 0.4]", "{filtr: mlp, value: 1}", 7, "unknown key 'filtr'", "'filter'"),
    "condition without value": (TIES, "[0.2, 0.4]", "{filter: mlp}", 7, "a condition has one value", "value"),
    "mixed list": (TIES, "[0.2, 0.4]", "[0.2, {value: 1}]", 7, "density should be a value, a gradient", ""),
    "empty gradient": (TIES, "[0.2, 0.4]", "[]", 7, "density should be a value, a gradient", ""),
    "no value": (TIES, "normalize: true", "normalize:", 9, "normalize has no value", ""),
    "key of the method": (TIES, "merge_method:", "merge_metod:", 1, "unknown key 'merge_metod'", "'merge_method'"),
    "no method": (TIES, "merge_method: ties", "merge_method:", 1, "names no merge_method", "merge_method: ties"),
    "method": (TIES, "merge_method: ties", "merge_method: tise", 1, "no merge method 'tise'", "'ties'"),
    "method that paft lacks": (TIES, "merge_method: ties", "merge_method: arcee_fusion", 1, "not one of paft's", "--engine"),
    "modules": (*put("modules: {}"), 8, "modules is not supported: paft merges", "itself"),
    "chat template": (*put("chat_template: auto"), 8, "chat_template is not", "itself"),
    "tokenizer": (*put("tokenizer: {source: union}"), 8, "tokenizer is not", "itself"),
    "union": (*put("tokenizer_source: union"), 8, "tokenizer_source 'union'", "itself"),
    "re-ordered rows": (*put("tokenizer_source: base", TIES.replace("base+org/a", "m")), 8, "tokenizer_source 'base'", "itself"),
    "dtype": (*put("dtype: bfloat"), 8, "dtype 'bfloat'", "'bfloat16'"),
    "out_dtype": (*put("out_dtype: int8"), 8, "out_dtype 'int8'", "known"),
    "no base": (TIES.replace("org/base+", ""), "    base_model: org/base\n", "", 1, "ties needs base_model", "tuned from"),
    "a base that is an adapter": (TIES, "base_model: org/base", "base_model: org/base+org/c", 2, "cannot be an adapter", "name"),
    "another base": (TIES, "base_model: org/base", "base_model: org/other", 2, "the adapters are on org/base", ""),
    "two bases": (TIES, "org/base+org/b", "org/other+org/b", 6, "different bases: org/base, org/other", "itself"),
    "a model twice": (TIES, "org/base+org/b", "org/base+org/a", 6, "org/base+org/a is listed twice", "weight"),
    "no model": (TIES, "- model: org/base+org/b\n        parameters", "- parameters", 6, "names no model", "model:"),
    "a name": (TIES, "org/base+org/b", "org/base+org/b+org/c", 6, "is not MODEL+ADAPTER", ""),
    "no weight": (TIES, "{weight: 0.5, density", "{density", 6, "ties needs weight for org/base+org/b", "weight"),
    "no models": (TIES, "models:", "slices:", 3, "slices", ""),
    "sum of models": (LINEAR, "normalize: true", "normalize: false", 8, "the base is scaled", "task_arithmetic"),
    "the base as a member": (LINEAR, "parameters:\n      norm", "base_model: org/base\n    parameters:\n      norm", 7,
                             "linear needs weight for org/base", "weight"),
    "part of the layers": (SLERP, "base/\n            layer_range: [0, 2]", "base/\n            layer_range: [0, 1]", 6,
                           "slices that cut or stack", "models instead"),
    "several slices": (SLERP, "    merge_method", "      - sources: []\n    merge_method", 1, "slices that cut", "itself"),
    "residual weight": (SLERP, "      - sources:", "      - residual_weight: 0.1\n        sources:", 2, "residual", "itself"),
    "no t": (SLERP, "t: [0, 1]", "{}", 7, "slerp needs t", "t: 0.5"),
    "slerp of three": (SLERP, "base_model: @base", "base_model: org/third", 5, "between base_model and one other", ""),
    "slerp without base": (SLERP, "    base_model: @base\n", "", 7, "slerp needs base_model", "one of the two"),
    "nuslerp on weights": (LINEAR.replace("linear", "nuslerp"), "normalize: true", "nuslerp_flatten: true", 1,
                           "works on whole weights", "base_model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_with_its_line(case: str, tmp_path: Path, tiny_base: Path) -> None:
    text, old, new, line, said, hint = BAD[case]
    assert old in text
    with pytest.raises(UsageError) as caught:
        read(document(text.replace(old, new), tmp_path, tiny_base))
    assert f"merge.yml:{line}: " in caught.value.message and said in caught.value.message, caught.value
    assert hint in (caught.value.hint or "") and "\n" not in caught.value.message


@pytest.mark.parametrize(("key", "said"), [("merge_method", "merge.yml:2: models"), ("merge_metod", "merge.yml:1: unknown key")])
def test_a_refusal_exits_with_2_and_writes_nothing(key: str, said: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "merge.yml").write_text(f"{key}: ties\nmodels: []\n")
    assert_one_error(capsys, invoke(["merge", "-c", str(tmp_path / "merge.yml"), "-o", str(tmp_path / "out")]), 2, said)
    assert [file.name for file in tmp_path.iterdir()] == ["merge.yml"]


def test_what_has_no_effect_is_noted_and_not_handed_on(tmp_path: Path, tiny_base: Path) -> None:
    text = TIES.replace("ties", "task_arithmetic").replace("normalize: true", "int8_mask: true\n      rescale: true")
    found, notes = read(document(text, tmp_path, tiny_base))
    assert [note.partition("merge.yml:")[2] for note in notes] == [
        "7: density has no effect on task_arithmetic", "10: rescale has no effect on task_arithmetic",
    ]
    recipe = validate(MergeRecipe, found.data, found)
    assert recipe.parameters == {} and recipe.adapters[1] == {"adapter": "org/b", "weight": 0.5}
    listed = TIES.replace("models:", "models:\n      - model: org/base\n        parameters: {weight: 1}")
    assert "4: weight has no effect on base_model" in read(document(listed, tmp_path, tiny_base))[1][0].replace(":5:", ":4:")


def test_defaults_that_are_written_out_change_nothing(tmp_path: Path, tiny_base: Path) -> None:
    text = TIES.replace("normalize: true", "normalize: true\n      rescale: false\n      int8_mask: false")
    found, notes = read(document(text, tmp_path, tiny_base))
    plain = read(document(TIES, tmp_path, tiny_base))[0].data
    assert notes == [] and found.data == plain | {"parameters": plain["parameters"] | {"rescale": False}}


@pytest.mark.parametrize(
    ("text", "method", "base", "inputs", "parameters"),
    [
        (TIES, "ties", "org/base", ["org/a", "org/b"], {"normalize": True}),
        (LINEAR, "linear", "org/base", ["org/a", "org/b"], {"normalize": True}),
        (LINEAR.replace("+org/", "/"), "linear", "org/base/a", ["org/base/a", "org/base/b"], {"normalize": True}),
        (SLERP, "slerp", "@base", ["@base", "@base/"], {"t": {"gradient": [0, 1]}, "space": "weight"}),
        (SLERP.replace("base_model: @base", "base_model: @base/"), "slerp", "@base/", ["@base/", "@base"],
         {"t": {"gradient": [0, 1]}, "space": "weight"}),
    ],
)
def test_what_a_file_means(text: str, method: str, base: str, inputs: list[str], parameters: dict[str, Any], tmp_path: Path,
                           tiny_base: Path) -> None:
    recipe = recipe_of(text, tmp_path, tiny_base)
    here = str(tiny_base)
    assert (recipe.method, recipe.base, recipe.parameters) == (method, base.replace("@base", here), parameters)
    found = [one if isinstance(one, str) else one["adapter"] for one in recipe.adapters]
    assert found == [one.replace("@base", here) for one in inputs]
    assert recipe.dialect == "mergekit" and recipe.dtype is None


def test_the_type_of_the_result(tmp_path: Path, tiny_base: Path) -> None:
    for lines, dtype in (("dtype: bfloat16", "bfloat16"), ("dtype: float32\n    out_dtype: float16", "float16")):
        assert recipe_of(TIES.replace("    parameters:\n", f"    {lines}\n    parameters:\n"), tmp_path, tiny_base).dtype == dtype


def test_a_mergekit_file_is_known_by_its_content(tmp_path: Path, tiny_base: Path) -> None:
    document(TIES, tmp_path, tiny_base)
    assert kind_of(tmp_path / "merge.yml") == "merge"


def test_the_examples_in_merges_readme(tmp_path: Path, tiny_base: Path) -> None:
    text = (Path(__file__).parents[1] / "merges" / "README.md").read_text(encoding="utf-8")
    own, mergekits = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipe = recipe_of(mergekits, tmp_path, tiny_base)
    for found in (recipe, validate(MergeRecipe, document(own, tmp_path, tiny_base).data)):
        told = Settings.read(native(found.method), found.adapters, found.parameters, found.weights)
        layers = [f"model.layers.{i}.{kind}.weight" for i in range(12) for kind in ("mlp.up_proj", "self_attn.q_proj")]
        assert len(list(told.over(layers).distinct(layers))) > 2


# The table of contracts


def test_the_contracts_are_those_of_mergekit_s_registry() -> None:
    from mergekit.merge_methods import ParameterScope, registered_methods

    found = {method.spec.name: method.spec for method in registered_methods()}
    assert CONTRACTS.keys() == found.keys()
    for name, spec in found.items():
        here, shared = CONTRACTS[name], ParameterScope.SHARED
        defaults = {one.name: REQUIRED if one.required else one.default for one in spec.parameters}
        assert here.known == defaults, name
        assert set(here.shared) == {one.name for one in spec.parameters if one.scope == shared}, name
        two = (spec.contract.min_inputs, spec.contract.max_inputs) == (2, 2)
        roles = {"ignored": "member", "optional": "optional", "required": "end" if two else "subtracted"}
        assert here.base == roles[spec.contract.base.value], name


def test_our_methods_that_mergekit_has_are_found_by_its_names_and_back() -> None:
    assert theirs("slerp", "delta") == "nuslerp" and ours("nuslerp") == ("nuslerp", {})
    assert ours("slerp") == ("slerp", {"space": "weight"})
    assert {"linear", "ties", "task_arithmetic", "dare_ties", "dare_linear"} <= {name for name in CONTRACTS if ours(name)}
    for name in CONTRACTS:
        found = ours(name)
        if found:
            assert theirs(found[0], found[1].get("space")) == name and found[0] in names()
    assert theirs("magnitude_prune", None) is None

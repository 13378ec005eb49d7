"""Settings per adapter, layer, module kind and depth: mergekit's rules, checked up front, a function of the name alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import AdapterFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from paft.errors import UsageError
from paft.merge.depth import Depth
from paft.merge.engine import merge
from paft.merge.profile import profile
from paft.merge.rules import SettingError
from paft.merge.settings import Settings, native

KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
         *(f"model.layers.{layer}.{kind}.weight" for layer in range(12) for kind in KINDS)]


def told(parameters: dict[str, Any], entries: Any = ("a", "b"), weights: Any = None) -> Settings:
    return Settings.read(native("ties"), entries, parameters, weights).over(NAMES)


def at(layer: int, kind: str = "mlp.up_proj") -> str:
    return f"model.layers.{layer}.{kind}.weight"


# Depth


def test_depth_runs_from_the_first_layer_to_the_last_and_is_zero_outside() -> None:
    depth = Depth.of(NAMES)
    assert depth.layers == 12
    assert [depth.place(at(layer)) for layer in (0, 11)] == [(0, 0.0), (11, 1.0)]
    assert {depth.place(name) for name in NAMES[:3]} == {(None, 0.0)}
    assert Depth.of(["h.0.attn.weight", "h.1.attn.weight", "wte.weight"]).place("h.1.attn.weight") == (1, 1.0)
    assert Depth.of(["model.layers.0.a.weight"]).place("model.layers.0.a.weight") == (0, 1.0)  # as mergekit


def test_the_layer_is_the_first_number_and_stacks_are_counted_apart() -> None:
    names = [f"encoder.block.{i}.layer.0.x" for i in range(3)] + [f"decoder.block.{i}.layer.2.x" for i in range(5)]
    depth = Depth.of([*names, "model.layers.1.experts.7.w1.weight", "model.layers.0.experts.7.w1.weight"])
    assert depth.place("encoder.block.1.layer.0.x") == (1, 0.5)
    assert depth.place("decoder.block.1.layer.2.x") == (1, 0.25)
    assert depth.place("model.layers.1.experts.7.w1.weight") == (1, 1.0)


# Against mergekit

NUMBERS = st.floats(0, 1, allow_nan=False)
VALUES = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=5)
FILTERS = st.sampled_from(["mlp", "self_attn", "layers.1", "embed", "*", ".7.", "proj.weight"])
CONDITIONS = st.lists(st.fixed_dictionaries({"value": VALUES}, optional={"filter": FILTERS}), min_size=1, max_size=4)


@settings(deadline=None)  # mergekit takes two seconds to import
@given(VALUES | CONDITIONS, VALUES | CONDITIONS | st.none())
def test_a_value_is_mergekit_s_at_every_tensor(own: Any, shared: Any) -> None:
    """Gradients, filters and the fall from an entry to the whole merge to the default, bit for bit."""
    from mergekit.config import ConditionalParameter, evaluate_setting

    plain = isinstance(shared, list) and not isinstance(shared[0], dict)
    given_shared = {} if shared is None else {"density": {"gradient": shared} if plain else shared}
    found = told(given_shared, [{"adapter": "a", "density": own}])
    for name in NAMES:
        t = 0.0 if ".layers." not in name else int(name.split(".")[2]) / 11
        theirs = None
        for scope in (own, shared):
            conditional = isinstance(scope, list) and isinstance(scope[0], dict)
            value = [ConditionalParameter(**one) for one in scope] if conditional else scope
            if theirs is None and value is not None:
                theirs = evaluate_setting(name, value, t, validate=float)
        assert found.at(name)[1]["density"] == (1.0 if theirs is None else theirs)


def test_words_and_booleans_step_as_in_mergekit() -> None:
    from mergekit.config import evaluate_setting

    found = told({"normalize": {"gradient": [True, False, True]}})
    for layer in range(12):
        theirs = evaluate_setting(at(layer), [True, False, True], layer / 11, validate=bool)
        assert found.at(at(layer))[1]["normalize"] is theirs


# Our own forms


def test_the_first_condition_that_applies_counts_and_layers_include_both_ends() -> None:
    found = told({"density": [{"filter": "mlp", "layers": "0-3", "value": 0.1}, {"layers": 7, "value": 0.2}, {"value": 0.9}]})
    want = {0: 0.1, 3: 0.1, 4: 0.9, 7: 0.2, 11: 0.9}
    assert {layer: found.at(at(layer))[1]["density"] for layer in want} == want
    assert found.at(at(2, "self_attn.q_proj"))[1]["density"] == 0.9
    assert found.at("lm_head.weight")[1]["density"] == 0.9  # no layer is among no layers


def test_an_entry_goes_before_the_list_and_the_list_before_the_default() -> None:
    own = {"adapter": "b", "density": {"filter": "mlp", "value": 0.1}, "weight": [0, 1]}
    found = told({"density": [0.4, 0.6]}, ["a", own])
    assert found.at(at(0))[1]["density"] == [0.4, 0.1]
    assert found.at(at(0, "self_attn.q_proj"))[1]["density"] == [0.4, 0.6]
    assert [found.at(at(layer))[0] for layer in (0, 11)] == [[1.0, 0.0], [1.0, 1.0]]
    assert told({}, ["a", own]).at(at(0))[1]["density"] == [1.0, 0.1]


def test_at_does_not_depend_on_the_order_of_names_or_calls() -> None:
    given_ = {"density": {"gradient": [0.1, 0.9]}, "lambda": [{"filter": "mlp", "value": [1, 2]}, {"value": 3}]}
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    one = Settings.read(native("ties"), ["a"], given_, None).over(shuffled)
    assert {name: one.at(name) for name in shuffled} == {name: told(given_, ["a"]).at(name) for name in NAMES}


def test_the_record_reads_back_to_the_same_settings() -> None:
    entries = ["a", {"adapter": "b", "weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 1}], "density": 0.3}]
    cases = [({"density": [0.5, 0.7]}, [2, 3], ["a", "b"]), ({"lambda": {"gradient": [1, 0]}}, None, entries),
             ({"weight": {"gradient": [0, 1]}}, None, ["a", "b"])]
    for parameters, weights, parts in cases:
        first = told(parameters, parts, weights)
        record = json.loads(json.dumps(first.record(["a", "b"])))
        again = told(record["parameters"], record["adapters"], record["weights"])
        assert [first.at(name) for name in NAMES] == [again.at(name) for name in NAMES]
    assert told({"weight": [2, 3]}).record(["x", "y"])["weights"] == [2.0, 3.0]
    assert told({}, entries).record(["x", "y"])["adapters"][1]["adapter"] == "y"


# Refusals

BAD: list[tuple[dict[str, Any], Any, str, str, tuple[Any, ...]]] = [
    ({"densty": 0.5}, "ab", "no parameter 'densty'", "'density'", ("parameters", "densty")),
    ({"densty": [0.5, 0.2]}, "ab", "no parameter 'densty'", "'density'", ("parameters", "densty")),
    ({"lambda": [1, 0.5]}, "ab", "lambda is one for the whole merge", "gradient", ("parameters", "lambda")),
    ({"density": [0.5]}, "ab", "density has 1 values for 2", "gradient", ("parameters", "density")),
    ({"density": {"gradint": [1, 0]}}, "ab", "no 'gradint'", "'gradient'", ("parameters", "density", "gradint")),
    ({"density": [{"filter": "mlp"}]}, "ab", "needs a value", "filter", ("parameters", "density", 0)),
    ({"density": [{"value": 1}, 0.5]}, "ab", "0.5 stands among conditions", "value", ("parameters", "density", 1)),
    ({"density": {"gradient": []}}, "ab", "a gradient is a list", "", ("parameters", "density")),
    ({"density": {"gradient": [[1], 2]}}, "ab", "a gradient is a list", "", ("parameters", "density")),
    ({"density": {"value": 0.5, "filter": 3}}, "ab", "filter 3", "", ("parameters", "density", "filter")),
    ({"density": {"value": 0.5, "layers": "5-2"}}, "ab", "layers '5-2'", "0-11", ("parameters", "density", "layers")),
    ({"density": {"value": 0.5, "layers": "10-12"}}, "ab", "layers 10-12", "", ("parameters", "density")),
    ({"density": {"value": 0.5, "filter": "self_atn"}}, "ab", "'self_atn'", "'self_attn'", ("parameters", "density")),
    ({"density": {"gradient": [0.5, "much"]}}, "ab", "density='much'", "", ("parameters", "density")),
    ({"lambda": float("nan")}, "ab", "lambda must be a finite number", "", ("parameters", "lambda")),
    ({"weight": {"gradient": [1, True]}}, "ab", "a weight must be a finite number", "", ("parameters", "weight")),
    ({}, ["a", {"adapter": "b", "lambda": 1}], "lambda is one for the whole", "parameters", ("adapters", 1, "lambda")),
    ({}, ["a", {"adapter": "b", "densty": 1}], "'densty'", "'density'", ("adapters", 1, "densty")),
    ({}, ["a", {"adapte": "b"}], "names no adapter", "adapter", ("adapters", 1)),
]


@pytest.mark.parametrize(("parameters", "entries", "said", "hint", "loc"), BAD)
def test_bad_settings_are_refused_with_their_place(parameters: Any, entries: Any, said: str, hint: str, loc: Any) -> None:
    with pytest.raises(SettingError) as caught:
        told(parameters, list(entries))
    assert said in caught.value.message and hint in (caught.value.hint or "") and caught.value.loc == loc


def test_weights_in_two_places_are_refused() -> None:
    entry = {"adapter": "b", "weight": 1}
    for parameters, entries in (({"weight": 1}, ["a", "b"]), ({}, ["a", entry])):
        with pytest.raises(SettingError, match="twice"):
            told(parameters, entries, [1.0, 1.0])
    assert told({"weight": 0.5}, ["a", entry]).at(at(0))[0] == [0.5, 1.0]  # the entry's own, and one for the rest


def test_where_no_condition_applies_a_weight_is_missing_but_a_density_has_its_default() -> None:
    with pytest.raises(SettingError, match=r"no weight applies to model\.embed_tokens\.weight") as caught:
        list(told({"weight": {"filter": "mlp", "value": 0.5}}).distinct(NAMES))
    assert caught.value.loc == ("parameters", "weight")
    assert told({"density": {"filter": "mlp", "value": 0.5}}).at("lm_head.weight")[1]["density"] == 1.0


def test_a_gradient_needs_layers() -> None:
    with pytest.raises(SettingError, match="no numbers"):
        Settings.read(native("ties"), ["a"], {"density": {"gradient": [0, 1]}}, None).over(["w.weight"])


def test_an_empty_range_at_one_depth_is_found_before_anything_is_read(
    tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    entry = {"adapter": str(make_adapter(tiny_base, 1)), "density": [0.5, 1.5]}
    with pytest.raises(UsageError, match=r"layers\.1\..*density must be in"):
        merge([entry], base=None, method="ties", parameters={}, weights=None, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# In a merge


def test_each_tensor_of_a_merge_has_its_own_values(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    """A merge with values by layer is, tensor by tensor, one of the merges with the same value everywhere."""
    one, two = (str(make_adapter(tiny_base, seed)) for seed in (1, 2))

    def run(name: str, entries: list[Any], **parameters: Any) -> dict[str, Any]:
        merge(entries, base=None, method="ties", parameters=parameters, weights=None, out=tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    mixed = run("mixed", [one, {"adapter": two, "weight": [0.25, 2.0]}],
                density=[{"filter": "mlp", "value": 0.3}, {"layers": 0, "value": 0.6}, {"value": 1.0}])
    flat = {key: run(f"{key}", [one, {"adapter": two, "weight": key[0]}], density=key[1])
            for key in ((0.25, 0.3), (2.0, 0.3), (0.25, 0.6), (2.0, 1.0))}
    for name in (name for name in mixed if "proj" in name):
        first = ".layers.0." in name
        key = (0.25 if first else 2.0, 0.3 if "mlp" in name else 0.6 if first else 1.0)
        assert (mixed[name] == flat[key][name]).all(), name
    manifest = json.loads((tmp_path / "mixed" / "paft.json").read_text())["recipe"]
    assert manifest["adapters"][1]["weight"] == [0.25, 2.0] and manifest["weights"] is None


def test_a_lora_of_a_linear_merge_has_the_weights_of_each_layer(
    tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    from paft.adapter import read_adapter

    path = str(make_adapter(tiny_base, 1))
    for kind in ("lora", "full"):
        merge([{"adapter": path, "weight": [1.0, -0.5]}], base=None, method="task_arithmetic", parameters={}, weights=None,
              out=tmp_path / kind, output_kind=kind)
    before, after = read_adapter(path).factors, read_adapter(tmp_path / "lora").factors
    for module, factors in after.items():
        share = 1.0 if ".0." in module else -0.5
        assert ((factors.B @ factors.A) - share * before[module].scale * (before[module].B @ before[module].A)).abs().max() < 1e-6


# The table


def test_the_profile_names_runs_of_layers_and_kinds() -> None:
    found = told({"density": [{"filter": "mlp", "layers": "0-3", "value": 0.1}, {"value": 0.9}]}, ["a"])
    table = profile(found, NAMES, ["sft"])
    assert table["columns"] == ["0-3", "4-11", "outside"]
    assert [(row["what"], row["where"], row["values"]) for row in table["rows"]] == [
        ("density", "self_attn", [0.9, 0.9, 0.9]), ("density", "mlp", [0.1, 0.9, 0.9]),
    ]
    assert profile(told({"density": 0.5}), NAMES, ["a", "b"])["rows"] == []
    uneven = profile(told({"density": 0.5}, [{"adapter": "a", "weight": [0, 1]}, "b"]), [at(0), at(11)], ["sft", "sft"])
    assert uneven == {"columns": ["0", "11"], "rows": [{"what": "weight of sft #1", "where": "", "values": [0.0, 1.0]}]}
    gradient = profile(told({"lambda": {"gradient": [0, 1]}}), NAMES[3:], ["a", "b"])
    assert gradient["columns"] == ["0", "2", "4", "7", "9", "11"] and len(gradient["rows"]) == 1

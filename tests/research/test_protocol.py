"""What a sweep is asked for: by options, or in a protocol file."""

import json

import pytest
from conftest import local_experiment

from ctxkv_lib.errors import UserError
from ctxkv_lib.research.protocol import asked_for, grid, grid_points, points_around, read_protocol
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.configure import configure


def points_of(tmp_path, **values):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"variants": {"plain": {}}, **values}))
    return grid_points(read_protocol(path))


def test_options_make_every_combination_small_counts_and_first_seeds_first():
    options = {
        "preset": "offline",
        "recipe": ["exact", "published"],
        "samples": [50, 10, 50],
        "seeds": [7, 3, 7],
        "grid": ["phase2.weight_decay=0.01, 0.3"],
    }
    points = grid_points(asked_for(None, options, {"phase2.patience": "2"}))
    assert [point.config.data.samples for point in points] == [10] * 8 + [50] * 8
    assert [point.config.runtime.seed for point in points[:8]] == [7] * 4 + [3] * 4
    assert [str(point) for point in points[:2]] == [
        "exact, weight_decay 0.01, 10 samples, seed 7",
        "exact, weight_decay 0.3, 10 samples, seed 7",
    ]
    assert {point.config.phase2.weight_decay for point in points} == {0.01, 0.3}
    assert {point.config.phase2.patience for point in points} == {2}
    assert {point.config.recipe for point in points} == {"exact", "published"}


def test_a_protocol_names_variants_with_settings_of_their_own(tmp_path):
    variants = {
        "plain": {},
        "decay": {"settings": {"phase2.weight_decay": 0.3}},
        "large": {"recipe": "published", "samples": [50], "seeds": [1, 2]},
    }
    shared = {"preset": "offline", "samples": [10], "settings": {"phase2.patience": 1}}
    points = points_of(tmp_path, **shared, variants=variants)
    assert [(p.variant, p.config.recipe, p.config.data.samples, p.config.runtime.seed) for p in points] == [
        ("plain", "exact", 10, 42),
        ("decay", "exact", 10, 42),
        ("large", "published", 50, 1),
        ("large", "published", 50, 2),
    ]
    assert points[1].config.phase2.weight_decay == 0.3
    assert {point.config.phase2.patience for point in points} == {1}
    (alone,) = points_of(tmp_path, settings={"data.samples": 3, "runtime.seed": 2})
    assert str(alone) == "plain, 3 samples, seed 2"


def test_variants_of_a_file_share_its_sizes_and_have_their_recipes_own_data(tmp_path):
    """A wider window alone would ask for a longer validation text."""
    own = {"data.path": local_experiment(tmp_path)["data.path"]}
    variants = {"narrow": {}, "wide": {"settings": {"model.interval": 40}}}
    narrow, wide = grid_points({"preset": "ci", "settings": own, "variants": variants})
    assert narrow.config.data == wide.config.data
    assert wide.config.model.interval == 40
    variants = {name: {"recipe": name} for name in ("exact", "tuned")}
    for point in grid_points({"preset": "offline", "settings": own, "variants": variants}):
        count = point.config.data.samples
        assert point.config.data == configure("offline", point.variant, count, own).data


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variants": {}}, "names no variants"),
        ({"variants": []}, r"has \[\] as variants; allowed: an object"),
        ({"seed": [1]}, "has 'seed'; allowed: preset, recipe, settings, samples, seeds, variants"),
        ({"seeds": 3}, "has 3 as seeds; allowed: a list of whole numbers"),
        ({"seeds": [True]}, "allowed: a list of whole numbers"),
        ({"samples": []}, "allowed: a list of whole numbers"),
        ({"preset": 1}, "has 1 as preset; allowed: a string"),
        ({"variants": {"a": {"setting": {}}}}, "variant 'a' has 'setting'; allowed: recipe, settings"),
        ({"variants": {"a": 3}}, "variant 'a' is no object"),
        ({"variants": {"a": {"settings": {"phase2.size": 3}}}}, "Variant 'a': setting is 'phase2.size'"),
        ({"variants": {"a": {"recipe": "soup"}}}, "Variant 'a': recipe is 'soup'; allowed"),
        ({"preset": "moon"}, "preset is 'moon'"),
        (
            {"variants": {"a": {}, "b": {"settings": {"data.test_samples": 3}}}},
            r"Variant 'b': data.test_samples is 3, and \d+ in 'a'; variants are compared on the same valid",
        ),
        ({"seeds": [1], "settings": {"runtime.seed": 2}}, "runtime.seed and seeds are both given"),
        (
            {"samples": [3], "variants": {"a": {"settings": {"data.samples": 4}}}},
            "data.samples and samples are",
        ),
    ],
)
def test_a_protocol_of_another_form_is_refused_in_a_sentence(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        points_of(tmp_path, **values)


def test_a_name_twice_and_what_is_no_json_are_refused_and_a_byte_order_mark_is_not(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('\ufeff{"variants": {"a": {}}}', encoding="utf-8")
    assert read_protocol(file) == {"variants": {"a": {}}}
    for end, said in (
        (', "a": {"recipe": "tuned"}}}', "has 'a' twice; rename or delete one"),
        (",}}", r"is not JSON \(.*line 1 column \d+.*\); a protocol is JSON"),
    ):
        file.write_text('{"variants": {"a": {}' + end)
        with pytest.raises(UserError, match=rf"^\S*mine\.json {said}"):
            read_protocol(file)


def test_a_variant_around_a_base_keeps_a_seed_of_its_own():
    base, variants = build_config("ci"), {"base": {}, "other": {"runtime.seed": 7}}
    assert [point.config.runtime.seed for point in points_around(base, variants)] == [42, 7]
    with pytest.raises(UserError, match=r"runtime\.seed and seeds are both given"):
        points_around(base, variants, [1, 2])


def test_settings_of_one_name_are_named_with_their_groups():
    axes = ["phase1.batch_size=2", "phase2.batch_size=3", "phase2.patience=4"]
    assert [*grid(None, axes)] == ["phase1.batch_size 2, phase2.batch_size 3, patience 4"]
    assert [*grid(["exact"], axes[2:]), *grid(["exact"], [])] == ["patience 4", "exact"]
    assert [*grid(None, ["block.parts=[[1, 2], 3], [4]"])] == ["parts [[1, 2], 3]", "parts [4]"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "phase2.patience"], "is no axis; write --grid group.field=value,value"),
        (["--grid", "phase2.patience=1,,2"], "is no axis"),
        (["--grid", "phase2.patience=1", "--grid", "phase2.patience=2"], "--grid has phase2.patience twice"),
        (["--samples", "3", "--grid", "data.samples=3,4"], "data.samples and samples are both given"),
        (["--protocol", "none.json"], "none.json is not a file"),
        (["--protocol", "none.json", "--seeds", "1"], "--seeds does not go with --protocol"),
        (["--protocol", "none.json", "--set", "a.b=1"], "--set does not go with --protocol"),
        (["--protocol", "none.json", "--data", "chats.jsonl"], "--data does not go with --protocol"),
        (["--protocol", "none.json", "--block", "a:B"], "--block does not go with --protocol"),
        (["--preset", "offline", "--samples", "999999"], "999999"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(
    printed_by, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert said in printed_by("sweep", *arguments, code=2)
    assert not (tmp_path / "runs").exists()

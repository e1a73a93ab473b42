"""Options: parsing, errors that list what is valid, the README's table. Under a second."""

import dataclasses

import pytest

from vllm_eagle3.config import Eagle3Options, GraftOptions, TreeOptions, options_table


def options(value: object) -> Eagle3Options:
    return Eagle3Options.from_additional_config({"eagle3": value, "someone_else": {"x": 1}})


def test_defaults() -> None:
    expected = Eagle3Options(aux_layers=None, tree=None, policy="auto", fused_kernels=True, int8_draft=True)
    assert Eagle3Options.from_additional_config(None) == expected
    assert Eagle3Options.from_additional_config({}) == expected
    assert Eagle3Options.from_additional_config({"other_plugin": 1}) == expected
    assert options({}) == options(None) == expected


def test_json_values() -> None:
    got = options({"aux_layers": [2, 15, 27], "tree": {"depth": 4}, "policy": "auto", "fused_kernels": False})
    assert got == Eagle3Options(
        (2, 15, 27), TreeOptions(depth=4, topk=10, nodes=60), True, "auto", "greedy", False
    )
    assert isinstance(got.aux_layers, tuple)
    assert options({"tree": {}}).tree == TreeOptions(6, 10, 60)


def test_grafts() -> None:
    assert options({}).grafts is None, "a chain has no branches"
    assert options({"tree": {}}).grafts == options({"tree": {}, "graft": {}}).grafts == GraftOptions(8, 2)
    assert options({"tree": {}, "graft": False}).grafts is None
    assert options({"tree": {}, "graft": {"length": 5}}).grafts == GraftOptions(5, 2)
    deepest = [
        options({"tree": {"depth": d}, "graft": g}).deepest for d, g in ((4, True), (9, True), (4, False))
    ]
    assert deepest == [8, 9, 4]


def test_options_are_hashable_and_frozen() -> None:
    got = options({"aux_layers": [2, 15, 27], "tree": {}})
    assert len({got, options({"aux_layers": [2, 15, 27], "tree": {}})}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.policy = "auto"  # type: ignore[misc]


@pytest.mark.parametrize(
    "limits", [{"depth": 1, "topk": 1, "nodes": 1}, {"depth": 16, "topk": 32, "nodes": 62}]
)
def test_tree_limits_are_valid(limits: dict[str, int]) -> None:
    assert dataclasses.asdict(options({"tree": limits}))["tree"] == limits


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (
            {"aux_layer": [1, 2, 3]},
            [
                "'eagle3.aux_layer'",
                "aux_layers, tree, graft, policy, draft_sampling, fused_kernels, int8_draft",
            ],
        ),
        ({"tree": {"depht": 4}}, ["'eagle3.tree.depht'", "depth, topk, nodes"]),
        ({"aux_layers": []}, ["'eagle3.aux_layers'", "strictly increasing", "()"]),
        ({"aux_layers": [1, 1, 2]}, ["'eagle3.aux_layers'", "(1, 1, 2)"]),
        ({"aux_layers": [-1, 1, 2]}, ["'eagle3.aux_layers'", "(-1, 1, 2)"]),
        ({"aux_layers": [0, True, 2]}, ["'eagle3.aux_layers'", "(0, True, 2)"]),
        ({"aux_layers": "2,3,4"}, ["'eagle3.aux_layers'", "'2,3,4'"]),
        ({"tree": 4}, ["'eagle3.tree'", "depth, topk, nodes", "found 4"]),
        ({"tree": {"depth": 0}}, ["'eagle3.tree.depth'", "1 to 16", "found 0"]),
        ({"tree": {"depth": 17}}, ["'eagle3.tree.depth'", "1 to 16", "found 17"]),
        ({"tree": {"topk": 33}}, ["'eagle3.tree.topk'", "1 to 32"]),
        ({"tree": {"nodes": 63}}, ["'eagle3.tree.nodes'", "1 to 62"]),
        ({"tree": {"nodes": 6.0}}, ["'eagle3.tree.nodes'", "found 6.0"]),
        ({"tree": {}, "graft": {"length": 33}}, ["'eagle3.graft.length'", "1 to 32", "found 33"]),
        ({"tree": {}, "graft": {"min": 3}}, ["'eagle3.graft.min'", "length, min_match"]),
        ({"tree": {}, "graft": "yes"}, ["'eagle3.graft'", "true, false or an object", "'yes'"]),
        ({"graft": {"length": 3}}, ["'eagle3.graft'", "the option 'tree' with it"]),
        ({"tree": {"nodes": True}}, ["'eagle3.tree.nodes'", "found True"]),
        ({"policy": "greedy"}, ["'eagle3.policy'", "'auto' or 'fixed'", "'greedy'"]),
        ({"draft_sampling": "random"}, ["'eagle3.draft_sampling'", "'auto' or 'greedy'", "'random'"]),
        ({"int8_draft": "no"}, ["'eagle3.int8_draft'", "true or false", "found 'no'"]),
        ({"fused_kernels": 1}, ["'eagle3.fused_kernels'", "true or false", "found 1"]),
        (
            [1],
            ["'eagle3'", "aux_layers, tree, graft, policy, draft_sampling, fused_kernels, int8_draft", "[1]"],
        ),
    ],
)
def test_bad_values_name_the_option(value: object, parts: list[str]) -> None:
    with pytest.raises(ValueError, match="additional_config") as error:
        options(value)
    for part in parts:
        assert part in str(error.value)


def test_table_has_a_row_per_field() -> None:
    rows = options_table().splitlines()
    names = [row.split("`")[1] for row in rows[2:]]
    expected = [field.name for field in dataclasses.fields(Eagle3Options)]
    for prefix, cls in (("tree.", TreeOptions), ("graft.", GraftOptions)):
        expected += [prefix + field.name for field in dataclasses.fields(cls)]
    assert names == expected
    assert any("| `tree.nodes` | int | `60` | 1 to 62 |" in row for row in rows)
    assert all(row.count("|") == 6 for row in rows)

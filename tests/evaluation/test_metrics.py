"""tau, n-alpha, times, identity and the rows of the JSON (below a second)."""

import pytest

from vllm_eagle3.evaluation.metrics import (
    TaskRun,
    count_chain,
    covered_seconds,
    repeated_4grams,
    result_rows,
)


def test_tau_and_n_alpha() -> None:
    accepted = [3, 0, 1, 3, 2]
    run = TaskRun("chain", "t")
    run.count(5, sum(accepted), count_chain(accepted, 3), 15)
    assert run.tau == pytest.approx(1 + 9 / 5)
    assert run.accepted_per_position == [4, 3, 2]
    assert run.n_alpha == pytest.approx([4 / 5, 3 / 4, 2 / 3])


def test_counts_add_up() -> None:
    run = TaskRun("chain", "t")
    run.count(2, 3, [2, 1], 4)
    run.count(1, 0, [0, 0], 2)
    assert (run.verifications, run.accepted, run.accepted_per_position) == (3, 3, [2, 1])
    assert (run.drafted, run.nodes) == (6, 2)


def test_without_speculation() -> None:
    run = TaskRun("none", "t", decode_tokens=30, decode_seconds=1.5)
    assert (run.tau, run.n_alpha, run.tokens_per_s) == (1.0, [], 20.0)


def test_nothing_accepted_ends_n_alpha() -> None:
    assert TaskRun("chain", "t", 4, 0, [0, 0, 0]).n_alpha == [0.0]


def test_covered_seconds() -> None:
    assert covered_seconds([(0, 2), (1, 3), (5, 6), (5.2, 5.4)]) == pytest.approx(4)
    assert covered_seconds([]) == 0


def test_repeated_4grams() -> None:
    assert repeated_4grams([[1, 2, 3, 4, 5]]) == 0
    assert repeated_4grams([[1, 1, 1, 1, 1, 1]]) == pytest.approx(2 / 3)
    assert repeated_4grams([[1, 2]]) == 0


def test_rows_compare_with_none() -> None:
    base = [
        TaskRun("none", "a", decode_tokens=100, decode_seconds=10, answers={"1": [[1, 2]], "2": [[3]]}),
        TaskRun("none", "b", decode_tokens=100, decode_seconds=5, answers={"3": [[4]]}),
    ]
    chain = [
        TaskRun("chain", "a", 10, 10, [6, 4], 100, 5, {"1": [[1, 2]], "2": [[9]]}),
        TaskRun("chain", "b", 10, 20, [10, 10], 100, 4, {"3": [[4]]}),
    ]
    rows = {(row["mode"], row["task"]): row for row in result_rows([*base, *chain], greedy=True)}
    a, b, mean = (rows["chain", task] for task in ("a", "b", "mean"))
    assert (a["identical"], a["exact_match"], a["speedup"]) == (False, 0.5, 2.0)
    assert (b["identical"], b["exact_match"], b["speedup"]) == (True, 1.0, 1.25)
    assert mean["tau"] == pytest.approx(2.5)
    assert mean["n_alpha"] == pytest.approx([0.8, (4 / 6 + 1) / 2])
    assert mean["speedup"] == pytest.approx(1.625)
    assert mean["identical"] is False and mean["exact_match"] == 0.75
    assert rows["none", "mean"]["speedup"] == 1.0 and rows["none", "mean"]["identical"] is True


def test_a_graft_has_its_mode_without_beside_it() -> None:
    modes = {"reference-tree": 10, "reference-tree+graft": 20}
    runs = [TaskRun(mode, task, 10, n) for mode, n in modes.items() for task in ("a", "b")]
    rows = {(row["mode"], row["task"]): row for row in result_rows(runs, greedy=True)}
    for task in ("a", "b", "mean"):
        assert rows["reference-tree", task]["tau_without_graft"] is None
        with_graft = rows["reference-tree+graft", task]
        assert (with_graft["tau"], with_graft["tau_without_graft"]) == (3.0, 2.0)


def test_no_figure_is_invented() -> None:
    runs = [TaskRun("reference-chain", "a", 10, 10, [10], 20, None, {"1": [[1]]})]
    (row, mean) = result_rows(runs, greedy=True)
    for found in (row, mean):
        assert found["tokens_per_s"] is found["speedup"] is found["identical"] is None
    none = TaskRun("none", "a", answers={"1": [[1]]})
    assert result_rows([none, *runs], greedy=False)[2]["identical"] is None

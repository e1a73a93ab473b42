"""docs/serving.md says what the tests show."""

from pathlib import Path

import faults

from vllm_eagle3.runner.request_limit import LIMIT

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_tables_are_up_to_date():
    """`python tests/faults.py` makes them anew."""
    assert faults.replaced(PAGE) == PAGE


def test_the_tests_exist():
    named = {name for _, tests in faults.WHILE_SERVING.values() for name in tests.split(", ")}
    assert not [name for name in named if not (TESTS / name).is_file()]


def test_it_names_every_series_and_the_limit():
    from vllm_eagle3.runner.hooks.spec_metrics import LABELS, SERIES

    for name in SERIES:
        assert f"`{name}_total`" in PAGE and f"`{LABELS[name]}`" in PAGE
    assert LIMIT in PAGE

"""The texts of options as values."""

import click
import pytest

from cortex_dask.cli import options


@pytest.mark.parametrize(
    ("text", "comparison"),
    [
        ("x > 5", ("x", ">", 5)),
        ("x>=5.5", ("x", ">=", 5.5)),
        ("label = 'cat'", ("label", "=", "cat")),
        ('label == "a, b"', ("label", "==", "a, b")),
        ("label != cat", ("label", "!=", "cat")),
        ("day >= 2026-01-31", ("day", ">=", "2026-01-31")),
        ("code = '01'", ("code", "=", "01")),
        ("ok = true", ("ok", "=", True)),
        ("y in [1, 2]", ("y", "in", [1, 2])),
        ("y not in (a, 'b, c')", ("y", "not in", ["a", "b, c"])),
        ("y in a,b", ("y", "in", ["a", "b"])),
        ("`a column` < 1", ("a column", "<", 1)),
    ],
)
def test_a_filter_is_a_comparison(text, comparison):
    assert options.filters([text]) == [comparison]


@pytest.mark.parametrize("text", ["x", "x >", "> 5", "x ~ 5", "inside [1]"])
def test_what_is_no_comparison_is_refused(text):
    with pytest.raises(click.BadParameter, match="write a comparison such as"):
        options.filters([text])


def test_config_is_merged_deeply_and_later_ones_win(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: a, depth: 3}\nlabels: [x]\n")

    found = options.config([f"@{file}", "model.depth=4", "threshold=0.5", '{"model": {"name": "b"}}', "text=a=b"])

    assert found == {"model": {"name": "b", "depth": 4}, "labels": ["x"], "threshold": 0.5, "text": "a=b"}


@pytest.mark.parametrize(
    ("text", "message"), [("threshold", "give key=value"), ("{a", "does not parse"), ("=1", "give key=value")]
)
def test_config_that_is_none_is_refused(text, message):
    with pytest.raises(click.BadParameter, match=message):
        options.config([text])


def test_a_config_file_must_hold_a_mapping(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("- 1\n")

    with pytest.raises(click.BadParameter, match="holds a list; it must be a mapping"):
        options.config([f"@{file}"])


def test_what_is_left_out_stays_out():
    assert (options.columns(None), options.keep(None), options.max_failed(None)) == (None, None, None)
    assert (options.filters([]), options.config([])) == (None, None)


def test_lists_of_columns():
    assert options.columns("a, b") == ["a", "b"]
    assert options.keep("all") is True
    assert options.keep("a") == ["a"]
    with pytest.raises(click.BadParameter, match="with commas between"):
        options.columns("a,,b")


def test_failures_are_a_number_or_a_share():
    assert options.max_failed("10") == 10
    assert options.max_failed("5%") == "5%"
    with pytest.raises(click.BadParameter, match="a number of batches"):
        options.max_failed("few")

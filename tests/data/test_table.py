"""The clients x categories table: right numbers, readable colours, one page without scripts."""

import re
from html.parser import HTMLParser
from io import StringIO

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sheepfold.config import DataSettings, PartitionSettings
from sheepfold.data import table
from sheepfold.data.prepare import partition_only

DATA = partition_only(DataSettings(rows=160, partition=PartitionSettings(by="shards", clients=4)))


def big() -> table.Counts:
    rows = np.random.default_rng(0).integers(0, 40, (500, 60))
    return table.Counts(tuple(f"c{i}" for i in range(500)), tuple(f"label {i}" for i in range(60)), rows)


def test_counts_are_those_of_the_partition() -> None:
    counted = table.counts(DATA)
    assert counted.rows.sum() == 160
    assert counted.rows.sum(axis=1).tolist() == [40] * 4
    assert counted.rows.sum(axis=0).tolist() == [20] * 8
    assert counted.as_dict()["client-0"] == {
        name: int(n) for name, n in zip(counted.categories, counted.rows[0], strict=True) if n
    }


def test_the_terminal_table_says_what_it_leaves_out() -> None:
    text = StringIO()
    Console(file=text, width=200).print(table.terminal(big(), most_clients=10, most_categories=5))
    assert "490 more" in text.getvalue()
    assert "(56 others)" in text.getvalue()
    assert f"{big().rows.sum():,}" in text.getvalue()


class Outline(HTMLParser):
    """Open tags, and whether each was closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_heat_map_is_one_page_without_scripts_or_addresses() -> None:
    page = table.heatmap_html(table.counts(DATA), title="<Dolly> & co")
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert "script" not in outline.seen
    assert not re.search(r"https?:|url\(|src=", page)
    assert "&lt;Dolly&gt; &amp; co" in page
    assert page.count('<th scope="row">') == 4 + 1
    assert re.search(r"\{\w+\}", page) is None


def test_a_heat_map_of_many_clients_says_what_it_leaves_out() -> None:
    page = table.heatmap_html(big(), most_clients=120)
    assert page.count('<th scope="row">') == 120 + 1
    assert "380 more" in page
    assert "(21 others)" in page


@given(st.floats(0, 1))
def test_numbers_can_be_read_on_every_colour(share: float) -> None:
    back, ink = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in table.colours(share))
    assert table.contrast(back, ink) >= 4.5


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_is_never_lighter(one: float, other: float) -> None:
    low, high = sorted((one, other))
    dark, light = (sum(int(table.colours(share)[0][i : i + 2], 16) for i in (1, 3, 5)) for share in (high, low))
    assert dark <= light

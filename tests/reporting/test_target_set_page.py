"""Parts of the page about a target set that small sets do not have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.reporting.html import bar_list
from cae2pipe.reporting.pictures import HEAT, heat_map
from cae2pipe.reporting.target_set_page import FIRST_CLASSES, LAST_CLASSES, class_bars, floor_percent
from cae2pipe.reporting.wording import listed
from cae2pipe.runtime.wording import counted
from tests.reporting.test_html import read


def test_long_tails_of_classes_are_collapsed():
    classes = [(f"class {number}", 2000 - number) for number in range(1000)]
    bars = class_bars(classes)
    assert len(bars) == FIRST_CLASSES + 1 + LAST_CLASSES
    assert bars[0] == ("class 0", 2000.0, "2,000")
    assert bars[-1] == ("class 999", 1001.0, "1,001")
    name, mean, text = bars[FIRST_CLASSES]
    assert name == f"{1000 - FIRST_CLASSES - LAST_CLASSES} more classes"
    assert text == "1,005 to 1,988 each"
    assert 1005 < mean < 1988


@given(st.lists(st.integers(0, 9), max_size=40))
def test_no_class_is_lost(counts):
    bars = class_bars([(f"c{number}", count) for number, count in enumerate(sorted(counts, reverse=True))])
    shown = sum(not name.endswith("more classes") for name, _, _ in bars)
    hidden = [int(name.split()[0]) for name, _, _ in bars if name.endswith("more classes")]
    assert shown + sum(hidden) == len(counts)


def test_only_what_is_whole_is_a_hundred_percent():
    assert [floor_percent(share) for share in (0.0, 20015 / 20016, 1.0)] == [0, 99, 100]


def test_bars_are_as_long_as_their_values():
    reader = read(bar_list([("<a>", 4.0, "four"), ("b", 1.0, "one"), ("c", 0.0, "none")]))
    assert [attributes["style"] for tag, attributes in reader.tags if tag == "b"] == [
        "width: 100%",
        "width: 25%",
        "width: 0%",
    ]
    assert "<a>" in reader.text
    assert read(bar_list([("a", 0.0, "none")])).text == "anone"


def test_heat_maps_run_from_the_lowest_to_the_highest():
    picture = heat_map([[0.0, 0.5, 1.0, 2.0]], 0.0, 1.0)
    assert picture.tolist() == [[*(HEAT[index].astype(int).tolist() for index in (0, 2, 4, 4))]]
    assert (heat_map([[1.0, 1.0]], 1.0, 1.0) == heat_map([[0.0]], 0.0, 1.0)).all()


def test_words():
    assert [counted(1, "store"), counted(1024, "class", "classes")] == ["1 store", "1,024 classes"]
    assert listed([str(number) for number in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"

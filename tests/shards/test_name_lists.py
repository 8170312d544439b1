import pytest

from cae2pipe.errors import SourceError
from cae2pipe.shards.name_lists import listed_names, text_lines


def test_lists_of_names_keep_their_places():
    assert text_lines("a\r\n\nb\u2028c\x0cd\n\n") == ["a", "", "b\u2028c\x0cd"]
    assert listed_names(" red \ngreen\x0bish\n\n", "x") == ["red", "green\x0bish"]
    with pytest.raises(SourceError, match="this line is empty") as caught:
        listed_names("red\n\ngreen\n", "classes.txt")
    assert caught.value.where == "classes.txt, line 2"

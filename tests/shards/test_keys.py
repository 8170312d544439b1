"""Sample keys: unique, stable, and safe wherever a key can end up."""

from __future__ import annotations

import string
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cae2pipe.shards.keys import LONGEST, sample_key

SAFE = set(string.ascii_letters + string.digits + "_-+~=")

names = st.text(min_size=1, max_size=120)
tricky = st.text(alphabet="aA/.+~=_- \n\t\0é\u0301e漢\U0001f600", min_size=1, max_size=100)


@given(names | tricky)
@example("\udcff")
def test_keys_hold_only_safe_characters_and_are_short(name):
    key = sample_key(name)
    assert set(key) <= SAFE
    assert 1 <= len(key) <= LONGEST == 80


@given(names | tricky, names | tricky)
@example("a/b", "a+b")
@example("a~2eb", "a.b")
@example("x" * 81, "x" * 82)
@example("é" * 40, "é" * 41)
@example("\udcc3\udca9", "é")
def test_different_names_have_different_keys(first, second):
    assume(unicodedata.normalize("NFC", first) != unicodedata.normalize("NFC", second))
    assert sample_key(first) != sample_key(second)


@given(names)
def test_the_form_of_accents_makes_no_difference(name):
    assert sample_key(unicodedata.normalize("NFD", name)) == sample_key(unicodedata.normalize("NFC", name))


@given(st.text(alphabet=SAFE - set("+~="), min_size=1, max_size=LONGEST))
def test_plain_names_are_their_own_keys(name):
    assert sample_key(name) == name


@given(names | tricky)
def test_no_name_has_the_key_of_a_name_that_was_cut(name):
    # Two names with the same key would lose an image: here the second name is made from the key of the first.
    key = sample_key(name)
    assume(unicodedata.normalize("NFC", name) != key)
    assert sample_key(key) != key or set(key).isdisjoint("+~=")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01440764/n01440764_10026", "n01440764+n01440764_10026"),
        ("a/b.c", "a+b~2ec"),
        ("my cat", "my~20cat"),
        ("a+b~c=d", "a~2bb~7ec~3dd"),
        ("café", "caf~c3~a9"),
        ("cafe\u0301", "caf~c3~a9"),
        ("a" * 80, "a" * 80),
        ("a" * 81, "a" * 55 + "=f1025c8120b7ab548270c947"),
    ],
)
def test_keys_are_pinned(name, key):
    # Views are drawn by key: another key for the same file would give other views.
    assert sample_key(name) == key

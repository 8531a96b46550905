"""What strangers wrote is shown, and acts neither on a terminal nor in a spreadsheet."""

import pytest

from rerail.printable import printable, spreadsheet_field


@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\x07", "\r", "\x00", "\u202e", "\ud800"])
def test_a_character_that_acts_is_replaced_at_any_depth(character):
    value = {f"a{character}": [f"b{character}[2J", ("c\td\n", 0.5, None)]}
    assert printable(value) == {"a\ufffd": ["b\ufffd[2J", ["c\td\n", 0.5, None]]}


def test_other_texts_and_numbers_stay_as_they_are():
    for value in ("é ü 中 😀", "a=b", "0.5 - 1", -0.5, True, None):
        assert printable(value) == spreadsheet_field(value) == value

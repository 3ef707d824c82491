"""Which part of an unfinished answer is final."""

import pytest

from softprompt.generation.text import AnswerText

PART = "\N{REPLACEMENT CHARACTER}"  # of a character whose other bytes come with the next token


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("ab", "ab"),
        ("ab" + PART, "ab"),
        (PART + "ab", PART + "ab"),
        ("ab\nQ", "ab"),
        ("ab\nQ" + PART, "ab"),  # the part may become the second character of the stop text
        ("ab" + PART + PART, "ab"),
        ("ab\n", "ab"),
        ("ab\nX", "ab\nX"),
    ],
)
def test_the_beginning_of_a_stop_text_is_held_back(text, final):
    assert AnswerText(None, ["\nQé", "never"]).final(text) == final

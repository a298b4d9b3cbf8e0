"""A sample of the random inputs with which `python -m bench fuzz-...` tries to break the readers."""
import pytest

from bench.fuzz import Maker, passes


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_drawings_pass_or_are_refused_in_one_line(tmp_path, first):
    outcomes = [passes(0, number, tmp_path) for number in range(first, first + 10)]
    assert [wrong for _, wrong in outcomes if wrong] == []
    assert "drawn" in [outcome for outcome, _ in outcomes]


def test_a_drawing_depends_on_its_seed_and_number_alone():
    assert Maker(0, 7).document() == Maker(0, 7).document() != Maker(1, 7).document()

"""A sample of the random inputs with which `python -m bench fuzz-...` tries to break the readers."""
import time

import pytest

from bench import mutate
from bench.fuzz import Maker, passes


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_drawings_pass_or_are_refused_in_one_line(tmp_path, first):
    outcomes = [passes(0, number, tmp_path) for number in range(first, first + 10)]
    assert [wrong for _, wrong in outcomes if wrong] == []
    assert "drawn" in [outcome for outcome, _ in outcomes]


def test_a_drawing_depends_on_its_seed_and_number_alone():
    assert Maker(0, 7).document() == Maker(0, 7).document() != Maker(1, 7).document()


def test_a_call_that_never_ends_is_stopped_by_its_processor_time(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "SECONDS", 0.05)

    def endless():
        while True:
            pass
    assert mutate.measured(endless, tmp_path)[0] == "it hangs"
    assert mutate.measured(lambda: time.sleep(0.3), tmp_path)[0] == "read"  # waiting is no work
    assert mutate.measured(lambda: time.sleep(9), tmp_path)[0] == "it hangs"

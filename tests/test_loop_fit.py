"""loop/fit.py: the limits of a fit, and its end where it stops gaining."""
from types import SimpleNamespace

import pytest
import torch

from loop.fit import Course


def course_of(errors, monkeypatch, **limits):
    """The steps that a Course takes whose errors at a share of its time are errors(share), one step a second."""
    course = Course(SimpleNamespace(path="scene", fingerprint="a"), {}, {}, **limits)
    monkeypatch.setattr(course, "clock", lambda: course.step)
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    for step in course.run(optimiser, torch.Generator(), dict, progress=False):
        course.report(torch.tensor(1.0), torch.tensor(errors(step / 1000)))
    return course


def test_a_fit_ends_once_it_has_stopped_gaining(monkeypatch):
    whole = course_of(lambda share: 0.1 ** (1 + share), monkeypatch, seconds=1000)
    assert whole.step == 1000 and not whole.ended
    stuck = course_of(lambda share: 0.1 ** (1 + min(share, 0.4)), monkeypatch, seconds=1000)
    assert 700 < stuck.step < 900 and stuck.ended


def test_a_number_of_steps_is_taken_whole(monkeypatch):
    assert course_of(lambda share: 0.1, monkeypatch, steps=300).step == 300


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_seconds_must_be_positive(seconds):
    with pytest.raises(ValueError, match="the seconds of a fit must be positive"):
        Course(SimpleNamespace(path="scene"), {}, {}, seconds)

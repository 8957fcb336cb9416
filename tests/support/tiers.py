"""Fewer parameters: of many cases `make test` tries some, `make test-all` all."""

import itertools

import pytest


def slow_but(quick, cases):
    """Return ``cases`` as parameters, marked slow but for those among ``quick``."""
    quick = list(quick)
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def cover(cases, shows=set):
    """Return few of ``cases`` that show all that the whole of them do; ``shows`` gives the set of what one shows."""
    cases, chosen = list(cases), []
    missing = set().union(*map(shows, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(shows(case) & missing)))
        missing -= shows(chosen[-1])
    return chosen


def pairwise(*axes):
    """Return rows with one value of each axis, few, and every two values of two axes together in one of them."""
    return cover(itertools.product(*axes), lambda row: set(itertools.combinations(enumerate(row), 2)))

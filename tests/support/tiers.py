"""Choices of test cases: `make test` runs some of the cases, `make test-all` all of them."""

import itertools

import pytest


def slow_but(quick, cases):
    """Return ``cases`` as parameters, marked slow unless they are among ``quick``."""
    quick = list(quick)
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def cover(cases, shows=set):
    """Return few of ``cases`` that together cover all values; ``shows`` gives the set of values of one case."""
    cases, chosen = list(cases), []
    missing = set().union(*map(shows, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(shows(case) & missing)))
        missing -= shows(chosen[-1])
    return chosen


def pairwise(*axes):
    """Return few rows, with one value per axis, so that any two values of two axes occur together in a row."""
    return cover(itertools.product(*axes), lambda row: set(itertools.combinations(enumerate(row), 2)))

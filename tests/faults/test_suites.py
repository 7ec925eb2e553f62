"""The short version of the suite fuzzer of `make faults`."""

from faults.suites import KINDS, fuzz


def test_bad_suites_are_one_line_and_write_nothing() -> None:
    """Three of each kind, through check-suite and the other commands."""
    count = 3 * len(KINDS)
    tally, _, broken = fuzz(count)
    assert broken == []
    assert tally.total() == count and tally.keys() == KINDS.keys()

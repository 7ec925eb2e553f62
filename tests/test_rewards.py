"""Verdicts: right, wrong or could-not-judge, whatever a model writes, within a deadline, and never mixed up."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cppo.rewards import MAX_CHARACTERS, Judge, fast_verdict

HARD = r"\boxed{9^{9^{9^9}}}"
"""Keeps a computer-algebra system busy for ever."""
EASY = r"\boxed{14/2}"
"""Needs math-verify, which takes milliseconds."""


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """With a deadline that a busy machine does not miss."""
    with Judge(deadline=30) as found:
        yield found


def worker_of(judge: Judge) -> int:
    assert judge._worker is not None
    return judge._worker.pid


# Without mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (boxed("7"), "7", 1.0),
        (boxed("8"), "7", 0.0),
        ("a3+4=7" + boxed("7"), "7", 1.0),
        ("a3+4=7" + boxed("8"), "7", 0.0),
        (boxed(" 7 "), "7", 1.0),
        (boxed("+7"), "7", 1.0),
        (boxed("-7"), "-7", 1.0),
        (boxed("-7"), "7", 0.0),
        (boxed("007"), "7", 1.0),
        (boxed("-0"), "0", 1.0),
        (boxed("9" * 18), "9" * 18, 1.0),
        (boxed("7") + " and then 8", "7", 1.0),
        # No box is wrong, also beside the right number.
        ("", "7", 0.0),
        ("7", "7", 0.0),
        ("$7$", "7", 0.0),
        ("{7}", "7", 0.0),
        ("The answer is 7.", "7", 0.0),
        ("boxed{7}", "7", 0.0),
        ("\\boxed{7", "7", 0.0),
        ("\\boxed 7", "7", 0.0),
        ("\\boxed{{7}", "7", 0.0),
        # Anything else is a question for math-verify.
        (boxed(""), "7", None),
        (boxed("{7}"), "7", None),
        (boxed("7.0"), "7", None),
        (boxed("14/2"), "7", None),
        (boxed("1") + boxed("7"), "7", None),
        (boxed("7") + boxed("7"), "7", None),
        (boxed("7") + "\\boxed{", "7", None),
        (boxed("9" * 19), "7", None),
        (boxed("7"), "7.0", None),
        (boxed("7"), "", None),
        (boxed("²"), "2", None),
    ],
)
def test_fast_verdict(response: str, gold: str, expected: float | None) -> None:
    found = fast_verdict(response, gold)
    assert found == expected and type(found) is type(expected)


def test_plain_integers_start_no_worker() -> None:
    with Judge() as judge:
        assert judge.verdict(boxed("7"), "7") == 1.0 and judge.verdict("7", "7") == 0.0
        assert judge._worker is None
    assert (
        judge.verdict(boxed("35/5"), "") is None and judge._worker is not None
    )  # a missing verdict is asked for again
    judge.close()
    assert judge.verdict(boxed("35/5"), "") is None and judge._worker is not None


# With mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (boxed("14/2"), "7", 1.0),
        (boxed("15/2"), "7", 0.0),
        (boxed(r"\frac{14}{2}"), "7", 1.0),
        (boxed(r"\dfrac12"), "1/2", 1.0),
        (boxed("1/2"), r"\frac{1}{2}", 1.0),
        (boxed("0.5"), "1/2", 1.0),
        (boxed("0.51"), "1/2", 0.0),
        (boxed("2/4"), "1/2", 1.0),
        (boxed(r"\sqrt{4}"), "2", 1.0),
        (boxed(r"\sqrt{2}"), "2", 0.0),
        (boxed("7.0"), "7", 1.0),
        (boxed("2^{10}"), "1024", 1.0),
        (boxed("1,000"), "1000", 1.0),
        (boxed("9" * 30), "9" * 30, 1.0),
        (boxed("9" * 29 + "8"), "9" * 30, 0.0),
        (boxed("x+7-x"), "7", 1.0),
        (boxed("(3,4)"), "(3,4)", 1.0),
        (boxed("(4,3)"), "(3,4)", 0.0),
        (boxed(r"\{1,2\}"), r"\{2,1\}", 1.0),
        # Several boxes are right only when they agree.
        (boxed("7") + " or " + boxed("7"), "7", 1.0),
        (boxed("3") + " or " + boxed("7"), "7", 0.0),
        (boxed("7") + " or " + boxed("3"), "7", 0.0),
        # Not an answer.
        (boxed(""), "7", 0.0),
        ("\\boxed{7", "7", 0.0),
        ("7 \\boxed", "7", 0.0),
        (boxed("seven"), "7", 0.0),
        (boxed("1/0"), "7", 0.0),
        (boxed(r"\infty"), "7", 0.0),
        # What stands beside a box that says nothing, or not the right thing, is not an answer either.
        (boxed("") + " $7$", "7", 0.0),
        (boxed("???") + " The answer is $7$", "7", 0.0),
        (boxed("16/2") + " The final answer is $7$. I hope it is correct.", "7", 0.0),
        ("\\boxed 7 $7$", "7", 0.0),
        # In formulas of their own, the last box counts.
        ("$" + boxed("3") + "$, no, $" + boxed("7") + "$", "7", 1.0),
        ("$" + boxed("7") + "$, no, $" + boxed("3") + "$", "7", 0.0),
        (boxed("3") + " and " + boxed("4"), "3,4", 1.0),
        # A gold answer that math-verify cannot read is compared as text: another text is not a wrong answer.
        (boxed(r"50\%"), r"50\%", 1.0),
        (boxed(r"49\%"), r"50\%", None),
        # The gold answer says nothing: could not judge.
        (boxed("14/2"), "", None),
    ],
)
def test_verdicts(judge: Judge, response: str, gold: str, expected: float | None) -> None:
    """None only where nothing could be judged; a verdict is a float."""
    killed = judge.killed
    found = judge.verdict(response, gold)
    assert found == expected and type(found) is type(expected)
    assert judge.killed == killed


@pytest.mark.parametrize(
    ("digit", "expected"), [("٧", 1.0), ("７", 1.0), ("৭", 1.0), ("²", 0.0), ("Ⅶ", 0.0), ("⑦", 0.0)]
)
def test_digits_of_other_scripts(judge: Judge, digit: str, expected: float) -> None:
    """Decimal digits of any script are that digit; characters that merely look like a number are not."""
    assert judge.verdict(boxed(digit), "7") == expected


@pytest.mark.parametrize(
    "response",
    [
        "\n\n" + EASY + "\n[1.0]\n0.0\n",
        EASY.replace("14", "\n14\r\n"),
        "\u2028" + EASY + "\u2029\x85\x0b\x0c\x1c",
        '"]\n["' + EASY + '", "7"]\n',
        "日本語 🙂 " + EASY,
        "\x7f\x1b[31m" + EASY,
        "\ud800" + EASY + "\udfff",
        "\x00" + EASY,
        EASY + "\\boxed",
        "\\boxed" * 3000,
        boxed("\x00\x01\x02"),
        boxed("\ud800"),
        boxed(r"\input{/etc/passwd}"),
        boxed("%s%n{0}"),
        boxed("7" * 5000),
        boxed("1000!"),
        boxed("1e999999999"),
        "x" * (MAX_CHARACTERS - len(EASY)) + EASY,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_odd_text_does_not_break_the_protocol(judge: Judge, response: str) -> None:
    """A verdict or None comes back, and the answers after it are those to the questions after it."""
    found = judge.verdict(response, "7")
    assert found is None or (type(found) is float and found in (0.0, 1.0))
    if EASY in response and "\ud800" not in response and "\x00" not in response and "\\boxed\\boxed" not in response:
        assert found == 1.0
    salt = len(response)  # questions of its own, or the cache would answer
    assert judge.verdict(boxed(f"{7 * salt}/{salt}"), "7") == 1.0
    assert judge.verdict(boxed(f"{8 * salt}/{salt}"), "7") == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {}')",
        "exec(\"open('{}', 'w')\")",
        r"\write18{{touch {}}}",
        r"\text{{__import__('pathlib').Path('{}').touch()}}",
        "$(touch {})",
        "lambda: open('{}', 'w')",
    ],
)
def test_text_is_not_run(judge: Judge, tmp_path: Path, code: str) -> None:
    target = tmp_path / "x"
    assert judge.verdict(boxed(code.format(target)), "7") in (0.0, None)
    assert judge.verdict(boxed("14/2"), code.format(target)) in (0.0, None)
    assert list(tmp_path.iterdir()) == []


# Deadlines and lost workers -------------------------------------------------------------------------------------------


def thinking(judge: Judge) -> int:
    """The process that looks for the verdict, once there is one; the worker that forked it stays."""
    worker = worker_of(judge)
    while True:
        children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)


def test_a_deadline_is_kept_counted_and_survived() -> None:
    """Could not judge is None, never 0; what thought about it is gone, and the next verdict is right and waits for nothing."""
    with Judge(deadline=30) as judge:
        assert judge.verdict(EASY, "7") == 1.0  # the worker has started
        judge.deadline, worker = 0.7, worker_of(judge)
        timer = threading.Timer(0.3, lambda: found.append(thinking(judge)))
        found: list[int] = []
        timer.start()
        started = time.monotonic()
        assert judge.verdict(HARD, "7") is None
        assert 0.6 < time.monotonic() - started < 1.5
        assert judge.killed == judge.unjudged == 1
        timer.join()
        with pytest.raises(ProcessLookupError):
            os.kill(found[0], 0)
        judge.deadline = 30
        assert judge.verdict(boxed("21/3"), "7") == 1.0 and judge.verdict(boxed("22/3"), "7") == 0.0
        assert judge.killed == judge.unjudged == 1 and worker_of(judge) == worker


@pytest.mark.parametrize("text", [boxed("7" * 10**6), EASY + " " * 10**6, boxed(" " * 10**6)])
def test_a_megabyte_is_not_judged(text: str) -> None:
    """None at once, without a worker."""
    with Judge() as judge:
        started = time.monotonic()
        assert judge.verdict(text, "7") is None
        assert time.monotonic() - started < 1.0
        assert judge.killed == 0 and judge.unjudged == 1 and judge._worker is None


def test_the_end_of_a_long_response_is_read(judge: Judge) -> None:
    assert judge.verdict("So x = 3. " * 10**5 + EASY, "7") == 1.0
    assert judge.verdict("So x = 7. " * 10**5 + boxed("16/2"), "7") == 0.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_killed_between_verdicts(number: signal.Signals) -> None:
    """It was dead before the question was sent: the question is put to a new one, and nothing is lost."""
    with Judge(deadline=30) as judge:
        assert judge.verdict(EASY, "7") == 1.0
        assert judge._worker is not None
        os.kill(judge._worker.pid, number)
        judge._worker.wait()
        assert judge.verdict(boxed("21/3"), "7") == 1.0 and judge.verdict(boxed("29/4"), "7") == 0.0
        assert judge.killed == judge.unjudged == 0


@pytest.mark.parametrize("victim", [thinking, worker_of])
def test_a_worker_killed_while_it_thinks(victim: Callable[[Judge], int]) -> None:
    """Noticed at once, not at the deadline, and counted; the answers after it are judged."""
    with Judge(deadline=30) as judge:
        assert judge.verdict(EASY, "7") == 1.0
        timer = threading.Timer(0.2, lambda: os.kill(victim(judge), signal.SIGKILL))
        timer.start()
        started = time.monotonic()
        assert judge.verdict(HARD, "7") is None and judge.killed == judge.unjudged == 1
        assert time.monotonic() - started < 10
        assert judge.verdict(boxed("21/3"), "7") == 1.0 and judge.killed == 1


def test_signals_to_the_whole_group_leave_the_worker_to_its_judge() -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process; the trainer still needs verdicts to end its iteration."""
    with Judge(deadline=30) as judge:
        assert judge.verdict(EASY, "7") == 1.0
        worker = worker_of(judge)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        assert judge.verdict(boxed("21/3"), "7") == 1.0 and worker_of(judge) == worker


def test_nothing_outlives_a_judge_that_was_killed() -> None:
    """Neither the worker nor what it forked for an endless question, once that question's time is over."""
    code = "from cppo.rewards import Judge; judge = Judge(deadline=1.0); judge.start(); print(judge._worker.pid, flush=True);"
    code += f" judge.verdict({HARD!r}, '7'); judge.verdict({HARD!r}, '7')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        time.sleep(0.3)
        owner.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    """Or one would read the other's verdicts, and end its worker."""
    with Judge(deadline=30) as judge:
        assert judge.verdict(EASY, "7") == 1.0
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(judge.verdict(boxed("29/4"), "7") != 0.0)
                judge.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        worker = worker_of(judge)
        assert judge.verdict(boxed("21/3"), "7") == 1.0 and worker_of(judge) == worker and judge.killed == 0


def test_works_off_the_main_thread() -> None:
    """Deadlines by signal alarms would not; in one trainer they silently scored everything 0."""
    found: list[float | None] = []

    def ask() -> None:
        with Judge(deadline=30) as judge:
            found.append(judge.verdict(EASY, "7"))
            judge.deadline = 0.7
            found.append(judge.verdict(HARD, "7"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert found == [1.0, None]


def test_the_cache_repeats_the_verdict_without_a_worker(judge: Judge) -> None:
    questions = [(boxed("35/5"), "7"), (boxed("36/5"), "7"), (boxed("7/1"), "8")]
    first = [judge.verdict(*question) for question in questions]
    assert first == [1.0, 0.0, 0.0]
    judge.close()
    assert [judge.verdict(*question) for question in questions] == first
    assert judge._worker is None
    assert (
        judge.verdict(boxed("35/5"), "") is None and judge._worker is not None
    )  # a missing verdict is asked for again
    judge.close()
    assert judge.verdict(boxed("35/5"), "") is None and judge._worker is not None


def test_closing_ends_the_worker() -> None:
    with Judge(deadline=30) as judge:
        judge.verdict(EASY, "7")
        worker = worker_of(judge)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    judge.close()  # a second time does nothing

"""Mathematical answers: where a text gives its own, and whether two say the same thing (by math-verify).

math-verify limits its time by an alarm signal, which only a process's main thread can set; elsewhere it raises. There
the call goes to a helper process, where it is on a main thread again. Its `verify` is not symmetric: gold goes first.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

LONGEST = 400  # characters; longer answers are compared as texts only: no gold answer comes near it
SECONDS = 5  # for reading one answer and for one comparison
NUMBER = re.compile(r"-?\$?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a text holds, braces balanced; None without one that is closed."""
    for start in reversed([found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if not depth:
                return text[start:i].strip()
    return None


def number_after(text: str, *marks: str) -> str | None:
    """The first number after the last of the marks, or without a mark the last number; plain: no '$', no commas."""
    end = max((text.rfind(mark) + len(mark) for mark in marks if mark in text), default=None)
    found = NUMBER.findall(text if end is None else text[end:])
    if not found:
        return None
    return found[-1 if end is None else 0].replace("$", "").replace(",", "")


def equivalent(gold: str, answer: str) -> bool:
    """Whether an answer, in LaTeX or plain, says what the gold answer says: as text, as a value or as an expression.

    What cannot be read or decided within SECONDS is not equivalent.
    """
    if _plain(gold) == _plain(answer):
        return True
    if not answer or len(answer) > LONGEST:
        return False
    return _on_a_main_thread(_equivalent, gold, answer)


def canonical(answer: str) -> str:
    """One form for answers that say the same, for votes: equal values have equal forms (1/2, 0.5, \\frac12).

    Expressions keep the form that they have after parsing, so that two equal ones may stay apart.
    """
    return _plain(answer) if len(answer) > LONGEST else _on_a_main_thread(_canonical, answer)


def _plain(text: str) -> str:
    """Without what only the typesetting needs."""
    text = re.sub(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\left|\\right|\\[,;:! ]|\$|\s", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


@functools.lru_cache(maxsize=100_000)
def _equivalent(gold: str, answer: str) -> bool:
    from math_verify import verify

    return verify(_parsed(gold), _parsed(answer), timeout_seconds=SECONDS)


@functools.lru_cache(maxsize=100_000)
def _canonical(answer: str) -> str:
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    parsed = _parsed(answer)
    if not parsed or isinstance(parsed[0], str):
        return _plain(answer)
    try:
        return timeout(SECONDS)(_written)(parsed[0])
    except (TimeoutException, ValueError, OverflowError, RecursionError):
        return _plain(answer)


def _written(value: Any) -> str:
    from sympy import Rational

    return str(Rational(str(value)) if getattr(value, "is_Float", False) else value)


def _parsed(answer: str) -> list[Any]:
    from math_verify import parse

    return parse(f"${answer.strip().strip('$')}$", parsing_timeout=SECONDS)


def _on_a_main_thread(function: Callable[..., Any], *arguments: str) -> Any:
    if threading.current_thread() is threading.main_thread():
        return function(*arguments)
    return _helper().submit(function, *arguments).result()


@functools.cache
def _helper() -> ProcessPoolExecutor:
    from multiprocessing import get_context

    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # a fork would copy the locks of other threads

"""Small integer functions from a description in words: "twice x plus y minus 3 but at least 0" -> "max(2*x+y-3,0)$".

An answer is right if it computes the described function everywhere on DOMAIN, whatever it looks like. `passes` checks
only some inputs, as the unit tests of a benchmark do. Answers are programs of a model and are never handed to Python's
`eval`: `evaluate` walks a syntax tree of whitelisted nodes, of bounded size, over bounded integers.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Callable
from random import Random

import numpy as np

from common.tasks.problem import Problem, distinct_problems

SIDE = 8
DOMAIN = np.array([(x, y) for x in range(-SIDE, SIDE + 1) for y in range(-SIDE, SIDE + 1)])  # [289, 2]
END = "$"
MAX_CHARACTERS, MAX_NODES, MAX_VALUE = 120, 60, 10**6
COMPARISONS: dict[type, Callable] = {
    ast.Gt: np.greater, ast.Lt: np.less, ast.GtE: np.greater_equal, ast.LtE: np.less_equal, ast.Eq: np.equal,
}  # fmt: skip
OPERATORS: dict[type, Callable] = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply}
FUNCTIONS: dict[str, Callable] = {"max": np.maximum, "min": np.minimum}
TIMES = {1: "", 2: "twice ", 3: "thrice "}
STYLES = {"": "", "last": "number last : ", "first": "number first : "}  # where a sum's constant is asked to stand
WORDS = """
twice thrice plus minus but at least most the larger smaller of and if exceeds else f number first last max min x y
""".split()  # noqa: SIM905
SYMBOLS = [*map(str, range(100)), *"+-*()><,;:= $"]


class InvalidExpression(ValueError):
    """The text is no expression that `evaluate` accepts; the message says why."""


def generate(
    seed: int,
    n: int,
    difficulty: int | tuple[int, int] = (1, 3),
    split: str = "train",
    *,
    examples: int = 2,
    style: str = "",
) -> list[Problem]:
    """n different problems of one split. difficulty: 1 a sum, 2 a sum with a bound, 3 two sums and a choice.

    examples: input and value pairs shown in the prompt. style: '' or where the constant of a sum shall stand, 'first'
    or
    'last'. Raises ValueError for a difficulty or style out of range.
    """
    low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    if not 1 <= low <= high <= 3:
        raise ValueError(f"difficulty must lie in 1..3, not {difficulty}")
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(repr(s) for s in STYLES)}")
    if not 0 <= examples <= 4:
        raise ValueError(f"examples must lie in 0..4, not {examples}")
    return distinct_problems(lambda random: _draw(random, random.randint(low, high), examples, style), seed, n, split)


def _draw(random: Random, difficulty: int, examples: int, style: str) -> Problem:
    words, code = _sum(random, style)
    if difficulty == 2:
        bound = random.randint(-6, 6)
        side, function = random.choice((("least", "max"), ("most", "min")))
        words, code = f"{words} but at {side} {_number(bound)}", f"{function}({code},{bound})"
    elif difficulty == 3:
        other_words, other = _sum(random, style)
        kind = random.choice(("larger", "smaller", "if"))
        if kind == "if":
            a, b = random.sample(("x", "y"), 2)
            words, code = f"{words} if {a} exceeds {b} else {other_words}", f"({code} if {a}>{b} else {other})"
        else:
            function = "max" if kind == "larger" else "min"
            words, code = f"the {kind} of {words} and {other_words}", f"{function}({code},{other})"
    table = evaluate(code)
    shown = ""
    for index in random.sample(range(len(DOMAIN)), examples):
        x, y = DOMAIN[index]
        shown += f"; f {_number(x)} {_number(y)} = {_number(table[index])} "
    prompt = f"{STYLES[style]}{words} {shown}: "
    return Problem("exprs", "", prompt, code + END, code, difficulty)


def _sum(random: Random, style: str) -> tuple[str, str]:
    """A sum of multiples of x and y and a constant, in words and as code."""
    first, second = random.sample(("x", "y"), 2)
    a, b, c = random.randint(1, 3), random.choice((-3, -2, -1, 1, 2, 3)), random.randint(-9, 9)
    words = f"{TIMES[a]}{first} {'plus' if b > 0 else 'minus'} {TIMES[abs(b)]}{second}"
    code = f"{_times(a, first)}{'+' if b > 0 else '-'}{_times(abs(b), second)}"
    if c:
        words += f" {'plus' if c > 0 else 'minus'} {abs(c)}"
        code = f"{c}+{code}" if style == "first" else f"{code}{c:+d}"
    return words, code


def _times(factor: int, name: str) -> str:
    return name if factor == 1 else f"{factor}*{name}"


def _number(value: int) -> str:
    return f"minus {-value}" if value < 0 else str(value)


@functools.lru_cache(maxsize=100_000)
def _table(text: str) -> np.ndarray | str:
    """Values on DOMAIN, or why there are none."""
    try:
        if len(text) > MAX_CHARACTERS:
            raise InvalidExpression(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
        tree = _parse(text)
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise InvalidExpression(f"more than {MAX_NODES} nodes")
        table = np.broadcast_to(_value(tree.body), len(DOMAIN)).copy()
        table.setflags(write=False)
        return table
    except InvalidExpression as error:
        return str(error)


def _parse(text: str) -> ast.Expression:
    with warnings.catch_warnings():  # Python warns of "2x" and the like
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InvalidExpression(f"no expression: {error}") from None


def evaluate(text: str) -> np.ndarray:
    """The values of an expression over x and y on DOMAIN, int64 [289].

    Whole numbers, x, y, + - *, unary minus, max and min of two, `a if b > c else d`. Raises InvalidExpression for
    anything else (names, attributes, calls, powers, comprehensions, ...), more than 120 characters or 60 nodes, and
    values beyond a million.
    """
    table = _table(text)
    if isinstance(table, str):
        raise InvalidExpression(table)
    return table


def _value(node: ast.expr) -> np.ndarray:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return _bounded(np.array(min(number, MAX_VALUE + 1)))
        case ast.Name(id="x"):
            return DOMAIN[:, 0]
        case ast.Name(id="y"):
            return DOMAIN[:, 1]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=[first, second], keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](_value(first), _value(second))
        case ast.IfExp(test=ast.Compare(left=left, ops=[op], comparators=[right]), body=body, orelse=other) if (
            type(op) in COMPARISONS
        ):
            return np.where(COMPARISONS[type(op)](_value(left), _value(right)), _value(body), _value(other))
    raise InvalidExpression(f"{type(node).__name__} is not allowed here")


def _bounded(values: np.ndarray) -> np.ndarray:
    if np.abs(values).max() > MAX_VALUE:
        raise InvalidExpression(f"a value beyond {MAX_VALUE}")
    return values


def result_of(text: str) -> str | None:
    """The expression of a finished answer; None without an end."""
    answer, end, _ = text.partition(END)
    return answer if end else None


def passes(problem: Problem, text: str, inputs: np.ndarray | None = None) -> bool:
    """Whether a finished answer has the described values on the inputs, indices into DOMAIN (None: on all of it)."""
    answer = result_of(text)
    table = _table(answer) if answer is not None else ""
    if isinstance(table, str):
        return False
    expected = evaluate(problem.result)
    return bool((table == expected).all() if inputs is None else (table[inputs] == expected[inputs]).all())


def verify(problem: Problem, text: str) -> bool:
    """Whether a finished answer computes the described function on the whole domain."""
    return passes(problem, text)


def behaviour(text: str) -> str | None:
    """A canonical name of what a finished answer computes (for votes); None if it computes nothing."""
    answer = result_of(text)
    table = _table(answer) if answer is not None else ""
    return None if isinstance(table, str) else str(hash(table.tobytes()))


def base_inputs(count: int, seed: int) -> np.ndarray:
    """Indices of `count` inputs as a hurried tester picks them: 0, 1, -1, 2 and x = y, in an order by the seed."""
    easy = [i for i, (x, y) in enumerate(DOMAIN) if (abs(x) <= 1 and abs(y) <= 1) or (x == y and abs(x) <= 3)]
    if not 1 <= count <= len(easy):
        raise ValueError(f"base tests number 1..{len(easy)}, not {count}")
    return np.array(Random(seed).sample(easy, count))


def constants_stand(text: str, where: str) -> bool | None:
    """Whether every constant that is added in a finished answer stands first or last in its sum, as `where` says.

    None for an answer that does not parse or adds no constant.
    """
    answer = result_of(text)
    try:
        tree = _parse(answer or "")
    except InvalidExpression:
        return None
    places = []
    inner = {id(n.left) for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add | ast.Sub)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and id(node) not in inner:
            terms: list[ast.expr] = []
            while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
                terms.append(node.right)
                node = node.left  # type: ignore[assignment]
            terms.append(node)
            terms = terms[::-1]
            numbers = [i for i, term in enumerate(terms) if not any(isinstance(n, ast.Name) for n in ast.walk(term))]
            places += [i == (0 if where == "first" else len(terms) - 1) for i in numbers]
    return all(places) if places else None

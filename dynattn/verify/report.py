"""What the oracle tells: a mismatch, in the words and letters of the operation."""

from inspect import signature
from typing import get_args

from dynattn.verify.cases import Case
from dynattn.verify.diagnosis import Diagnosis
from dynattn.verify.registry import OPERATIONS

WORDS = {
    "B": "image",
    "h": "head",
    "g": "group",
    "L": "query",
    "N": "key",
    "S": "source token",
    "K": "point",
    "C": "channel",
    "d": "channel",
    "H": "row",
    "W": "column",
    "I": "table row",
    "J": "table column",
    "R": "region",
    "Tq": "query",
    "Tk": "key",
}


class Mismatch(AssertionError):
    """A function that does not do what the operation does.

    case: the call that shows it, as simple as was found. where: "output" or "gradient of NAME". index: the first number
    that is wrong. error: by how much. mistakes: names of the catalogued mistakes that give the same answer in every
    case, usually one or none. diagnosis: these and what else explains the answer.
    """

    def __init__(self, case: Case, where: str, index: tuple[int, ...], error: float, what: str, diagnosis: Diagnosis):
        self.case, self.where, self.index, self.error = case, where, index, error
        self.diagnosis, self.mistakes = diagnosis, diagnosis.mistakes
        place = in_words(case, where, index)
        at = f"at [{', '.join(map(str, index))}]{place and f' ({place})'} " if index else ""
        lines = [f"{case.operation}: the {where} is wrong: {at}{what}", *explanation(diagnosis)]
        lines.append(f"in the case of {case}")
        if case.seed is not None:
            lines.append(f"again: {case.line}")
        super().__init__("\n  ".join(lines))


def explanation(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis in sentences."""
    if diagnosis.mistakes:
        return [f"this is what comes out with the mistake: {' or: '.join(diagnosis.mistakes)}"]
    if diagnosis.pairs:
        said = ["this is what comes out with two mistakes together: " + " or: ".join(map("; ".join, diagnosis.pairs))]
    elif diagnosis.here:
        said = [
            f"in this case, this is what comes out with the mistake: {' or: '.join(diagnosis.here)}",
            "in other cases something else is wrong too",
        ]
    else:
        said = ["no mistake of the catalogue gives this answer"]
    if diagnosis.right:
        said.append("it is right in all cases with: " + "; ".join(choice_in_words(*one) for one in diagnosis.right))
    return said


def choice_in_words(name: str, value: object) -> str:
    """A choice as, for example, "no table", "one group (g = 1)"."""
    if name == "layout":
        return f"{value} inputs"
    if value is None or value is False:
        return f"no {name}"
    if value == 1 and name in WORDS:
        return f"one {WORDS[name]} ({name} = 1)"
    return f"{name} = {value!r}"


def in_words(case: Case, where: str, index: tuple[int, ...]) -> str:
    """An index as, for example, "image 0, head 1, query 5 (row 1, column 2), channel 0"."""
    parts = [_part(case, where, letter, i) for letter, i in zip(_letters(case.operation, where), index, strict=False)]
    return ", ".join(parts)


def _letters(operation: str, where: str) -> list[str]:
    """The letters of a tensor's dimensions, from the operation's signature."""
    wanted = signature(OPERATIONS[operation].function)
    name = where.removeprefix("gradient of ")
    annotation = wanted.return_annotation if where == "output" else wanted.parameters[name].annotation
    shapes = (getattr(choice, "dim_str", None) for choice in (annotation, *get_args(annotation)))
    return next((shape.split() for shape in shapes if shape), [])


def _part(case: Case, where: str, letter: str, i: int) -> str:
    """One number of an index in words."""
    if letter == "2":
        return f"its {('row', 'column')[i]}"
    word = WORDS.get(letter, letter)
    if letter == "N" and "points" in case.arguments:  # the keys of these operations are what was read at the points
        word = "point"
    if letter == "S" and "routes" in case.arguments:
        word = "region"
    if letter == "L" and "query_shape" in case.arguments:
        row, column = divmod(i, case.arguments["query_shape"][1])
        word = "token" if where in ("gradient of k", "gradient of v") else word
        return f"{word} {i} (row {row}, column {column})"
    return f"{word} {i}"

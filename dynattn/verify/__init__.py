"""The equivalence oracle: does a function compute what the paper's loops compute, outputs and every gradient?

    from dynattn import verify
    verify.check("sample_points", my_function)

`check` runs the function and the loops on random cases. Where they part it looks for the simplest case in which they
do, and says at which number, and which mistake of the catalogue (`verify.mistakes`) gives the same wrong answer.
`register` teaches it another operation.
"""

from dynattn.verify import mistakes
from dynattn.verify.cases import Case, Draw, case
from dynattn.verify.checking import check, compare
from dynattn.verify.comparing import answer, answer_to
from dynattn.verify.registry import operations, register
from dynattn.verify.report import Mismatch

__all__ = [
    "Case",
    "Draw",
    "Mismatch",
    "answer",
    "answer_to",
    "case",
    "check",
    "compare",
    "mistakes",
    "operations",
    "register",
]

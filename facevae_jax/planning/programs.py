"""Reads the text of a compiled program (XLA's HLO): what one step sends, reads, writes and takes by its compiler."""

import math
import re
from collections import Counter
from typing import NamedTuple

EXCHANGES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Names of values, and the second half of something asynchronous: no work of their own.
NO_WORK = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "partition-id", "after-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str  # of a constant its value

    @property
    def cycles(self) -> int:
        """The TPU compiler's own estimate; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


class Program(NamedTuple):
    """A program by computation (function)."""

    computations: dict[str, list[Instruction]]
    entry: str

    @property
    def step(self) -> list[Instruction]:
        """One turn of the loop over steps: the longest loop that the entry starts."""
        bodies = [self.computations[_body(each)] for each in self.computations[self.entry] if each.op == "while"]
        return max(bodies, key=len)

    @property
    def shapes(self) -> dict[str, str]:
        """Of every value."""
        return {each.name: each.shape for lines in self.computations.values() for each in lines}


def parse(text: str) -> Program:
    """The program that `Compiled.as_text` prints."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", list[Instruction]()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, op, rest = found.groups()
            inside, attributes = _split_at_closing(rest)
            attributes = inside if op == "constant" else attributes
            lines.append(Instruction(name, shape, op, tuple(re.findall(r"%([\w.\-]+)", inside)), attributes))
    return Program(computations, entry)


def exchanges(program: Program) -> dict[str, tuple[int, int]]:
    """What a device sends in a step by kind: how often, and the bytes of the operands.

    Of an asynchronous exchange the start is counted, whose shape holds the result too: its operands are read instead.
    """
    times, sizes, shapes = Counter[str](), Counter[str](), program.shapes
    for each, _ in _unrolled(program, program.step):
        kind = each.op.removesuffix("-start")
        if kind in EXCHANGES:
            operands = each.operands[:1] if kind == "ragged-all-to-all" else each.operands
            times[kind] += 1
            sizes[kind] += sum(array_bytes(shapes[name]) for name in operands)
    return {kind: (times[kind], sizes[kind]) for kind in sorted(times)}


def launches(program: Program) -> int:
    """Kernels, library calls, copies and exchanges of a step on a GPU."""
    return sum(_works(each) for each, _ in _unrolled(program, program.step))


def traffic(program: Program, *, split: tuple[int, ...] = ()) -> int:
    """Bytes that a step reads and writes in a device's memory: operands and results, but those in a TPU's own (S(1)).

    The images are in an operand of the shape `split`, of which only some rows are read: it does not count. In a loop of
    n turns each reads or writes one row of an array [n, ...].
    """
    images = f"u8[{','.join(map(str, split))}]"
    total, shapes = 0, program.shapes
    for each, turns in _unrolled(program, program.step):
        if _works(each):
            arrays = [shapes.get(name, "") for name in each.operands] + [each.shape]
            found = [array_bytes(shape, outside=True, rows=turns) for shape in arrays if not shape.startswith(images)]
            total += sum(found)
    return total


def cycles(program: Program) -> tuple[int, int]:
    """The TPU compiler's estimates: of a step without its exchanges, and of what a dispatch does beside its steps."""
    step = sum(each.cycles for each, _ in _unrolled(program, program.step))
    return step, sum(each.cycles for each in program.computations[program.entry])


def array_bytes(shape: str, *, outside: bool = False, rows: int = 1) -> int:
    """Of the arrays in a shape, without padding.

    Args:
      shape: the text.
      outside: only of those in a device's main memory.
      rows: of an array that has so many, one is counted.
    """
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if not (outside and "S(1)" in layout):
            bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
            counted = [int(size) for size in sizes.split(",") if size]
            counted = counted[1:] if rows > 1 and counted[:1] == [rows] else counted
            total += math.prod(counted) * bits // 8
    return total


def _works(each: Instruction) -> bool:
    return each.op not in NO_WORK and not each.op.endswith(("-done", "-update"))


def _body(loop: Instruction) -> str:
    return re.search(r"body=%?([\w.\-]+)", loop.attributes)[1]  # type: ignore[index]


def _turns(program: Program, loop: Instruction) -> int:
    """Of a loop within a step, over the parts of a batch or the blocks of a network."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]  # type: ignore[index]
    limits = [each.attributes for each in program.computations[condition] if each.op == "constant"]
    return int(limits[0]) if len(limits) == 1 and limits[0].isdigit() else 1


def _unrolled(program: Program, lines: list[Instruction], turns: int = 1) -> list[tuple[Instruction, int]]:
    """With what calls, command buffers and loops hold in their place, and the turns of the loop that each is in."""
    found: list[tuple[Instruction, int]] = []
    for each in lines:
        called = re.search(r"to_apply=%?([\w.\-]+)", each.attributes) if each.op == "call" else None
        if called:
            found += _unrolled(program, program.computations[called[1]], turns)
        elif each.op == "while":
            inner = _turns(program, each)
            found += inner * _unrolled(program, program.computations[_body(each)], inner)
        else:
            found.append((each, turns))
    return found


def _split_at_closing(rest: str) -> tuple[str, str]:
    """What stands in the parentheses that are open at the start, and what follows."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""

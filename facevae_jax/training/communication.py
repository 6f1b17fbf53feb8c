"""What the devices send each other, read from the compiled program."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # other types name theirs: f32, u8, f8e4m3

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"= (?P<shapes>\(.*?\)|\S+) (?P<operation>[\w\-]+)\(")
_SHAPE = re.compile(r"(?P<type>[a-z]+\d*[a-z0-9]*)\[(?P<sizes>[\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|body|calls|branch_computations|called_computations)=\{?(%?[\w.\-]+(?:, *%?[\w.\-]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One exchange between the devices."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (type, sizes) of the arrays that each device has from it
    times: int  # in each turn of the loops whose length is not fixed, such as that over the steps

    @property
    def bytes(self) -> int:
        """Of the result on each device, each time."""
        return sum(math.prod(sizes) * _bits(kind) // 8 for kind, sizes in self.shapes)


def _bits(kind: str) -> int:
    number = re.search(r"\d+", kind)
    return BITS.get(kind) or int(number.group() if number else 8)


def collectives(program: str) -> list[Collective]:
    """Every exchange of a compiled program, given as `jax.stages.Compiled.as_text()`."""
    own: dict[str, list[tuple[str, str]]] = defaultdict(list)
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    entry = name = ""
    for line in program.splitlines():
        if computation := _COMPUTATION.match(line):
            name = computation["name"]
            entry = name if computation["entry"] else entry
        elif instruction := _INSTRUCTION.search(line):
            kind = instruction["operation"].removesuffix("-start")
            if kind in KINDS:
                own[name].append((kind, instruction["shapes"]))
                continue
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                for other in called.split(","):
                    calls[name].append((other.strip().lstrip("%"), int(trips.group(1)) if trips else 1))

    def within(name: str, times: int) -> list[Collective]:
        found = [
            Collective(
                kind,
                tuple((t, tuple(int(n) for n in sizes.split(",") if n)) for t, sizes in _SHAPE.findall(shapes)),
                times,
            )
            for kind, shapes in own[name]
        ]
        return found + [each for called, trips in calls[name] for each in within(called, times * trips)]

    return within(entry, 1)


def bytes_per_step(program: str) -> int:
    """Bytes that each device contributes to exchanges in one turn of the loop over the steps."""
    return sum(each.bytes * each.times for each in collectives(program))

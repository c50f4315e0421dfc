"""Reads the text of a compiled program (HLO): computations, loops and how often each runs.

The text is that of XLA's dumps after optimisation, one instruction a line. Only what the plan needs
is read; what the parser does not know it leaves unknown and never guesses.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

# Element sizes in bytes; types that are not listed (tokens, opaque) count as nothing.
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_TYPE = re.compile(r"\b(pred|[suc]\d+|bf16|f\d+\w*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      opcode: as XLA prints it.
      shape: type of the result, possibly a tuple.
      operands: names of operands in the same computation.
      argument: the text between the parentheses, for constants and parameters.
      attributes: what follows the operands.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses among."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return [name.strip().lstrip("%") for name in found.group(1).split(",")]
        names = (self.called("true_computation"), self.called("false_computation"))
        return [name for name in names if name is not None]

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate of one execution, where it makes one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        cycles = int(found.group(1)) if found else None
        return None if cycles == 2**63 - 1 else cycles  # the largest number stands for none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Under what circumstances a computation runs.

    Attributes:
      times: executions per run of the program, loops of unknown length counted once.
      unknown_loops: names of the loops of unknown length around it, outermost first.
      is_conditional: whether a branch that may not be taken leads to it.
    """

    times: int = 1
    unknown_loops: tuple[str, ...] = ()
    is_conditional: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop of the program.

    Attributes:
      name: of its instruction.
      op_name: see `Instruction`.
      trip_count: iterations, or None where the data decide.
      context: of the instruction.
    """

    name: str
    op_name: str
    trip_count: int | None
    context: Context


class Module:
    """A compiled program."""

    def __init__(self, text: str):
        """Parses a dump.

        Args:
          text: of one module.

        Raises:
          ValueError: it holds no module with an entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.header = ""
        self._read(text)
        if not self.entry:
            raise ValueError("the text has no ENTRY computation; is it the dump of an HLO module?")

    def _read(self, text: str) -> None:
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if line.startswith("HloModule"):
                self.header = line
            elif current is None or not line.startswith(" "):
                found = _HEADER.match(line)
                if found:
                    current = self.computations.setdefault(found.group(2), {})
                    if found.group(1):
                        self.entry = found.group(2)
            else:
                instruction = _instruction(line)
                if instruction is not None:
                    current[instruction.name] = instruction

    @property
    def num_aliased(self) -> int:
        """Results that are written into the buffer of a donated argument."""
        found = re.search(r"input_output_alias=\{(.*?)\}(?:, [a-z_]+=|$)", self.header)
        return len(re.findall(r"(?:may|must)-alias", found.group(1))) if found else 0

    def root(self, computation: str) -> Instruction:
        """The result of a computation."""
        return next(i for i in self.computations[computation].values() if i.is_root)

    def walk(self) -> Iterator[tuple[str, Instruction, Context]]:
        """Every instruction that is executed, with its computation and its context.

        A loop's condition counts as often as its body; of a conditional every branch is walked.
        """
        yield from self._walk(self.entry, Context())

    def _walk(self, name: str, context: Context) -> Iterator[tuple[str, Instruction, Context]]:
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, context
            for called, inner in self.calls(name, instruction, context):
                yield from self._walk(called, inner)

    def calls(
        self, computation: str, instruction: Instruction, context: Context
    ) -> list[tuple[str, Context]]:
        """The computations that an instruction runs, each with its context."""
        if instruction.opcode == "while":
            names = (instruction.called("condition"), instruction.called("body"))
            count = self.trip_count(computation, instruction)
            if count is None:
                loops = (*context.unknown_loops, instruction.name)
                inner = dataclasses.replace(context, unknown_loops=loops)
            else:
                inner = dataclasses.replace(context, times=context.times * count)
            return [(name, inner) for name in names if name]
        if instruction.opcode == "conditional":
            inner = dataclasses.replace(context, is_conditional=True)
            return [(name, inner) for name in instruction.branches]
        if instruction.opcode in ("fusion", "call", "async-start"):
            name = instruction.called("calls") or instruction.called("to_apply")
            return [(name, context)] if name else []
        return []

    def loops(self) -> list[Loop]:
        """All loops, in the order of the program, inner ones after the one around them."""
        return [
            Loop(
                name=i.name,
                op_name=i.op_name,
                trip_count=self.trip_count(computation, i),
                context=context,
            )
            for computation, i, context in self.walk()
            if i.opcode == "while"
        ]

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Iterations of a loop: as XLA notes them, or of a counter with constant bounds."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if noted:
            return int(noted.group(1))
        condition, body = loop.called("condition"), loop.called("body")
        if condition not in self.computations or body not in self.computations:
            return None
        test = self.root(condition)
        env: Mapping[str, _Value] = {}
        if test.opcode == "fusion" and (inner := test.called("calls")) in self.computations:
            env = self._arguments(condition, test, inner, {})
            condition, test = inner, self.root(inner)
        direction = re.search(r"direction=(\w+)", test.attributes)
        if test.opcode != "compare" or direction is None or direction.group(1) not in ("LT", "LE"):
            return None
        counter, bound = (self._value(condition, name, env) for name in test.operands)
        if counter is None or counter.element is None or bound is None:
            return None
        step = self._step(body, counter.element)
        start = self._start(computation, loop, counter.element)
        if bound.element is not None:
            is_fixed = self._step(body, bound.element) == 0
            first = self._start(computation, loop, bound.element) if is_fixed else None
            bound = None if first is None else _Value(number=first + bound.number)
        if not step or step < 0 or start is None or bound is None:
            return None
        last = bound.number - counter.number + (direction.group(1) == "LE")
        return max(-(-(last - start) // step), 0)

    def _start(self, computation: str, loop: Instruction, element: int) -> int | None:
        """What an element of a loop's state is at first, where that is a constant."""
        state = self.computations[computation].get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return None
        value = self._value(computation, state.operands[element], {})
        return value.number if value is not None and value.element is None else None

    def _step(self, body: str, element: int) -> int | None:
        """What a loop adds to an element of its state, where that is a constant."""
        result = self.root(body)
        if result.opcode != "tuple":
            return None
        value = self._value(body, result.operands[element], {})
        return value.number if value is not None and value.element == element else None

    def _arguments(self, computation, caller, called, env) -> dict[str, "_Value"]:
        """Values of a called computation's parameters, as far as they are known."""
        known = {}
        for parameter in self.computations[called].values():
            if parameter.opcode == "parameter":
                operand = caller.operands[int(parameter.argument)]
                value = self._value(computation, operand, env)
                if value is not None:
                    known[parameter.name] = value
        return known

    def _value(self, computation: str, name: str, env: Mapping[str, "_Value"]) -> "_Value | None":
        """A whole number as an element of the loop's state plus a constant."""
        if name in env:
            return env[name]
        i = self.computations[computation].get(name)
        if i is None:
            return None
        if i.opcode == "constant":
            is_whole = re.fullmatch(r"-?\d+", i.argument)
            return _Value(number=int(i.argument)) if is_whole else None
        if i.opcode == "get-tuple-element":
            source = self.computations[computation].get(i.operands[0])
            index = re.search(r"index=(\d+)", i.attributes)
            if source is None or index is None:
                return None
            if source.opcode == "tuple":
                return self._value(computation, source.operands[int(index.group(1))], env)
            is_state = source.opcode == "parameter"
            return _Value(element=int(index.group(1)), number=0) if is_state else None
        if i.opcode in ("copy", "bitcast", "reshape", "copy-done", "copy-start"):
            return self._value(computation, i.operands[0], env)
        if i.opcode == "add":
            one, other = (self._value(computation, operand, env) for operand in i.operands)
            if one is None or other is None or None not in (one.element, other.element):
                return None
            element = one.element if other.element is None else other.element
            return _Value(element=element, number=one.number + other.number)
        if i.opcode == "fusion" and (called := i.called("calls")) in self.computations:
            inner = self._arguments(computation, i, called, env)
            return self._value(called, self.root(called).name, inner)
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Value:
    """`number`, added to element `element` of a loop's state if there is one."""

    number: int
    element: int | None = None


def array_bytes(shape: str) -> int:
    """Bytes of an array's elements, or of all arrays of a tuple; padding by tiles left out."""
    total = 0
    for kind, sizes in _TYPE.findall(shape):
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size.removeprefix("<="))
        bits = _BITS.get(kind) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind))
        total += -(-elements * bits // 8)
    return total


def estimated_cycles(module: Module) -> tuple[int, int]:
    """The compiler's cycles of a run, loops of unknown length counted once.

    Returns:
      With the cheapest branch of every conditional, and with the dearest.
    """

    def of(name: str, context: Context) -> tuple[int, int]:
        low = high = 0
        for i in module.computations.get(name, {}).values():
            own = context.times * (i.estimated_cycles or 0)
            low, high = low + own, high + own
            # A fusion's own figure covers what it runs.
            if i.opcode == "fusion":
                continue
            inner = [of(*call) for call in module.calls(name, i, context)]
            if inner and i.opcode == "conditional":
                low, high = low + min(x for x, _ in inner), high + max(x for _, x in inner)
            else:
                low, high = low + sum(x for x, _ in inner), high + sum(x for _, x in inner)
        return low, high

    return of(module.entry, Context())


def _instruction(line: str) -> Instruction | None:
    line = re.sub(r"/\*.*?\*/", "", line.strip())
    found = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    end = _closing(rest, start)
    argument = rest[start + 1 : end]
    return Instruction(
        name=found.group(2),
        opcode=rest[:start],
        shape=shape,
        operands=tuple(_NAMED.findall(argument)),
        argument=argument.strip(),
        attributes=rest[end + 1 :],
        is_root=found.group(1) is not None,
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    return len(text) - 1

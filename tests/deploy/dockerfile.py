"""Reads a Dockerfile into stages of instructions. Pure; knows as much grammar as ours uses."""

import shlex
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value as a shell would split it."""
        return shlex.split(self.value)


@dataclass(slots=True)
class Stage:
    """What follows one FROM."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        """The stage's instructions of a kind."""
        return [instruction for instruction in self.instructions if instruction.name == name]


def parse(text: str) -> list[Stage]:
    """Return the stages, in order.

    Raises:
        ValueError: an instruction stands before the first FROM.
    """
    stages: list[Stage] = []
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, value = line.strip().partition(" ")
        if not name:
            continue
        if name == "FROM":
            base, _, stage = value.partition(" AS ")
            stages.append(Stage(stage, base))
        elif stages:
            stages[-1].instructions.append(Instruction(name, value.strip()))
        else:
            raise ValueError(f"{name} before FROM")
    return stages

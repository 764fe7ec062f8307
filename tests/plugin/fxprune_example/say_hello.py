"""A pass, for --pipeline: a frozen dataclass with one method; its fields are its options."""

from dataclasses import dataclass

from fxprune.extend import Analysis, Program


@dataclass(frozen=True)
class SayHello(Analysis):
    """Leave a note in the report."""

    to: str = "world"

    def run(self, program: Program) -> Program:
        return program.but(notes=(*program.notes, f"hello, {self.to}"))

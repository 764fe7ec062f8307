"""A captured program goes to the device that the run works on."""

from __future__ import annotations

from ..data.memory import give_back, ran_out
from ..errors import FxpruneError
from ..ir.placement import place
from ..ir.program import Program
from ..process.events import Transcript
from ..request.device import AUTO, read_device


def place_on(tell: Transcript, program: Program, wanted: str) -> Program:
    """The program where ``wanted`` says (see :func:`read_device`). What ``auto`` finds no room for stays where it is.

    Raises FxpruneError where a device that was named has no room for it.
    """
    device = read_device(wanted)
    if device is None or (wanted == AUTO and program.device.type != "cpu"):
        return program
    try:
        return place(program, device)
    except Exception as error:
        if not ran_out(error):
            raise
        if wanted != AUTO:
            raise FxpruneError(
                "the model does not fit the device",
                where=f"--device {wanted}",
                why=(str(error).splitlines() or [type(error).__name__])[0][:200],
                cure="free its memory, or take `--device cpu`",
            ) from error
    give_back()
    tell.warn(f"the model does not fit {device}: it is scored and repaired on the CPU")
    return program

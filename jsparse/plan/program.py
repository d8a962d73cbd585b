"""What a run would take on devices this machine does not have: bytes per device, FLOPs per step."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jsparse.plan.compile_only import bytes_a_device, compile_for, is_out_of_memory, kernel_calls, memory_of
from jsparse.plan.flops import StepFlops
from jsparse.plan.memory_fraction import DEFAULT_MEMORY_FRACTION as DEFAULT_MEMORY_FRACTION
from jsparse.plan.memory_fraction import LARGEST_MEMORY_FRACTION
from jsparse.plan.memory_fraction import check_memory_fraction as check_memory_fraction


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One compiled program: bytes per device.

    - name: of the program.
    - arguments: bytes by what they are.
    - results: bytes that are not written over arguments.
    - temporary: bytes as the compiler lays them out.
    - beside: bytes that the run keeps on the device but this program does not touch.
    - kernel_calls: how many calls of Hopper kernels there are; with the XLA implementation 0.
    - compile_seconds: how long it took to compile.
    - refusal: the compiler's message if it found no room. The sizes that it did not report are then 0.
    """

    name: str
    arguments: dict[str, int]
    results: int
    temporary: int
    beside: int
    kernel_calls: int
    compile_seconds: float
    refusal: str | None = None

    @property
    def peak(self) -> int:
        """The most that a device holds while the program runs."""
        return sum(self.arguments.values()) + self.results + self.temporary + self.beside


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes, and whether it fits.

    It fits if every program's peak is within ``memory_fraction`` of ``memory_bytes``. JAX takes that much for
    arrays if a run starts with XLA_CLIENT_MEM_FRACTION set to this value; the default is 0.75.

    - run, settings: what was asked for.
    - device: its name.
    - mesh: the size of each axis.
    - memory_bytes: of one device.
    - memory_fraction: the part of it that is for arrays.
    - programs: what was compiled.
    - flops: of a step, on all devices together.
    """

    run: str
    settings: dict[str, Any]
    device: str
    mesh: dict[str, int]
    memory_bytes: int
    memory_fraction: float | int
    programs: tuple[ProgramPlan, ...]
    flops: StepFlops | None = None

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.memory_fraction)

    @property
    def peak(self) -> int:
        return max(program.peak for program in self.programs)

    @property
    def refused(self) -> bool:
        """Whether the compiler itself found no room."""
        return any(program.refusal is not None for program in self.programs)

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak <= self.usable_bytes

    @property
    def needed_fraction(self) -> float:
        """The smallest XLA_CLIENT_MEM_FRACTION that suffices, rounded up to hundredths; above 1 none does."""
        return math.ceil(100 * self.peak / self.memory_bytes) / 100

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them, for ``json.dumps``. Sizes are in bytes."""
        programs = [dataclasses.asdict(program) | {"peak": program.peak} for program in self.programs]
        derived = {
            "programs": programs,
            "flops": None if self.flops is None else self.flops.to_json(),
            "devices": self.devices,
            "usable_bytes": self.usable_bytes,
            "peak": self.peak,
            "fits": self.fits,
            "needed_fraction": None if self.refused else self.needed_fraction,
        }
        return dataclasses.asdict(self) | derived


class Program(NamedTuple):
    """A jitted ``call`` and abstract arguments for it: ``call(*shapes, **static)``.

    - name: of the program.
    - call: the jitted function.
    - shapes: its arguments, with shardings.
    - parts: the same arguments by what they are, as trees that together hold each array once.
    - static: its static arguments.
    - beside: a tree of what stays on the devices meanwhile.
    """

    name: str
    call: Any
    shapes: tuple[Any, ...]
    parts: Mapping[str, Any]
    static: Mapping[str, Any] = {}
    beside: Any = ()


def plan_program(program: Program, mesh: Mesh) -> ProgramPlan:
    """Compile a program for a mesh of compile-only devices and say what it takes on each.

    Raises RuntimeError if it does not compile (but lack of memory is not an error: the plan reports it), and
    if the compiler counts more arguments than ``parts`` hold.
    """
    sizes = {part: bytes_a_device(tree) for part, tree in program.parts.items()}
    beside = bytes_a_device(program.beside)
    try:
        compiled, seconds = compile_for(mesh, program.call, *program.shapes, **program.static)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return ProgramPlan(program.name, sizes, 0, 0, beside, 0, 0.0, refusal=str(error))
    memory = memory_of(compiled)
    # A program does not count arguments that it does not read, though they stay where they are. Each array is
    # rounded up a little.
    if memory.arguments > sum(sizes.values()) + 256 * len(jax.tree.leaves(program.shapes)):
        raise RuntimeError(
            f"{program.name}: the compiler counts {memory.arguments} bytes of arguments, "
            f"but the named ones are {sizes}"
        )
    return ProgramPlan(
        program.name, sizes, memory.results, memory.temporary, beside, kernel_calls(compiled), seconds
    )


# --- for people ---


@contextlib.contextmanager
def compiler_errors_explained() -> Iterator[None]:
    """Turns a RuntimeError of the compiler into a NotImplementedError, which the command line reports."""
    try:
        yield
    except RuntimeError as error:
        message = f"the program does not compile, and nothing is estimated: {error}"
        raise NotImplementedError(message) from error


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what a run takes and whether it fits."""
    console = console or Console()
    split = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    where = f"{plan.devices} x {plan.device}" + (f" ({split})" if split else "")
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    console.print(f"[bold]{plan.run}[/bold] on {where}: {settings}", highlight=False)
    console.print(_memory_table(plan))
    if plan.flops is not None:
        console.print(_flops_table(plan.flops))
    for line in _verdict(plan):
        console.print(line, highlight=False)


def _memory_table(plan: Plan) -> Table:
    table = Table(title="GB per device", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for program in plan.programs:
        table.add_column(program.name, justify="right")
    for part in dict.fromkeys(part for program in plan.programs for part in program.arguments):
        sizes = (program.arguments.get(part) for program in plan.programs)
        table.add_row(part, *("-" if size is None else f"{size / 1e9:.2f}" for size in sizes))
    for row in ("results", "temporary", "beside", "peak"):
        known = ((getattr(program, row), program.refusal is None) for program in plan.programs)
        table.add_row(row, *(f"{size / 1e9:.2f}" if is_known else "?" for size, is_known in known))
    table.add_section()
    table.add_row("calls of Hopper kernels", *(f"{program.kernel_calls}" for program in plan.programs))
    table.add_row("seconds to compile", *(f"{program.compile_seconds:.0f}" for program in plan.programs))
    return table


def _flops_table(flops: StepFlops) -> Table:
    table = Table(title="TFLOP per step, all devices together", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("part")
    for column in ("forward", "backward", "computed again", "all"):
        table.add_column(column, justify="right")
    for name, passes in flops.parts().items():
        numbers = (passes.forward, passes.backward, passes.again, passes.total)
        table.add_row(name, *(f"{number / 1e12:,.3f}" for number in numbers))
    table.add_section()
    table.add_row("all", "", "", "", f"{flops.total / 1e12:,.3f}")
    table.add_row("with causal attention", "", "", "", f"{flops.total_with_causal / 1e12:,.3f}")
    return table


def _verdict(plan: Plan) -> list[str]:
    usable = (
        f"{plan.usable_bytes / 1e9:.1f} GB ({plan.memory_fraction:g} of {plan.memory_bytes / 1e9:.1f} GB)"
    )
    lines = []
    if plan.flops is not None:
        lines.append(f"Sparse attention saves {plan.flops.saved:.1%} of the FLOPs of a step.")
    if plan.refused:
        return [*lines, "[bold]Does not fit[/bold]: the compiler found no room."]
    peak = f"{plan.peak / 1e9:.2f} GB"
    if plan.fits:
        lines.append(f"[bold]Fits[/bold]: {peak} of {usable}.")
        if plan.memory_fraction > DEFAULT_MEMORY_FRACTION and plan.needed_fraction > DEFAULT_MEMORY_FRACTION:
            lines.append(
                f"Run it with XLA_CLIENT_MEM_FRACTION={plan.memory_fraction:g}: JAX takes "
                f"{DEFAULT_MEMORY_FRACTION:g} otherwise."
            )
        return lines
    lines.append(f"[bold]Does not fit[/bold]: {peak}, and there are {usable}.")
    if plan.needed_fraction <= LARGEST_MEMORY_FRACTION:
        lines.append(f"With XLA_CLIENT_MEM_FRACTION={plan.needed_fraction:g} or more it would.")
    return lines

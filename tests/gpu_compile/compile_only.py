"""Compile for GPUs on a machine that has none, and read what ptxas says of the kernels."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxlib.mlir import ir

from jsparse.extras import MissingExtra
from jsparse.models.sharding import MeshConfig
from jsparse.plan.compile_only import (
    DEVICES,
    compile_only_devices,
    lower_for,
    prepare_process,
    require_compiler,
)

prepare_process()
try:
    require_compiler()
except (NotImplementedError, MissingExtra) as error:
    raise SystemExit(str(error)) from error
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"


def mesh_of(device: str = "h200", **axes: int) -> Mesh:
    """A mesh of compile-only devices on one host. ``jax.set_mesh`` of it is all that a program needs."""
    config = MeshConfig(**axes)
    return config.make(compile_only_devices(DEVICES[device], config.devices))


class Kernel(NamedTuple):
    """A Mosaic kernel as it is handed to the compiler."""

    hash: bytes  # of its whole source: kernels of one hash are compiled once in a process
    shared_memory: int  # bytes that it asks for at launch


class Report(NamedTuple):
    """What ptxas says of one kernel, in bytes but for the registers (a thread's, at launch)."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


class Compiled(NamedTuple):
    """``kernels``: the different ones of the program; ``reports``: on those that are new, in any order."""

    program: Any  # a jax.stages.Compiled
    kernels: tuple[Kernel, ...]
    reports: tuple[Report, ...]
    warnings: tuple[str, ...]  # all that ptxas prints beside its reports
    seconds: float


_compiled_before: set[bytes] = set()


def compile_for(mesh: Mesh, fn: Any, *shapes: Any, **static: Any) -> Compiled:
    """Compile a jitted ``fn`` for the mesh, down to machine code; the shapes carry shardings on that mesh.

    Raises RuntimeError unless ptxas reported on each new kernel of the program.
    """
    began = time.perf_counter()
    lowered = lower_for(mesh, fn, *shapes, **static)
    module = lowered.compiler_ir()
    assert module is not None
    kernels = mosaic_kernels(module)
    program, printed = _with_output(lowered.compile)
    reports, warnings = parse_ptxas(printed)
    new = {kernel.hash for kernel in kernels} - _compiled_before
    _compiled_before.update(new)
    if len(reports) != len(new):
        raise RuntimeError(f"ptxas reported on {len(reports)} kernels of {len(new)} that are new:\n{printed}")
    return Compiled(program, kernels, reports, warnings, time.perf_counter() - began)


def mosaic_kernels(module: ir.Module) -> tuple[Kernel, ...]:
    """The different Mosaic kernels that a lowered program calls.

    A call holds its kernel as MLIR in stable_mosaic_gpu, whose launch takes a token, three grid sizes, three
    block sizes, and then the bytes of dynamic shared memory.
    """
    found = {}

    def visit(op):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            key = ir.StringAttr(config["kernel_hash"]).value_bytes
            if key not in found:
                source = ir.StringAttr(config["module"]).value_bytes
                found[key] = Kernel(key, _shared_memory(source, module.context))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return tuple(found.values())


def _shared_memory(source: bytes, context: ir.Context) -> int:
    sizes = []

    def visit(op):
        if op.name == "stable_mosaic_gpu.gpu.launch":
            sizes.append(ir.IntegerAttr(op.operands[7].owner.attributes["value"]).value)
        return ir.WalkResult.ADVANCE

    # Serialization renames every operation to a dialect that nobody registers.
    unregistered, context.allow_unregistered_dialects = context.allow_unregistered_dialects, True
    ir.Module.parse(source, context=context).operation.walk(visit)
    context.allow_unregistered_dialects = unregistered
    (size,) = sizes
    return size


_ENTRY = re.compile(r"Compiling entry function '\w+' for 'sm_90a'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_HARMLESS = re.compile(r"bytes gmem|Function properties for|Compile time =")


def parse_ptxas(printed: str) -> tuple[tuple[Report, ...], tuple[str, ...]]:
    """The reports in what ptxas printed, and every line that belongs to none.

    >>> reports, warnings = parse_ptxas('''ptxas info    : 0 bytes gmem
    ... ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
    ... ptxas info    : Function properties for kernel
    ...     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
    ... ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
    ... ptxas info    : (C7510) Potential Performance Loss''')
    >>> reports, len(warnings)
    ((Report(registers=168, stack=16, spill_stores=8, spill_loads=4),), 1)
    """
    reports, warnings = [], []
    lines = iter(printed.splitlines())
    memory = [0, 0, 0]
    for line in lines:
        if _ENTRY.search(line):
            memory = [0, 0, 0]
        elif match := _MEMORY.search(line):  # an entry's own, or that of a function it calls
            memory = [a + int(b) for a, b in zip(memory, match.groups(), strict=True)]
        elif match := _REGISTERS.search(line):
            reports.append(Report(int(match[1]), *memory))
        elif line.strip() and not _HARMLESS.search(line):
            warnings.append(line.strip())
    return tuple(reports), tuple(warnings)


def _with_output(call: Callable[[], Any]) -> tuple[Any, str]:
    """What ``call`` returns, and what it printed below Python: the compiler writes to the file descriptor."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            result = call()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            printed = file.read().decode(errors="replace")
        return result, printed

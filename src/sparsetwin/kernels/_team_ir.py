"""The IR of a walk: several threads take the pieces of a chain of kernels from one table, in order, without Python.

A thread takes the next piece by adding one to a counter, and runs it when as many pieces are done as it needs: those of
all kernels before its own. Whoever comes late takes what is left, and who comes too late takes nothing.
"""

from dataclasses import dataclass
from enum import IntEnum

from sparsetwin.kernels._target import Target

PAUSES = 4096  # looks at the counter before a waiting thread offers its processor to others
YIELDS = 256  # offers before it sleeps between looks
_NAP = 50  # microseconds
_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}


@dataclass(frozen=True, kw_only=True)
class WalkSpecification:
    """A walk on a target; a wait pauses by its instruction, and is a plain loop where none is known."""

    target: Target


class Walk(IntEnum):
    """The table of one call: 64-bit integers and addresses. The two counters have cache lines of their own."""

    TAKEN = 0  # pieces so far
    STEPS = 16  # the address of the pieces, each a row as `Step` says, and one row behind them
    COUNT = 17
    YIELD = 18  # address of ``int sched_yield(void)``, 0 where there is none
    SLEEP = 19  # address of ``int usleep(unsigned)``, 0 where there is none
    DONE = 32  # pieces so far
    LENGTH = 48


class Step(IntEnum):
    """A row of the table of pieces. The row behind the last piece needs all of them."""

    KERNEL = 0  # the function's address
    TABLE = 1  # the address of its table of arguments
    RANGES = 2  # its four other arguments
    NEEDED = 6  # pieces that must be done before
    LENGTH = 7


def walk_ir(spec: WalkSpecification) -> str:
    """Return the LLVM IR of ``void kernel(table, whether to wait for the last piece, unused, unused, unused)``."""
    architectures = spec.target.architectures
    declaration, pause = _PAUSE[architectures[0]] if architectures and architectures[0] in _PAUSE else ("", "")
    row = 8 * Step.LENGTH
    loads = "\n".join(_load(f"range{which}", "i64", "%row", 8 * (Step.RANGES + which)) for which in range(4))
    ranges = ", ".join(f"i64 %range{which}" for which in range(4))
    return f"""
{declaration}

define void @kernel(ptr %table, i64 %stay, i64 %a, i64 %b, i64 %c) nounwind {{
entry:
  %done = getelementptr i8, ptr %table, i64 {8 * Walk.DONE}
{_load("steps", "ptr", "%table", 8 * Walk.STEPS)}
{_load("count", "i64", "%table", 8 * Walk.COUNT)}
{_load("offer", "ptr", "%table", 8 * Walk.YIELD)}
{_load("nap", "ptr", "%table", 8 * Walk.SLEEP)}
  %stays = icmp ne i64 %stay, 0
  %offers = icmp ne ptr %offer, null
  %naps = icmp ne ptr %nap, null
  br label %take
take:
  %ticket = atomicrmw add ptr %table, i64 1 monotonic
  %more = icmp slt i64 %ticket, %count
  %waits = or i1 %more, %stays
  br i1 %waits, label %found, label %end
found:
  %index = select i1 %more, i64 %ticket, i64 %count
  %place = mul i64 %index, {row}
  %row = getelementptr i8, ptr %steps, i64 %place
{_load("needed", "i64", "%row", 8 * Step.NEEDED)}
  br label %look
look:
  %looks = phi i64 [ 0, %found ], [ %looked, %paused ]
  %seen = load atomic i64, ptr %done acquire, align 8
  %ready = icmp sge i64 %seen, %needed
  br i1 %ready, label %ready_to_run, label %pause
pause:
  {pause}
  %looked = add i64 %looks, 1
  %long = icmp sgt i64 %looks, {PAUSES}
  %gives = and i1 %long, %offers
  br i1 %gives, label %give, label %paused
give:
  %longer = icmp sgt i64 %looks, {PAUSES + YIELDS}
  %sleeps = and i1 %longer, %naps
  br i1 %sleeps, label %sleep, label %yield
sleep:
  %slept = call i32 %nap(i32 {_NAP})
  br label %paused
yield:
  %yielded = call i32 %offer()
  br label %paused
paused:
  br label %look
ready_to_run:
  br i1 %more, label %run, label %end
run:
{_load("kernel", "ptr", "%row", 8 * Step.KERNEL)}
{_load("arguments", "ptr", "%row", 8 * Step.TABLE)}
{loads}
  call void %kernel(ptr %arguments, {ranges})
  %before = atomicrmw add ptr %done, i64 1 release
  br label %take
end:
  ret void
}}
"""


def _load(name: str, kind: str, base: str, offset: int) -> str:
    return (
        f"  %{name}_at = getelementptr i8, ptr {base}, i64 {offset}\n  %{name} = load {kind}, ptr %{name}_at, align 8"
    )

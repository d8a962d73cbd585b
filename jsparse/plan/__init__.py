"""Whether a program fits on devices this machine does not have: memory by compiling, FLOPs by counting."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.plan.program import DEFAULT_MEMORY_FRACTION as DEFAULT_MEMORY_FRACTION
    from jsparse.plan.program import Plan as Plan
    from jsparse.plan.program import Program as Program
    from jsparse.plan.program import check_memory_fraction as check_memory_fraction
    from jsparse.plan.program import plan_program as plan_program
    from jsparse.plan.program import print_plan as print_plan
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)

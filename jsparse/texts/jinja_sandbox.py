"""Jinja as chat templates use it, in a sandbox.

A template can reach no file, process, network or Python internals. It gets plain data. The sandbox of jinja2
refuses attributes that begin with an underscore and methods that change a value, and of strings, numbers,
lists and mappings only the methods in `METHODS` can be called. Filters that pad, wrap or repeat text, and
that no chat template needs, do not exist here. `_Instrument` and `Sandbox` see to it that everything is
counted: see `jinja_limits`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from jsparse.texts.control_tokens import GENERATION_END, GENERATION_START, remove_marks
from jsparse.texts.jinja_limits import (
    FILTERS_WITH_LIMITS,
    Budget,
    Formatter,
    LimitExceeded,
    add,
    concatenate,
    counted,
    current_budget,
    join_strings,
    modulo,
    multiply,
    power,
    replace,
    short_argument,
    size,
    text_of,
)

MAX_SOURCE = 64 * 1024  # characters of a template; the longest known has about 30,000

_STR = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier "
    "islower isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix "
    "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_SLOW = frozenset("lstrip rfind rindex rpartition rsplit rstrip strip".split())  # for long arguments
# Those of a string that are bounded one by one are not here: see Sandbox._method.
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR.split()),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    range: frozenset({"count", "index", "start", "step", "stop"}),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    bytes: frozenset(),
}


# Globals


class _Namespace(Namespace):
    """As jinja2's, but no name begins with an underscore, and its text does not show what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be the name of a value, as in jinja2
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            _Namespace.__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def raise_exception(message: Any) -> None:
    raise TemplateError(text_of(message))


def strftime_now(format: str) -> str:
    if len(format) > 256:
        raise LimitExceeded("strftime_now takes at most 256 characters")
    if any("\ud800" <= character <= "\udfff" for character in format):
        raise LimitExceeded("strftime_now: the format has a control token of a message")
    return datetime.now().strftime(format)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


# The environment


class Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: what the assistant writes, marked in what is rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class _Instrument(NodeTransformer):
    """Puts a count where jinja2 would build or repeat something without asking the environment."""

    def _counted(self, node: Any, how: str) -> Any:
        return nodes.Filter(node, how, [], [], None, None).set_lineno(node.lineno)

    def _repeated(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        step = self._counted(nodes.Const(None).set_lineno(node.lineno), "count step")
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _repeated

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._counted(nodes.Tuple(node.nodes, "load").set_lineno(node.lineno), "count concatenation")

    def _built(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._counted(node, "count value")

    visit_List = visit_Dict = visit_Tuple = _built

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._counted(node, "count value") if isinstance(node.arg, nodes.Slice) else node


@jinja2.pass_context  # so that jinja2 does not fold constants while it compiles
def _output(context: Context, value: Any) -> str:
    return text_of(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of all chat templates."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(concatenate)  # what a macro, a call or a `set` block gives

    def __init__(self) -> None:
        extensions = [Generation, "jinja2.ext.loopcontrols"]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_output, extensions=extensions
        )
        self.binop_table |= {"+": add, "*": multiply, "**": power, "%": modulo}
        self.filters = FILTERS_WITH_LIMITS | {
            # The spaces keep templates from naming them.
            "count step": lambda value: current_budget.get().step(),
            "count value": lambda value: current_budget.get().keep(value),
            "count concatenation": concatenate,
        }
        self.tests = {name: counted(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": make_dict,
            "namespace": _Namespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) is _Namespace:  # `isinstance` asks it, slowly, for its class
            return not attr.startswith("_")
        for kind, allowed in METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("_"):  # jinja2 complains only once it is used
            raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} cannot be reached")
        return super().unsafe_undefined(obj, attribute)

    def _method(self, obj: Any, name: Any) -> Callable[..., str] | None:
        """One of the methods of a string that can give far more than it is given, with a count."""
        if not isinstance(obj, str) or name not in ("join", "replace", "format", "format_map"):
            return None
        if isinstance(obj, Markup):
            raise SecurityError(
                f"the method {name!r} of a text that `safe` or `escape` gave cannot be called"
            )
        if name == "format":
            return lambda *args, **kwargs: Formatter(self).vformat(obj, args, kwargs)
        if name == "format_map":
            return lambda mapping: Formatter(self).vformat(obj, (), mapping)
        method = join_strings if name == "join" else replace
        return lambda *args, **kwargs: method(obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._method(obj, attribute) or _bounded(obj, attribute, super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._method(obj, argument) or _bounded(obj, argument, super().getitem(obj, argument))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.step()
        return budget.keep(super().call(context, obj, *args, **kwargs))


def _bounded(obj: Any, name: Any, value: Any) -> Any:
    return short_argument(value) if isinstance(obj, str) and name in _SLOW and callable(value) else value


_SANDBOX = Sandbox()


@dataclass(frozen=True)
class CompiledTemplate:
    """A template, and the file that it comes from, for messages."""

    file: str
    source: str
    has_generation: bool  # whether it marks what the assistant writes
    template: jinja2.Template

    def render(self, variables: Mapping[str, Any]) -> str:
        """What the template gives for plain data. Whatever it raises becomes a ValueError of one line."""
        budget = Budget(size(dict(variables), 2**62))
        token = current_budget.set(budget)
        try:
            pieces = []
            # Not template.render: it rewrites tracebacks, which executes code.
            for piece in self.template.root_render_func(self.template.new_context(dict(variables))):
                budget.spend(len(piece))
                pieces.append(piece)
            return "".join(pieces)
        except Exception as error:  # a template can raise anything
            kind = "" if isinstance(error, TemplateError | LimitExceeded) else f"{type(error).__name__}: "
            raise ValueError(f"{self.file}: {kind}{' '.join(remove_marks(str(error)).split())}") from error
        finally:
            current_budget.reset(token)


def compile_template(source: str, file: str) -> CompiledTemplate:
    """The template of a source, for any number of renderings.

    - source: the template.
    - file: where it comes from, for messages.

    Raises ValueError for a source that is too long or not a template, with the line.
    """
    if len(source) > MAX_SOURCE:
        raise ValueError(f"{file} has a template of more than {MAX_SOURCE} characters")
    try:
        tree = _SANDBOX.parse(source)
        calls = [block.call.node for block in tree.find_all(nodes.CallBlock)]
        has_generation = any(isinstance(call, nodes.ExtensionAttribute) for call in calls)
        code = _SANDBOX.compile(_Instrument().visit(tree).set_environment(_SANDBOX))
        template = jinja2.Template.from_code(_SANDBOX, code, _SANDBOX.make_globals(None))
    except TemplateSyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno} of the template: {error.message}") from error
    except Exception as error:  # such as nesting that Python cannot compile
        raise ValueError(
            f"{file} cannot be compiled: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return CompiledTemplate(file, source, has_generation, template)

"""Chat messages to prompt text and token ids, by the checkpoint's jinja template.

Neither side is trusted. A template comes with a checkpoint, so it runs in jinja's sandbox and on a
budget of work. Message text comes from users, so it cannot turn into control tokens.
"""

import contextvars
import datetime
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes

from llada_jax.data import tokenizer as tokenizer_lib

Message = Mapping[str, Any]
_T = TypeVar("_T")

ROLES = ("system", "user", "assistant", "tool")

# The family's plain chat, without tools, for a checkpoint that came without a template. It is never
# taken by itself: the caller asks for it.
DEFAULT_TEMPLATE = """
{%- if tools -%}
  {{- raise_exception('the default chat template has no form for tools') -}}
{%- endif -%}
{%- set names = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} -%}
{{- '<role>SYSTEM</role>' -}}
{%- if messages[0].role == 'system' -%}
  {{- messages[0].content + '\n' -}}
{%- endif -%}
{{- 'detailed thinking off<|role_end|>' -}}
{%- for message in messages -%}
  {%- if message.tool_calls or message.role not in names -%}
    {{- raise_exception('the default chat template has no form for tools') -}}
  {%- endif -%}
  {%- if not (loop.first and message.role == 'system') -%}
    {{- '<role>' + names[message.role] + '</role>' + message.content + '<|role_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<role>ASSISTANT</role>' -}}
{%- endif -%}
"""

# What one rendering may cost: characters and items made on the way to the text, and time. A chat
# of 600,000 characters, about 128k tokens, takes a thirtieth of it.
MAX_WORK = 50_000_000
MAX_SECONDS = 5.0
MAX_SOURCE_CHARACTERS = 500_000
MAX_RANGE = 10_000
MAX_INDENT = 16
MAX_DEPTH = 64

# Filters whose work is in proportion to what goes in. Left out are those that a number can make
# expensive (`center`, `format`, `round`, `batch`, ...) and those no prompt needs.
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby indent int items join "
    "last length list lower map max min reject rejectattr replace reverse safe select selectattr "
    "sort string sum title trim truncate unique upper urlencode"
)
_GLOBALS = ("dict", "namespace", "cycler", "joiner")
_COSTLY_STRING_METHODS = frozenset(
    ["center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"]
)


class ChatTemplate:
    """A chat template, compiled in a sandbox.

    It offers what the templates of published checkpoints use: jinja2 with `trim_blocks`,
    `lstrip_blocks`, loop controls and `{% generation %}`, and the functions `raise_exception`,
    `strftime_now` and a `tojson` that escapes nothing for HTML.

    Raises:
        ValueError: the source is no jinja template, or too long.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compiles a template.

        Args:
            source: the template.
            special_tokens: what the template sees as `bos_token`, `eos_token`, ...
        """
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ValueError(
                f"the chat template has {len(source)} characters, at most {MAX_SOURCE_CHARACTERS} "
                "are allowed; is this a chat template?"
            )
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._template = _on_a_budget(lambda: _compile(source))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Returns the text of a chat.

        Args:
            messages: `{"role": ..., "content": ...}` each, oldest first.
            tools: function descriptions, as JSON data.
            add_generation_prompt: whether the text ends where the assistant's answer starts.
            **extra: more variables of the template, as JSON data.

        Raises:
            ValueError: a message is malformed (its index is named), or the template refuses the
                chat, fails, leaves its sandbox or exceeds its budget.
        """
        variables = {
            **_json_copy(extra, "template variables"),
            **self.special_tokens,
            "messages": _checked_messages(messages, add_generation_prompt),
            "tools": None if tools is None else _json_copy(list(tools), "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        return _on_a_budget(lambda: self._template.render(variables))


def render_default(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """Returns the text of a chat by `DEFAULT_TEMPLATE`.

    Raises:
        ValueError: a message is malformed, or its role is `tool`.
    """
    template = ChatTemplate(DEFAULT_TEMPLATE, {})
    return template.render(messages, add_generation_prompt=add_generation_prompt)


def encode_chat(
    tokenizer: tokenizer_lib.Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    allow_special: bool = False,
    **extra: Any,
) -> list[int]:
    """Returns the prompt's ids: the template's control text as control tokens, the users' not.

    Every occurrence of a control token's text in what the caller passes is marked, by a character
    that occurs nowhere else, before the template runs. Control text that comes out unmarked is
    taken to be the template's own, and the rest is encoded as ordinary text. A second rendering,
    with every character of the messages marked, finds control text that the template put together
    from message text.

    Args:
        tokenizer: the tokenizer of the checkpoint.
        template: the template of the checkpoint.
        messages: see `ChatTemplate.render`.
        tools: see `ChatTemplate.render`.
        add_generation_prompt: see `ChatTemplate.render`.
        allow_special: trust the caller: control text is control wherever it stands.
        **extra: see `ChatTemplate.render`.

    Raises:
        ValueError: as in `ChatTemplate.render`, or which control tokens the chat has depends on the
            text of its messages.
    """
    options: dict[str, Any] = {"tools": tools, **extra}
    if allow_special:
        text = template.render(messages, add_generation_prompt=add_generation_prompt, **options)
        return tokenizer.encode(text, allow_special=True)

    messages = _checked_messages(messages, add_generation_prompt)
    options = _json_copy(options, "tools and template variables")
    special_tokens = tokenizer.special_tokens
    fixed = [template.source, template.special_tokens, [*special_tokens]]
    mark, end = _absent_characters([messages, options, fixed])

    def mark_special(text: str) -> str:
        # After the first character; a token of one character gets its mark before it.
        starts = tokenizer_lib.find_all(special_tokens, text)
        cuts = [start if text[start] in special_tokens else start + 1 for start in starts]
        bounds = [0, *cuts, len(text)]
        return mark.join(text[a:b] for a, b in itertools.pairwise(bounds))

    def mark_all(text: str) -> str:
        return "".join(mark + character + end for character in text)

    def render(marker: Callable[[str], str]) -> list[str]:
        marked = []
        for message in messages:
            free = {k: _map_strings(v, marker) for k, v in message.items() if k in _FREE_TEXT}
            rest = {k: _map_strings(v, mark_special) for k, v in message.items() if k != "role"}
            marked.append({**message, **rest, **free})
        text = template.render(
            marked,
            add_generation_prompt=add_generation_prompt,
            **_map_strings(options, mark_special),
        )
        return _split_at(special_tokens, text, mark)

    pieces = render(mark_special)
    try:
        controls = render(mark_all)[1::2]
    except ValueError as error:
        raise ValueError(f"{_DEPENDS_ON_TEXT} ({error})") from error
    if pieces[1::2] != controls:
        raise ValueError(_DEPENDS_ON_TEXT)
    parts: list[str | int] = [piece.replace(mark, "") for piece in pieces]
    parts[1::2] = [special_tokens[name] for name in controls]
    return tokenizer.encode_parts([part for part in parts if part != ""])


_FREE_TEXT = ("content", "reasoning_content", "name")
_DEPENDS_ON_TEXT = (
    "which control tokens the chat template writes depends on the text of the messages, so text "
    "could pose as control tokens; change the messages, or pass allow_special=True to trust them"
)


def _split_at(special_tokens: Mapping[str, int], text: str, mark: str) -> list[str]:
    """Splits text at unmarked control text: plain, control, plain, ..., control, plain."""
    # A token of one character cannot be marked inside.
    longest_first = [
        re.escape(name) if len(name) > 1 else f"(?<!{mark}){re.escape(name)}"
        for name in sorted(special_tokens, key=len, reverse=True)
    ]
    return re.split(f"({'|'.join(longest_first)})", text) if longest_first else [text]


def _absent_characters(data: Any) -> tuple[str, str]:
    """Returns two private-use characters that are nowhere in the data."""
    used: set[str] = set()
    _map_strings(data, lambda text: used.update(text) or text)
    absent = [c for c in map(chr, range(0xE000, 0xF900)) if c not in used]
    if len(absent) < 2:
        raise ValueError("the chat uses every private-use character of Unicode; remove some")
    return absent[0], absent[1]


def _map_strings(data: Any, function: Callable[[str], str]) -> Any:
    """Returns JSON data with the function applied to every string, keys included."""
    if isinstance(data, str):
        return function(data)
    if isinstance(data, Mapping):
        return {function(k): _map_strings(v, function) for k, v in data.items()}
    if isinstance(data, list):
        return [_map_strings(item, function) for item in data]
    return data


def _json_copy(data: Any, where: str, depth: int = 0) -> Any:
    """Copies JSON data, so that a template meets no other object and changes none of ours."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if data is None or isinstance(data, bool | int | float):
        return data
    if isinstance(data, str):
        return str(data)
    if isinstance(data, Mapping) and all(isinstance(key, str) for key in data):
        return {str(k): _json_copy(v, f"{where}.{k}", depth + 1) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_json_copy(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(data)]
    raise ValueError(f"{where}: a {type(data).__name__}, expected JSON data")


def _checked_messages(
    messages: Sequence[Message], add_generation_prompt: bool
) -> list[dict[str, Any]]:
    """Returns a copy of the messages, or raises `ValueError` with the index of the wrong one."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages is a {type(messages).__name__}, expected a list of messages")
    if not messages:
        raise ValueError("messages is empty; give at least one user message")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{where} is a {type(message).__name__}, expected an object with role and content"
            )
        if "role" not in message:
            raise ValueError(f"{where} has no role; give one of {', '.join(ROLES)}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where} has the unknown role {message['role']!r}; give one of {', '.join(ROLES)}"
            )
        content, calls = message.get("content"), message.get("tool_calls")
        if content is None and not (message["role"] == "assistant" and calls):
            raise ValueError(f"{where} has no content; give a string")
        if content is not None and not isinstance(content, str):
            raise ValueError(
                f"{where} has a {type(content).__name__} as content, expected a string"
            )
        if calls is not None and not isinstance(calls, list | tuple):
            raise ValueError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list")
        checked.append(_json_copy(message, where))
    if add_generation_prompt and all(message["role"] != "user" for message in checked):
        raise ValueError(
            f"none of the {len(checked)} messages is from the user, so there is nothing to answer"
        )
    return checked


class _BudgetError(Exception):
    """A template did more work than one chat can need."""


class _Meter:
    """What a rendering may still cost."""

    def __init__(self) -> None:
        self._work = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def charge(self, work: int) -> None:
        self._work -= 1 + max(0, work)
        if self._work < 0:
            raise _BudgetError(f"it makes over {MAX_WORK:,} characters")
        if time.monotonic() > self._deadline:
            raise _BudgetError(f"it takes over {MAX_SECONDS} seconds")

    def charge_value(self, value: Any) -> None:
        """Charges for what turning the value into text costs; it must be plain data."""
        if isinstance(value, str):
            self.charge(len(value))
        elif value is None or isinstance(value, int | float | range | jinja2.Undefined):
            self.charge(8)
        elif isinstance(value, Mapping):
            self.charge(0)
            for key, item in value.items():
                self.charge_value(key)
                self.charge_value(item)
        elif isinstance(value, list | tuple | set | frozenset):
            self.charge(0)
            for item in value:
                self.charge_value(item)
        else:
            raise jinja2.exceptions.SecurityError(f"a {type(value).__name__} is not text")


_meter: contextvars.ContextVar[_Meter] = contextvars.ContextVar("_meter")


def _on_a_budget(work: Callable[[], _T]) -> _T:
    """Runs a part of jinja with a fresh meter; whatever goes wrong is a `ValueError`."""
    token = _meter.set(_Meter())
    try:
        return work()
    except _BudgetError as error:
        raise ValueError(f"the chat template was stopped: {error}") from error
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(f"the chat template tries to leave its sandbox: {error}") from error
    except _Refusal as error:
        raise ValueError(f"the chat template refuses this chat: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template, line {error.lineno}, is not jinja: {error.message}"
        ) from error
    except Exception as error:  # a template can provoke any of them
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error
    finally:
        _meter.reset(token)


class _Refusal(Exception):
    """The template called `raise_exception`."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which loops, calls and operators that make text are metered."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_costly = isinstance(obj, str) and attr in _COSTLY_STRING_METHODS
        return super().is_safe_attribute(obj, attr, value) and not is_costly

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuses at once; jinja's own would print as nothing."""
        raise jinja2.exceptions.SecurityError(
            f"attribute {attribute!r} of a {type(obj).__name__} is not for templates"
        )

    def wrap_str_format(self, value: Any) -> None:
        """Leaves `str.format` to `is_safe_attribute`, which refuses it: a width costs anything."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        if operator == "%" and isinstance(left, str):
            raise jinja2.exceptions.SecurityError("formatting by % is not allowed; use ~")
        if operator == "**":
            meter.charge(_BIG_NUMBER_COST * abs(int(left)).bit_length() * abs(int(right)))
        elif operator == "*":
            meter.charge(_repeated_size(left, right))
        elif operator == "+":
            meter.charge(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    # The underscores keep these names apart from the template's own keyword arguments.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        _meter.get().charge(_size(owner))
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args)
        if isinstance(owner, str) and name == "join":
            (items,) = args
            return _join(__self, items, owner)
        return super().call(__context, __obj, *args, **kwargs)


_BIG_NUMBER_COST = 64


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


def _repeated_size(left: Any, right: Any) -> int:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return _BIG_NUMBER_COST * (_size(left) + _size(right))
    return _size(left) * int(right) if isinstance(right, int) else int(left) * _size(right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's words in training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(jinja2.visitor.NodeTransformer):
    """Puts a charge at the start of every body that can run again, and into `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._charged(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._charged(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._charged(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "metered_concat", node.lineno)

    def _charged(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        # Text that stands in the body costs its length each time.
        size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        charge = _filter(nodes.Const(size), "metered_step", node.lineno)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return node


def _filter(operand: nodes.Expr, name: str, lineno: int) -> nodes.Filter:
    # A filter, because a template can give any variable another meaning, and no filter.
    return nodes.Filter(operand, name, [], [], None, None, lineno=lineno)


def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        optimized=False,  # nothing of the template runs before its budget is counted
        finalize=_finalize,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters = {name: environment.filters[name] for name in _FILTERS.split()} | {
        "join": _join,
        "replace": _replace,
        "indent": _indent,
        "string": _string,
        "tojson": _tojson,
        "metered_step": _metered_step,
        "metered_concat": _metered_concat,
    }
    environment.globals = {name: environment.globals[name] for name in _GLOBALS} | {
        "range": _range,
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    tree = _Metered().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.from_string(tree)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise jinja2.exceptions.SecurityError(f"a range of over {MAX_RANGE} numbers")
    return numbers


def _refuse(message: str) -> None:
    raise _Refusal(message)


@jinja2.pass_context
def _metered_step(context: Any, size: int) -> None:
    _meter.get().charge(size)


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    _meter.get().charge_value(value)
    return value


def _metered_concat(values: list[Any]) -> str:
    return "".join(map(_string, values))


def _string(value: Any) -> str:
    _meter.get().charge_value(value)
    return str(value)


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    items, separator = [_string(item) for item in value], _string(d)
    _meter.get().charge(len(items) * len(separator))
    return separator.join(items)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new, count = _string(s), _string(old), _string(new), -1 if count is None else count
    _meter.get().charge(s.count(old) * len(new))
    return s.replace(old, new, count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    return jinja2.filters.do_indent(s, _checked_indent(width), first, blank)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _meter.get().charge_value(x)
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else _checked_indent(indent),
        separators=separators,
        sort_keys=sort_keys,
    )


def _checked_indent(indent: int | str) -> int | str:
    if (len(indent) if isinstance(indent, str) else indent) > MAX_INDENT:
        raise jinja2.exceptions.SecurityError(f"an indent of over {MAX_INDENT} characters")
    return indent

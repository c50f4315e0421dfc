"""Chat messages to prompt text and token ids, by the checkpoint's jinja template.

Neither side is trusted. A template comes with a checkpoint, so it runs in jinja's sandbox and on a
budget of work. Message text comes from users, so it cannot turn into control tokens.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llada_jax.data import template_sandbox, tokenizer_files
from llada_jax.data import tokenizer as tokenizer_lib

Message = Mapping[str, Any]

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

# Bounds on what a checkpoint or a user can send.
MAX_SOURCE_CHARACTERS = 500_000
MAX_DEPTH = 64


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
        self._template = template_sandbox.on_a_budget(
            lambda: template_sandbox.compile_template(source)
        )

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
        return template_sandbox.on_a_budget(lambda: self._template.render(variables))


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
        starts = tokenizer_files.find_all(special_tokens, text)
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

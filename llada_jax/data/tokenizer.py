"""Text to token ids and back, for `tokenizer.json` and for SentencePiece `.model` files.

The rule both share: a control token (mask, end, role marker, ...) comes out of `encode` only where
the caller asked for it. The same characters inside ordinary text are spelled with ordinary tokens.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

# Names that published checkpoints give to the tokens we must know, tried in this order when the
# tokenizer does not say itself which token plays the part.
MASK_NAMES = ("<|mask|>", "<|mdm_mask|>", "<mask>", "[MASK]")
END_NAMES = ("<|endoftext|>", "<|role_end|>", "<|eot_id|>", "</s>")
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>")

# Added tokens that structure a chat. They are control tokens even where a file calls them ordinary.
_CONTROL_FORM = re.compile(r"<\|.+\|>|</?role>|<mask>|\[MASK\]", re.DOTALL)
# A mask by its name (`[gMASK]` and `[sMASK]` mean something else), and tokens that nobody uses yet.
_MASK_OR_FREE = re.compile(r"(?<![gs])mask|reserved|unused|extra_id|placeholder", re.IGNORECASE)


class Tokenizer(Protocol):
    """What the library needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The control tokens: text to id."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The tokens that have a part: `{"eos_token": "<|endoftext|>", ...}`."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template that came with the tokenizer."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of a text; none is added at either end.

        Args:
            text: any text.
            allow_special: whether the text of a control token becomes that token. Otherwise it is
                spelled with ordinary tokens, so text from a user cannot steer the model.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no encoding can express.
        """
        ...

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Returns the ids of one text that is given as stretches of plain text and control ids.

        Equal to `encode(text, allow_special=True)` of the whole where the plain stretches hold no
        text of a control token, and safe where they do.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD.

        Ids that have no token, such as those of an embedding table's padding rows, are left out.

        Raises:
            ValueError: an id is negative.
        """
        ...

    def token_id(self, text: str) -> int | None:
        """Returns the id of the vocabulary entry of exactly this text, or None."""
        ...

    def id_to_token(self, token_id: int) -> str:
        """Returns a printable piece of one line for display; `<id>` for an id without a token."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the facts in the JSON and jinja files beside it.

    Control tokens are the added tokens marked `special`, those that `tokenizer_config.json` or
    `special_tokens_map.json` name, and those of the form `<|...|>`, `<role>` and `<mask>`. Other
    added tokens, such as `<think>`, are vocabulary and are found in any text.
    """

    def __init__(self, path: str | pathlib.Path):
        file, directory = _locate(path, "tokenizer.json")
        data = _read_json(file)
        side = _read_side_files(directory)
        # One tokenizer that sees control tokens in text and one that is blind to them. Nothing is
        # changed after this, so both may be used from several threads.
        self._seeing = _load_hugging_face(file, data, side)
        self._blind = _load_hugging_face(file, data, side)
        self._blind.encode_special_tokens = True

        self.vocab_size: int = 1 + max(self._seeing.get_vocab().values(), default=-1)
        added = self._seeing.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in sorted(added.items()) if t.special}
        self._special_flags = {i: t for i, t in added.items() if t.special}
        # What the model writes for unknown characters may come out of any text.
        self._forbidden = set(self._special_flags) - _unknown_ids(data, self._seeing)
        self.named_tokens = side.named_tokens
        self.chat_template = side.chat_template
        self._is_byte_level = '"ByteLevel"' in json.dumps(data.get("decoder"))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of a text; see `Tokenizer.encode`."""
        _check_text(text)
        if allow_special:
            return self._seeing.encode(text, add_special_tokens=False).ids
        ids = self._blind.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # The vocabulary itself holds the control text, as in Unigram models: cut it into halves.
        cuts = [start + 1 for start in find_all(self.special_tokens, text)]
        bounds = [0, *cuts, len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
        ids = [i for p in pieces for i in self._blind.encode(p, add_special_tokens=False).ids]
        found = self._forbidden.intersection(ids)
        if found:
            names = sorted(self._special_flags[i].content for i in found)
            raise ValueError(
                f"this tokenizer has no ordinary spelling for {names}; remove it from the text or "
                "encode with allow_special=True"
            )
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Returns the ids of plain text and control ids; see `Tokenizer.encode_parts`."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            before = self._special_flags.get(parts[index - 1]) if index > 0 else None
            after = self._special_flags.get(parts[index + 1]) if index + 1 < len(parts) else None
            # Some control tokens swallow the white space next to them.
            part = part.lstrip() if before is not None and before.rstrip else part
            part = part.rstrip() if after is not None and after.lstrip else part
            ids.extend(self.encode(part))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids; see `Tokenizer.decode`."""
        return self._seeing.decode(_known_ids(ids, self.vocab_size), skip_special)

    def token_id(self, text: str) -> int | None:
        """Returns the id of the vocabulary entry of exactly this text, or None."""
        return self._seeing.token_to_id(text)

    def id_to_token(self, token_id: int) -> str:
        """Returns a printable piece; bytes that are no whole character look like `<0xE4>`."""
        piece = self._seeing.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            return f"<{token_id}>"
        if not self._is_byte_level:
            return _printable(piece.replace("▁", " "))
        text = self._seeing.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:
            alphabet = _byte_level_alphabet()
            text = "".join(f"<0x{alphabet[c]:02X}>" if c in alphabet else c for c in piece)
        return _printable(text)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file.

    Control tokens are its control symbols and its user-defined symbols, except for those of one
    character or of white space only, which are text whoever writes them.
    """

    def __init__(self, path: str | pathlib.Path):
        import sentencepiece

        file, directory = _locate(path, "tokenizer.model")
        content = file.read_bytes()
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            # The library finds user-defined symbols in text and never control symbols. So the
            # models that see control tokens, or are blind to them, have other piece types.
            self._seeing, names = _retyped(content, is_seeing=True)
            self._blind, _ = _retyped(content, is_seeing=False)
            self._blind_inside, _ = _retyped(content, is_seeing=False, is_inside=True)
        except RuntimeError as error:
            raise ValueError(
                f"{file}: not a SentencePiece model ({error}); copy the file again"
            ) from error
        side = _read_side_files(directory)
        self.vocab_size = processor.get_piece_size()
        self._unknown_id = processor.unk_id()
        unreachable = [i for i in side.added_tokens if i >= self.vocab_size]
        if unreachable:
            raise ValueError(
                f"{directory / 'tokenizer_config.json'}: token ids {unreachable} are not in "
                f"{file}, which has {self.vocab_size} pieces; use the checkpoint's tokenizer.json"
            )
        self.special_tokens = {name: self._seeing.piece_to_id(name) for name in names}
        parts = {f"{part}_token": getattr(processor, f"{part}_id")() for part in ("bos", "eos")}
        parts |= {"pad_token": processor.pad_id(), "unk_token": self._unknown_id}
        from_model = {k: processor.id_to_piece(i) for k, i in parts.items() if i >= 0}
        self.named_tokens = {**from_model, **side.named_tokens}
        self.chat_template = side.chat_template

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of a text; see `Tokenizer.encode`."""
        _check_text(text)
        return (self._seeing if allow_special else self._blind).encode(text)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Returns the ids of plain text and control ids; see `Tokenizer.encode_parts`."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                _check_text(part)
                ids.extend((self._blind_inside if index else self._blind).encode(part))
            elif index == 0 and part in self.special_tokens.values():
                # The space that starts every text stands before a control token too.
                ids.extend(self._seeing.encode(self._seeing.id_to_piece(part)))
            else:
                ids.append(part)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids; see `Tokenizer.decode`."""
        # A control symbol decodes to nothing, a user-defined one to its text.
        processor = self._blind if skip_special else self._seeing
        return processor.decode(_known_ids(ids, self.vocab_size))

    def token_id(self, text: str) -> int | None:
        """Returns the id of the piece of exactly this text, or None."""
        found = self._seeing.piece_to_id(text)
        is_missing = found == self._unknown_id and self._seeing.id_to_piece(found) != text
        return None if is_missing else found

    def id_to_token(self, token_id: int) -> str:
        """Returns a printable piece."""
        if not 0 <= token_id < self.vocab_size:
            return f"<{token_id}>"
        return _printable(self._seeing.id_to_piece(token_id).replace("▁", " "))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids generation needs: the mask, every token that ends an answer, the padding."""

    mask: int | None
    eos: tuple[int, ...]
    pad: int | None


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer | None:
    """Returns the tokenizer in a directory, or None if there is none.

    `tokenizer.json` goes before `tokenizer.model`, and that before any other single `*.model`.
    Files are only read: no code in the directory is imported, no pickle opened.

    Raises:
        ValueError: no such directory, a file is broken, or several `*.model` could be meant.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give the directory of the checkpoint")
    if (directory / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(directory)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory)
    models = sorted(directory.glob("*.model"))
    if len(models) > 1:
        names = [model.name for model in models]
        raise ValueError(f"{directory}: several tokenizers, {names}; keep one as tokenizer.model")
    return SentencePieceTokenizer(models[0]) if models else None


def resolve_special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Returns the ids of mask, ends and padding, looked up by name.

    The tokenizer's own word (`mask_token`, `eos_token`, `pad_token`) goes before the conventional
    names. Every conventional end token counts as an end: `<|role_end|>` closes an answer in a chat
    whatever `eos_token` is.

    Raises:
        ValueError: a part is given to a token that the vocabulary does not have.
    """

    def named(part: str) -> list[int]:
        name = tokenizer.named_tokens.get(part)
        if name is None:
            return []
        token_id = tokenizer.token_id(name)
        if token_id is None:
            raise ValueError(
                f"the tokenizer's {part} is {name!r}, which its vocabulary does not have; "
                "take all tokenizer files from the same checkpoint"
            )
        return [token_id]

    def conventional(names: Iterable[str]) -> list[int]:
        special_tokens = tokenizer.special_tokens
        return [special_tokens[name] for name in names if name in special_tokens]

    masks = named("mask_token") + conventional(MASK_NAMES)
    ends = named("eos_token") + conventional(END_NAMES)
    pads = named("pad_token") + conventional(PAD_NAMES)
    return SpecialIds(
        mask=masks[0] if masks else None,
        eos=tuple(dict.fromkeys(ends)),
        pad=pads[0] if pads else None,
    )


def check_special_tokens(
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    mask_token_id: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int | None,
) -> None:
    """Checks that the model's config and the tokenizer mean the same tokens.

    Ids beyond the tokenizer's vocabulary are padding rows of the model's embedding and carry no
    name, so any part may be theirs unless the tokenizer gives it to another token.

    Raises:
        ValueError: they contradict each other; the message lists every contradiction.
    """
    special = resolve_special_ids(tokenizer)
    names = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    problems = []

    def show(token_id: int) -> str:
        return f"{token_id} ({tokenizer.id_to_token(token_id)!r})"

    def is_text(token_id: int) -> bool:
        return 0 <= token_id < tokenizer.vocab_size and token_id not in names

    if tokenizer.vocab_size > vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}")
    config_ids = [("mask_token_id", mask_token_id)]
    config_ids += [("eos_token_id", token_id) for token_id in eos_token_ids]
    config_ids += [("pad_token_id", pad_token_id)] if pad_token_id is not None else []
    for field, token_id in config_ids:
        if not 0 <= token_id < vocab_size:
            problems.append(f"{field} {token_id} is outside the model's {vocab_size} ids")
        elif is_text(token_id):
            problems.append(f"{field} {show(token_id)} is ordinary text in the tokenizer")
        if field != "mask_token_id" and token_id == mask_token_id:
            problems.append(f"{field} and mask_token_id are both {token_id}")

    if special.mask is not None and special.mask != mask_token_id:
        problems.append(
            f"mask_token_id {show(mask_token_id)} is not the tokenizer's mask {show(special.mask)}"
        )
    elif special.mask is None and not _MASK_OR_FREE.search(names.get(mask_token_id, "mask")):
        problems.append(f"mask_token_id {show(mask_token_id)} is another token in the tokenizer")
    if special.eos and eos_token_ids and not set(eos_token_ids) & set(special.eos):
        found = ", ".join(show(token_id) for token_id in eos_token_ids)
        wanted = ", ".join(show(token_id) for token_id in special.eos)
        problems.append(f"eos_token_id {found} is none of the tokenizer's ends {wanted}")
    if pad_token_id is not None and "pad_token" in tokenizer.named_tokens:
        named_pad = tokenizer.token_id(tokenizer.named_tokens["pad_token"])
        if named_pad != pad_token_id:
            problems.append(
                f"pad_token_id {show(pad_token_id)} is not the tokenizer's padding {named_pad}"
            )
    if problems:
        raise ValueError(
            "the tokenizer does not belong to the model's config:\n- "
            + "\n- ".join(problems)
            + "\nTake both from the same checkpoint: related models give other ids to the same "
            "tokens."
        )


def find_all(texts: Iterable[str], text: str) -> list[int]:
    """Returns where in `text` one of `texts` starts, overlapping occurrences included."""
    texts = sorted(texts)
    if not texts:
        return []
    # Most characters of a text start none of them; looking at those first is several times faster.
    first = "".join(sorted({re.escape(candidate[0]) for candidate in texts}))
    pattern = f"(?=[{first}])(?={'|'.join(map(re.escape, texts))})"
    return [match.start() for match in re.finditer(pattern, text)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SideFiles:
    """What the files beside the vocabulary say."""

    named_tokens: Mapping[str, str]
    special_texts: frozenset[str]
    added_tokens: Mapping[int, Mapping[str, Any]]
    chat_template: str | None


def _locate(path: str | pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the vocabulary file and the directory it is in, from either of them."""
    path = pathlib.Path(path)
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a tokenizer file or its directory")
    return file, file.parent


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON {type(data).__name__}, expected an object")
    return data


def _read_side_files(directory: pathlib.Path) -> _SideFiles:
    """Reads `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= _read_json(directory / name)
    path = directory / "tokenizer_config.json"

    def text_of(entry: Any) -> str | None:
        text = entry.get("content") if isinstance(entry, dict) else entry
        return text if isinstance(text, str) and text else None

    extra = config.get("extra_special_tokens") or {}
    parts = {k: v for k, v in config.items() if k.endswith("_token")}
    if isinstance(extra, dict):
        parts, extra = parts | extra, []
    named_tokens = {k: text for k, v in parts.items() if (text := text_of(v)) is not None}
    lists = [
        config.get("additional_special_tokens") or [],
        extra if isinstance(extra, list) else [],
    ]
    more = {text for entries in lists for entry in entries if (text := text_of(entry)) is not None}
    try:
        added_tokens = {
            int(i): dict(t) for i, t in (config.get("added_tokens_decoder") or {}).items()
        }
        more |= {str(t["content"]) for t in added_tokens.values() if t.get("special")}
        if not all(isinstance(t["content"], str) for t in added_tokens.values()):
            raise TypeError("a content is no text")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: added_tokens_decoder is broken ({error!r}); expected "
            '{"id": {"content": text, ...}}; copy the file again'
        ) from error
    return _SideFiles(
        named_tokens=named_tokens,
        special_texts=frozenset(named_tokens.values()) | more,
        added_tokens=added_tokens,
        chat_template=_read_chat_template(directory, config.get("chat_template")),
    )


def _read_chat_template(directory: pathlib.Path, entry: Any) -> str | None:
    """Returns the chat template: its own file first, then the entry of the config."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error}); copy the file again") from error
    try:
        # Older files hold a list of named templates.
        if isinstance(entry, list):
            entry = {template["name"]: template["template"] for template in entry}["default"]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template is a list without a template "
            "named 'default'; save the one to use as chat_template.jinja"
        ) from error
    if entry is not None and not isinstance(entry, str):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template is a {type(entry).__name__}, "
            "expected a string"
        )
    return entry


def _load_hugging_face(file: pathlib.Path, data: Mapping[str, Any], side: _SideFiles) -> Any:
    """Builds a `tokenizers.Tokenizer` in which exactly the control tokens are special."""
    import tokenizers

    try:
        # Limits on the length that a training run left in the file would cut a text.
        tokenizer = tokenizers.Tokenizer.from_str(
            json.dumps({**data, "truncation": None, "padding": None})
        )
        wanted = {int(t["id"]): str(t["content"]) for t in data.get("added_tokens") or ()}
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{file}: not a tokenizer.json this version of tokenizers reads ({error}); "
            "copy the file again or update tokenizers"
        ) from error
    # Tokens that only tokenizer_config.json lists; their ids continue those of the file.
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token_id, token in sorted(side.added_tokens.items()):
        if wanted.get(token_id, token["content"]) != token["content"]:
            raise ValueError(
                f"{file}: token {token_id} is {wanted[token_id]!r}, in tokenizer_config.json it is "
                f"{token['content']!r}; take all tokenizer files from the same checkpoint"
            )
        if token_id not in wanted:
            given = {flag: bool(token[flag]) for flag in flags if flag in token}
            tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **given)])
            wanted[token_id] = token["content"]
    got = {token_id: tokenizer.token_to_id(text) for token_id, text in wanted.items()}
    moved = [f"{wanted[i]!r} {i} -> {j}" for i, j in got.items() if i != j]
    if moved:
        raise ValueError(
            f"{file}: the ids of added tokens do not follow the vocabulary, they would move: "
            f"{', '.join(moved[:5])}; take all tokenizer files from the same checkpoint"
        )
    # Give the control tokens that the file holds as ordinary entries their true nature.
    added = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    texts = side.special_texts | {text for text in added if _CONTROL_FORM.fullmatch(text)}
    for text in sorted(texts):
        token = added.get(text, tokenizers.AddedToken(text, normalized=False))
        if not token.special and tokenizer.token_to_id(text) is not None:
            token.special = True
            tokenizer.add_special_tokens([token])
    return tokenizer


def _unknown_ids(data: Mapping[str, Any], tokenizer: Any) -> set[int]:
    """Returns the id a model writes for characters it cannot express, if it has one."""
    model = data["model"]
    if isinstance(model.get("unk_id"), int):
        return {model["unk_id"]}
    name = model.get("unk_token")
    unknown = tokenizer.token_to_id(name) if isinstance(name, str) else None
    return set() if unknown is None else {unknown}


def _retyped(content: bytes, *, is_seeing: bool, is_inside: bool = False) -> tuple[Any, list[str]]:
    """Returns a SentencePiece processor with control pieces retyped, and their names.

    Args:
        content: the model file.
        is_seeing: whether the processor finds control tokens in text.
        is_inside: whether texts continue one, so that no space is put before them.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    types = model.SentencePiece
    names = []
    for piece in model.pieces:
        is_markup = piece.type == types.USER_DEFINED and len(piece.piece.strip(" ▁\t\r\n")) > 1
        if piece.type == types.CONTROL or is_markup:
            piece.type = types.USER_DEFINED if is_seeing else types.CONTROL
            names.append(piece.piece)
    if is_inside:
        model.normalizer_spec.add_dummy_prefix = False
    content = model.SerializeToString()
    return sentencepiece.SentencePieceProcessor(model_proto=content), names


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair at character {error.start}; send valid Unicode"
        ) from error


def _known_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Returns ids as plain integers, without those that have no token."""
    ids = [int(i) for i in ids]
    if ids and min(ids) < 0:
        raise ValueError(f"token id {min(ids)} is negative; ids start at 0")
    return [i for i in ids if i < vocab_size]


def _printable(text: str) -> str:
    """Returns the text with line ends and other control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def _byte_level_alphabet() -> Mapping[str, int]:
    """Returns the byte that each letter of byte-level BPE's alphabet stands for."""
    same = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in same]
    return {chr(b): b for b in same} | {chr(256 + i): b for i, b in enumerate(moved)}

"""The BERT tokenizer with BLIP's two own tokens.

What is particular here:
- It reads a plain vocabulary file; nothing is ever downloaded.
- Words such as "[SEP]" inside a text are text: they never become special tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor

from blipfast.data.clean import pre_caption, pre_question
from blipfast.errors import ConfigError, DataError

TextKind = Literal["caption", "question", "raw"]

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
DEC, ENC = "[DEC]", "[ENC]"


@dataclass(frozen=True)
class TextBatch:
    """Tokenised texts, padded on the right.

    Attributes:
        input_ids: ``(N, L)`` int64; [CLS] first, [SEP] last, then [PAD].
        attention_mask: ``(N, L)`` int64; 1 on tokens, 0 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, ``(N,)`` int64."""
        return self.attention_mask.sum(dim=1)

    def to(self, device: torch.device | str) -> TextBatch:
        """The same batch on another device."""
        return TextBatch(self.input_ids.to(device), self.attention_mask.to(device))


class BlipTokenizer:
    """BERT uncased WordPiece with [DEC] and [ENC] appended after the vocabulary.

    [DEC] starts a text for the image-grounded decoder, [ENC] for the image-grounded encoder
    (BLIP, section 3.1); `__call__` starts every text with [CLS] and the model swaps it.

    Args:
        vocab: the pieces in id order. May end in "[DEC]", "[ENC]" already.

    Raises:
        DataError: if a special token is missing or a piece occurs twice.
    """

    def __init__(self, vocab: Sequence[str]) -> None:
        pieces = list(vocab)
        if pieces[-2:] != [DEC, ENC]:
            pieces += [DEC, ENC]
        ids = {piece: i for i, piece in enumerate(pieces)}
        missing = [token for token in (PAD, UNK, CLS, SEP) if token not in ids]
        if missing:
            raise DataError(
                f"this is not a BERT vocabulary: {', '.join(missing)} not among its "
                f"{len(vocab)} pieces; give the vocab.txt of a BERT uncased model"
            )
        if len(ids) != len(pieces):
            twice = next(p for i, p in enumerate(pieces) if ids[p] != i)
            raise DataError(f"the vocabulary has {twice!r} twice; each piece needs its own line")
        self._pieces = tuple(pieces)
        self._ids = ids
        self._special = frozenset(ids[t] for t in (PAD, UNK, CLS, SEP, MASK, DEC, ENC) if t in ids)
        # WordPiece marks a continuation by "##"; words longer than 100 letters become [UNK].
        backend = Tokenizer(WordPiece(ids, unk_token=UNK, max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=True)
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> BlipTokenizer:
        """Read a ``vocab.txt`` (one piece per line, UTF-8).

        Raises:
            DataError: if the file is missing, not UTF-8 or no BERT vocabulary.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot read the vocabulary {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the vocabulary {file} is not UTF-8 (byte {error.start})") from error
        # Not splitlines(): a piece may be a Unicode line separator.
        lines = [line.rstrip("\r") for line in text.split("\n")]
        if lines and not lines[-1]:
            lines.pop()
        try:
            return cls(lines)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error

    @classmethod
    def from_pretrained_dir(cls, path: str | os.PathLike[str]) -> BlipTokenizer:
        """Read a model folder's ``vocab.txt``, or else the vocabulary in ``tokenizer.json``.

        Raises:
            DataError: if neither is there or usable.
        """
        folder = Path(path)
        if (folder / "vocab.txt").is_file():
            return cls.from_file(folder / "vocab.txt")
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"{folder} holds neither vocab.txt nor tokenizer.json")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            ids = dict(content["model"]["vocab"])
            ids.update({t["content"]: t["id"] for t in content.get("added_tokens", [])})
            pieces = sorted(ids, key=lambda piece: ids[piece])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is not a WordPiece tokenizer file: {error!r}") from error
        if [ids[piece] for piece in pieces] != list(range(len(pieces))):
            raise DataError(f"{file}: the ids of its pieces have gaps; a vocab.txt is needed")
        return cls(pieces)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the vocabulary, [DEC] and [ENC] last; into ``vocab.txt`` if `path` is a folder.

        Returns:
            The file written. `from_file` gives the same tokenizer back.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "vocab.txt"
        return _write_whole(file, "\n".join(self._pieces) + "\n", "the vocabulary")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write what transformers' `AutoTokenizer` and `BlipProcessor` read; returns the folder."""
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {folder}: {error.strerror}") from error
        self.save(folder)
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        text = json.dumps(settings, indent=2) + "\n"
        _write_whole(folder / "tokenizer_config.json", text, "the tokenizer's settings")
        return folder

    @classmethod
    def subset(
        cls, texts: Iterable[str], base_vocab: BlipTokenizer | str | os.PathLike[str]
    ) -> tuple[BlipTokenizer, Tensor]:
        """A smaller vocabulary that tokenises `texts` (cleaned or not) as the base does.

        Kept, in the base's order: everything up to [MASK] (so special tokens keep their ids),
        all single ASCII characters and their continuations (so other words still spell out),
        and the pieces that the texts use.

        Returns:
            The tokenizer, and ``rows``, ``(vocab_size - 2,)`` int64: for each piece its row in
            the base's embedding table. [DEC] and [ENC] come after them and have no row.
        """
        base = base_vocab if isinstance(base_vocab, cls) else cls.from_file(str(base_vocab))
        specials = (PAD, UNK, CLS, SEP, MASK)
        keep = set(range(1 + max(base._ids[t] for t in specials if t in base._ids)))
        for piece, i in base._ids.items():
            letter = piece.removeprefix("##")
            if len(letter) == 1 and letter.isascii():
                keep.add(i)
        for encoding in base._backend.encode_batch(list(texts), add_special_tokens=False):
            keep.update(encoding.ids)
        keep -= {base.dec_token_id, base.enc_token_id}
        rows = sorted(keep)
        return cls([base._pieces[i] for i in rows]), torch.tensor(rows, dtype=torch.int64)

    @property
    def vocab_size(self) -> int:
        """Number of ids, [DEC] and [ENC] included."""
        return len(self._pieces)

    @property
    def pad_token_id(self) -> int:
        """Id of [PAD]."""
        return self._ids[PAD]

    @property
    def cls_token_id(self) -> int:
        """Id of [CLS], the first token of every text."""
        return self._ids[CLS]

    @property
    def sep_token_id(self) -> int:
        """Id of [SEP], the last token of every text."""
        return self._ids[SEP]

    @property
    def dec_token_id(self) -> int:
        """Id of [DEC], which starts a text for the decoder."""
        return self._ids[DEC]

    @property
    def enc_token_id(self) -> int:
        """Id of [ENC], which starts a text for the image-grounded encoder."""
        return self._ids[ENC]

    @property
    def vocab(self) -> tuple[str, ...]:
        """The pieces in id order."""
        return self._pieces

    def __call__(
        self,
        texts: str | bytes | Sequence[str | bytes],
        max_length: int = 30,
        kind: TextKind = "caption",
        padding: Literal["longest", "max_length"] = "longest",
        allow_empty: bool = False,
    ) -> TextBatch:
        """Clean up and tokenise.

        Args:
            texts: one text or several; bytes are read as UTF-8.
            max_length: token limit, [CLS] and [SEP] included; longer texts lose their end and
                keep [SEP].
            kind: "caption" and "question" clean up first, "raw" does not.
            padding: to the longest text of the batch, or always to `max_length`.
            allow_empty: let a text without a token through as [CLS] [SEP].

        Raises:
            DataError: naming the position of a text that is empty or not UTF-8; also for an
                unknown option or a `max_length` under 3.
        """
        if max_length < 3:
            raise DataError(f"max_length is {max_length}; [CLS], a word and [SEP] need at least 3")
        if padding not in ("longest", "max_length"):
            raise DataError(f'padding is {padding!r}; use "longest" or "max_length"')
        several = [texts] if isinstance(texts, (str, bytes)) else texts
        cleaned = [_clean(text, kind, i) for i, text in enumerate(several)]
        room = max_length - 2
        rows = []
        for i, encoding in enumerate(self._backend.encode_batch(cleaned, add_special_tokens=False)):
            if not encoding.ids and not allow_empty:
                raise DataError(
                    f"text {i} is empty after clean-up (it was {several[i]!r}); drop the pair, "
                    "or pass allow_empty=True"
                )
            rows.append([self.cls_token_id, *encoding.ids[:room], self.sep_token_id])
        longest = max((len(row) for row in rows), default=2)
        width = max_length if padding == "max_length" else longest
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            attention_mask[i, : len(row)] = 1
        return TextBatch(input_ids, attention_mask)

    def pieces(self, ids: Tensor | Sequence[int]) -> list[str]:
        """Each id's piece as it stands in the vocabulary; "##" starts what continues a word."""
        return [self._pieces[i] for i in torch.as_tensor(ids).tolist()]

    def decode(self, ids: Tensor | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of one row of ids, ``(L,)``; special tokens left out unless asked for.

        Raises:
            DataError: if an id lies outside the vocabulary.
        """
        numbers = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        outside = [i for i in numbers if not 0 <= i < self.vocab_size]
        if outside:
            raise DataError(f"id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        if skip_special_tokens:
            numbers = [i for i in numbers if i not in self._special]
        return self._backend.decode(numbers, skip_special_tokens=False)

    def last_turns(self, turns: Sequence[str], max_length: int) -> str:
        """As many of a dialogue's last turns as fit into `max_length` tokens, as one text.

        What is said last matters most, and cutting a text loses its end. The last two stay anyhow.
        """
        kept = list(turns)
        lengths = (self(kept, kind="raw", allow_empty=True).lengths - 2).tolist()
        while len(kept) > 2 and sum(lengths) > max_length - 2:
            del kept[0], lengths[0]
        return " ".join(kept)

    def batch_decode(
        self, ids: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """`decode` for each row of ``(N, L)``."""
        return [self.decode(row, skip_special_tokens) for row in ids]


def _clean(text: str | bytes, kind: TextKind, index: int) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"text {index} is not UTF-8 (byte {error.start}: {text[:40]!r}); convert it first"
            ) from error
    elif not isinstance(text, str):
        raise DataError(f"text {index} is a {type(text).__name__}, not a string")
    else:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # lone surrogates: bytes once decoded by force
            raise DataError(
                f"text {index} holds undecodable bytes ({text[:40]!r}); convert it first"
            ) from error
    if kind == "caption":
        return pre_caption(text)
    if kind == "question":
        return pre_question(text)
    if kind == "raw":
        return text
    raise DataError(f'kind is {kind!r}; use "caption", "question" or "raw"')


def _write_whole(file: Path, text: str, what: str) -> Path:
    """Writes under a temporary name, then renames; raises DataError, naming `what`."""
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, file)
    except OSError as error:
        raise DataError(f"cannot write {what} {file}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


def load_tokenizer(
    vocabulary: str | os.PathLike[str] | None, *models: str | os.PathLike[str] | None
) -> BlipTokenizer:
    """The vocabulary given (a file or a folder), or the one beside the first model that has one.

    models: folders, or checkpoints in them.
    Raises ConfigError when there is neither, DataError when it cannot be read.
    """
    if vocabulary is not None:
        path = Path(vocabulary)
        from_folder = BlipTokenizer.from_pretrained_dir
        return from_folder(path) if path.is_dir() else BlipTokenizer.from_file(path)
    given = [Path(model) for model in models if model is not None]
    for folder in (path if path.is_dir() else path.parent for path in given):
        if any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            return BlipTokenizer.from_pretrained_dir(folder)
    what = "the vocabulary of its BERT (vocab.txt of bert-base-uncased for the published models)"
    if given:
        names = ", ".join(map(str, given))
        raise ConfigError(f"there is no vocab.txt beside the checkpoint {names}: give {what}")
    raise ConfigError("no vocabulary: give data.vocabulary, the vocab.txt of BERT uncased")

"""Text to train on: read, split into training and validation, turned into tokens, and drawn in batches."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyckpt.train.folder import RunFolder, is_run

VALIDATION_SHARE = 0.05
STDLIB_BYTES = 8_000_000
# Tests, vendored wheels and tables of characters: they would teach little about how Python is written.
_STDLIB_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
}
_SEPARATOR = b"\n\n"
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate with.

    train, validation: (N,) uint8 or int32. validation_bytes: bytes of text that the validation tokens stand
    for. prompt: what a sample starts from unless
    told otherwise. fingerprint: a hash of all tokens, by which a resumed run knows its data again.
    """

    name: str
    files: int
    total_bytes: int
    train: Tensor
    validation: Tensor
    validation_bytes: int
    vocab_size: int
    prompt: str
    tokenizer: Any = None
    end_of_text: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What one token is, in words."""
        return "byte" if self.tokenizer is None else "token"

    @functools.cached_property  # every checkpoint has it, and a large text takes seconds
    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.vocab_size).encode())
        for part in (self.train, self.validation):
            digest.update(b"|")
            digest.update(part.numpy().data)
        return digest.hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return list(text.encode("utf-8"))
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        if self.tokenizer is None:
            return bytes(min(t, 255) for t in tokens).decode("utf-8", errors="replace")
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))


def load_corpus(
    path: str | None,
    seq_len: int,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    out: str | None = None,
) -> Corpus:
    """Read the text, split it and turn it into tokens; the same call gives the same tokens on the same files.

    Of a folder, hidden files, files that are not text, further links to a file, and runs of ours are left out. out:
    the folder of this run, left out too: a run must not train on its own logs.

    Raises ValueError for text that is missing, empty, unreadable or too short, and for a tokenizer that can't
    be read or has more tokens than `vocab_size`.
    """
    encoder = _Encoder(tokenizer, vocab_size)
    name, texts, notes = _stdlib_texts() if path is None else _texts_at(Path(path), out)
    if not any(text.strip() for _, text in texts):
        raise ValueError(f"{name} holds no text: every file is empty. Give a file or folder with text in it.")
    train, validation, held_out = _split_for(seq_len, texts, encoder)
    corpus = Corpus(
        name=name,
        files=len(texts),
        total_bytes=sum(len(text) for _, text in texts),
        train=encoder.encode(train),
        validation=held_out,
        validation_bytes=len(_SEPARATOR.join(text for _, text in validation)),
        vocab_size=encoder.vocab_size,
        prompt="def " if path is None else "\n",
        tokenizer=encoder.tokenizer,
        end_of_text=encoder.end_of_text,
        notes=notes,
    )
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) < seq_len:
            raise ValueError(
                f"{name} is too short: of its {corpus.total_bytes} bytes the {part} part has {len(tokens)} "
                f"{corpus.unit}s, and one sequence takes seq_len={seq_len}. Give more text or a smaller seq_len."
            )
    return corpus


def _split_for(
    seq_len: int, texts: list[tuple[str, bytes]], encoder: _Encoder
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]], Tensor]:
    """`split` such that the validation part holds a sequence, where a quarter of the text does; and its tokens."""
    most = sum(len(text) for _, text in texts) // 4
    train, validation = split(texts, least=min(seq_len * 2, most))
    tokens = encoder.encode(validation)
    if encoder.tokenizer is None or not 0 < len(tokens) < seq_len:
        return train, validation, tokens
    per_token = sum(len(text) for _, text in validation) / len(tokens)
    train, validation = split(texts, least=min(math.ceil(seq_len * 2 * per_token), most))
    return train, validation, encoder.encode(validation)


def split(texts: list[tuple[str, bytes]], least: int = 0) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """Hold out the end for validation: whole files where they come close to the share, else a part of the
    last.

    texts: (name, text) in order. least: the fewest bytes to hold out.
    """
    total = sum(len(text) for _, text in texts)
    wanted = max(int(total * VALIDATION_SHARE), least)
    held, first = 0, len(texts)
    while held < wanted and first:
        first -= 1
        held += len(texts[first][1])
    if first and held <= 2 * wanted:
        return texts[:first], texts[first:]
    name, text = texts[first]
    cut = _cut(text, held - wanted)
    return [*texts[:first], (name, text[:cut])], [(name, text[cut:]), *texts[first + 1 :]]


def _cut(text: bytes, near: int) -> int:
    """Where a text may be cut, at or before `near`: after a line end, else between characters."""
    line = text.rfind(b"\n", max(0, near - 4096), near) + 1
    if line:
        return line
    while near and text[near] & 0xC0 == 0x80:
        near -= 1
    return near


def _stdlib_texts() -> tuple[str, list[tuple[str, bytes]], list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in _walk(root, _STDLIB_SKIPPED) if p.suffix == ".py" and not p.name.startswith("_sysconfigdata")]
    if not paths:
        raise ValueError(f"this Python has no library sources under {root}: give a text file or folder to train on.")
    texts, size = [], 0
    # In the order of a hash, so that the size cap and the validation part each get a fair mix of modules.
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()):
        text = _read(path)
        if size + len(text) > STDLIB_BYTES:
            break
        texts.append((path.relative_to(root).as_posix(), text))
        size += len(text)
    return "Python's standard library", texts, []


def _texts_at(path: Path, out: str | None) -> tuple[str, list[tuple[str, bytes]], list[str]]:
    if path.is_file():
        text = _read(path)
        if _binary(text):
            raise ValueError(f"{path} is not text (it has zero bytes in it): give a text file or a folder of them.")
        return _shown(path), [(path.name, text)], []
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a text file or a folder of text files.")
    texts, skipped = [], 0
    for file in _walk(path, {"__pycache__", "node_modules"}, out):
        text = _read(file)
        if _binary(text):
            skipped += 1
        elif text:
            texts.append((file.relative_to(path).as_posix(), text))
    if not texts:
        raise ValueError(f"{path} holds no text files: give a text file or a folder of them.")
    texts.sort(key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest())  # a name need not be UTF-8
    return _shown(path), texts, [f"{skipped} files that are not text were left out"] if skipped else []


def _shown(path: Path) -> str:
    """A path as text that can be printed, whatever the bytes of its name."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def _walk(root: Path, skipped: set[str], out: str | None = None) -> list[Path]:
    """The files under a folder, each once, without hidden ones and without following links to folders.

    Folders of runs and `out` are left out; where root is one itself, what a run writes to it.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} can't be read: {error.strerror}. Make it readable or leave it out.")

    found = []
    for name, folders, files in os.walk(root, onerror=fail):
        folder, left_out = Path(name), skipped
        if _is_of_a_run(folder, out):
            if folder != root:
                folders.clear()
                continue
            left_out = skipped | {path.name for path in RunFolder(folder).all}
        folders[:] = sorted(f for f in folders if f not in left_out and not f.startswith("."))
        names = sorted(f for f in files if f not in left_out and not f.startswith("."))
        found += [folder / f for f in names if (folder / f).is_file()]
    return _each_once(found)


def _is_of_a_run(folder: Path, out: str | None) -> bool:
    return (out is not None and os.path.realpath(folder) == os.path.realpath(out)) or is_run(folder)


def _each_once(paths: list[Path]) -> list[Path]:
    """Without further links to a file: with one in the training part and one in the other, validation says nothing."""
    seen: set[tuple[int, int]] = set()
    found = []
    for path in paths:
        status = path.stat()
        file = (status.st_dev, status.st_ino)
        if status.st_ino and file in seen:  # some file systems number none
            continue
        seen.add(file)
        found.append(path)
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}. Make it readable or leave it out.") from error


def _binary(text: bytes) -> bool:
    return b"\0" in text[:8192]


class _Encoder:
    """Bytes to tokens: as they are, or by a tokenizer.json."""

    def __init__(self, path: str | None, vocab_size: int | None) -> None:
        self.tokenizer: Any = None
        self.end_of_text: int | None = None
        least = 256
        if path is not None:
            self.tokenizer = _load_tokenizer(path)
            vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
            least = max(vocabulary.values()) + 1
            self.end_of_text = next((vocabulary[t] for t in _END_OF_TEXT if t in vocabulary), None)
        if vocab_size is not None and vocab_size < least:
            source = "bytes need" if path is None else f"{path} has"
            raise ValueError(
                f"vocab_size={vocab_size}, but {source} {least} tokens: give at least that, or leave it out."
            )
        self.vocab_size = vocab_size or least

    def encode(self, texts: list[tuple[str, bytes]]) -> Tensor:
        if self.tokenizer is None:
            joined = bytearray(_SEPARATOR.join(text for _, text in texts))
            # Of a text that is too short one part is empty, of which PyTorch makes no tensor.
            return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        parts = []
        for name, text in texts:
            parts += [torch.tensor(e.ids, dtype=torch.int32) for e in self._encodings(name, text)]
            if self.end_of_text is not None:
                parts.append(torch.tensor([self.end_of_text], dtype=torch.int32))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def _encodings(self, name: str, text: bytes) -> list[Any]:
        try:
            lines = text.decode("utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not UTF-8 (byte {error.start} is 0x{text[error.start]:02x}): convert it, leave "
                f"it out, or train on bytes, without a tokenizer."
            ) from None
        # Pieces of some 100 KB, cut at line ends: one long string costs a tokenizer much time and memory.
        pieces, piece, size = [], [], 0
        for line in lines:
            piece.append(line)
            size += len(line)
            if size > 100_000:
                pieces.append("".join(piece))
                piece, size = [], 0
        pieces.append("".join(piece))
        encodings: list[Any] = self.tokenizer.encode_batch(pieces, add_special_tokens=False)
        return encodings


def _load_tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise ValueError(f"tokenizer {path} does not exist: give a tokenizer.json file.")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer {path} can't be read as a tokenizer.json: {error}") from error
    # Those of a fine-tuning would cut each piece of the text short, or fill it up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """splitmix64: a 64-bit number whose bits look random, from any 64-bit number."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def training_batch(tokens: Tensor, seed: int, index: int, batch_size: int, seq_len: int) -> Tensor:
    """Batch number `index` of a run: (batch_size, seq_len) int64, from random places of `tokens`.

    The places are a pure function of (seed, index), so a run resumes with nothing but the number of its step.
    """
    places = len(tokens) - seq_len + 1
    key = _mix(seed & _MASK)
    starts = [_mix((key + index * batch_size + row) & _MASK) % places for row in range(batch_size)]
    return torch.stack([tokens[s : s + seq_len] for s in starts]).long()


def validation_batches(tokens: Tensor, batches: int, batch_size: int, seq_len: int) -> list[Tensor]:
    """Always the same sequences, side by side or spread evenly: a list of (<= batch_size, seq_len) int64."""
    count = min(batches * batch_size, len(tokens) // seq_len)
    rows = [tokens[i * (len(tokens) - seq_len) // max(count - 1, 1) :][:seq_len] for i in range(count)]
    return [torch.stack(rows[i : i + batch_size]).long() for i in range(0, count, batch_size)]

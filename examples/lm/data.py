"""Real English text that every machine has: the language documentation inside CPython, as bytes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
BLOCK = 8192  # bytes; every tenth block is held out
HELD_OUT = 10


@dataclass(frozen=True)
class Text:
    """Bytes, and which of them are for training.

    Attributes:
        values: [N] int64.
        train, heldout: [start, end) of the contiguous parts.
    """

    values: Tensor
    train: tuple[tuple[int, int], ...]
    heldout: tuple[tuple[int, int], ...]
    sha256: str

    def starts(self, length: int) -> Tensor:
        """Where a training sequence of ``length`` bytes and the next byte may begin."""
        parts = [torch.arange(start, max(start, end - length)) for start, end in self.train]
        found = torch.cat(parts)
        if not len(found):
            raise ValueError(f"the text is too short for sequences of {length} bytes")
        return found

    def batch(self, starts: Tensor, size: int, length: int, seed: int, step: int) -> Tensor:
        """[size, length + 1]: a function of seed and step alone, whatever the number of ranks."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = starts[torch.randint(len(starts), (size,), generator=generator)]
        return self.values[chosen[:, None] + torch.arange(length + 1)]

    def heldout_windows(self, length: int) -> tuple[Tensor, Tensor]:
        """[W, length + 1] bytes and [W, length] whether the byte after each is to be predicted.

        Every held-out byte but the first of its part is predicted once, from at most ``length``
        bytes before it.
        """
        windows, wanted = [], []
        for first, end in self.heldout:
            for start in range(first, end - 1, length):
                known = self.values[start : min(start + length + 1, end)]
                missing = length + 1 - len(known)
                windows.append(torch.nn.functional.pad(known, (0, missing)))
                wanted.append(torch.arange(length) < length - missing)
        return torch.stack(windows), torch.stack(wanted)


def load(path: Path | None = None) -> Text:
    """The text of the topics of Python's help(), or of a file."""
    if path is not None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ValueError(f"--text must be a file that can be read: {error}") from error
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ValueError(
                "this Python comes without pydoc_data.topics; give a text with --text FILE"
            ) from error
        raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    if len(raw) < HELD_OUT * BLOCK:
        raise ValueError(f"the text must have at least {HELD_OUT * BLOCK} bytes; got {len(raw)}")
    train: list[tuple[int, int]] = []
    heldout: list[tuple[int, int]] = []
    for number, start in enumerate(range(0, len(raw), BLOCK)):
        part = (start, min(start + BLOCK, len(raw)))
        if number % HELD_OUT == HELD_OUT - 1:
            heldout.append(part)
        elif train and train[-1][1] == start:
            train[-1] = (train[-1][0], part[1])
        else:
            train.append(part)
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    return Text(values, tuple(train), tuple(heldout), hashlib.sha256(raw).hexdigest())


def entropies(text: Text) -> dict[str, float]:
    """What counting bytes and pairs of bytes gives, in nats per byte.

    Returns:
        unigram, bigram: entropy of a byte, and of a byte given the one before it, in the whole
            text: no model of these kinds can score better on it, since both have seen all of it.
        bigram_counted: a bigram model counted on the training part with add-one smoothing, scored
            on the held-out part, as the trained model is.
    """
    values = text.values
    pairs = _pairs(values, ((0, len(values)),))
    counted = _pairs(values, text.train).double() + 1
    scored = _pairs(values, text.heldout).double()
    logs = (counted / counted.sum(1, keepdim=True)).log()
    return {
        "unigram": _entropy(torch.bincount(values, minlength=VOCABULARY)),
        "bigram": _entropy(pairs) - _entropy(pairs.sum(1)),
        "bigram_counted": float(-(scored * logs).sum() / scored.sum()),
    }


def _pairs(values: Tensor, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """[256, 256] how often each byte follows each."""
    total = torch.zeros(VOCABULARY * VOCABULARY, dtype=torch.int64)
    for start, end in parts:
        part = values[start:end]
        total += torch.bincount(part[:-1] * VOCABULARY + part[1:], minlength=VOCABULARY**2)
    return total.view(VOCABULARY, VOCABULARY)


def _entropy(counts: Tensor) -> float:
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum()) if len(share) else math.nan

"""Small unsigned codes in the bits of signed words, the first code in the lowest bits.

Packing happens once, when a model is quantised, so it is plain torch; the kernels unpack while they load (w24_gemv.py).
torch has no arithmetic on unsigned words. Words are therefore signed, and a right shift copies the sign bit into the
upper bits; a mask after the shift removes them again, for a code in the highest bits, too.
"""

from __future__ import annotations

import torch

WORD_BITS = {torch.int16: 16, torch.int32: 32}


def codes_per_word(bits: int, word: torch.dtype = torch.int32) -> int:
    """Whole codes in a word; bits left over stay zero (2 of 32 for 3-bit codes). ValueError for other sizes."""
    if word not in WORD_BITS:
        raise ValueError(f"words are int16 or int32, not {word}")
    if bits not in (1, 2, 3, 4, 8):
        raise ValueError(f"codes have 1, 2, 3, 4 or 8 bits, not {bits}")
    return WORD_BITS[word] // bits


def check_codes(name: str, codes: torch.Tensor, bits: int) -> None:
    """Raises TypeError unless these are integers, ValueError unless they fit so many bits."""
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"{name} is {codes.dtype}: pass integers")
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < 1 << bits):
        raise ValueError(
            f"{name} goes from {int(codes.min())} to {int(codes.max())}: {bits} bits hold 0..{(1 << bits) - 1}"
        )


def pack(codes: torch.Tensor, bits: int, word: torch.dtype = torch.int32) -> torch.Tensor:
    """codes [..., n], integers in 0..2^bits - 1 -> words [..., ceil(n / codes per word)], the last filled with zeros.

    Raises ValueError for a code out of range, bits or word unknown, and TypeError for codes that are no integers.
    """
    each = codes_per_word(bits, word)
    check_codes("codes", codes, bits)
    words = -(-codes.shape[-1] // each)
    padded = torch.nn.functional.pad(codes.long(), (0, words * each - codes.shape[-1]))
    return join(padded.unflatten(-1, (words, each)), [bits] * each, word)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """words [..., w], int16 or int32 -> the first `count` codes, uint8 [..., count]. ValueError if there are fewer."""
    each = codes_per_word(bits, words.dtype)
    if not 0 <= count <= each * words.shape[-1]:
        raise ValueError(f"{words.shape[-1]} words of {each} codes do not hold {count}")
    if bits in (1, 2, 4, 8):  # codes do not cross bytes, and bytes are faster than words
        words, each = words.contiguous().view(torch.uint8), 8 // bits
    shifts = bits * torch.arange(each, device=words.device, dtype=words.dtype)
    codes = (words[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def join(fields: torch.Tensor, widths: list[int], word: torch.dtype) -> torch.Tensor:
    """fields [..., f] of these widths, in range -> one word [...] each, the first field in the lowest bits."""
    shifts = torch.tensor([sum(widths[:i]) for i in range(len(widths))], device=fields.device)
    value = (fields.long() << shifts).sum(-1)
    half = 1 << WORD_BITS[word] - 1
    return ((value + half) % (2 * half) - half).to(word)

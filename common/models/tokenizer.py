"""Tokenizers in the form that `transformers` loads: byte-level BPE from texts, and one token a word of a fixed list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, alone: str = "", special_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: any text is encoded without loss and decoded byte for byte.

    vocab_size: special tokens and the 256 bytes included. alone: characters that are never merged with others (digits
    and operators, for tasks whose symbols must each be a token). special_tokens: besides <|pad|> (id 0) and <|end|>
    (id 1, the end-of-sequence token). Deterministic for the same texts in the same order.
    Raises ValueError if the vocabulary cannot hold the bytes or the texts do not fill it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END, *special_tokens]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size must be at least {256 + len(special)}, not {vocab_size}")
    split: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if alone:
        characters = "".join(f"\\x{{{ord(c):x}}}" for c in alone)
        split.insert(0, pre_tokenizers.Split(Regex(f"[{characters}]"), "isolated"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give only {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(special_tokens),
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special tokens as `tokenizer(texts)` adds them, and nothing else: in half of its time."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(list(texts))]


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Whole numbers, words of lower-case letters and single other characters, each one token if it is in `words`.

    <|pad|> is id 0, <|end|> id 1 and <|unknown|>, for anything else, id 2; the words follow in their order.
    Raises ValueError for a word that stands twice.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(words)) != len(words):
        raise ValueError("a word stands twice in the vocabulary")
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[a-z]+|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )

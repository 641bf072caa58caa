"""The words of the small world and a Hugging Face tokenizer for them.

Every token is one word and words are separated by one space, so decoding and encoding are inverse to each
other: a response that is stored as text comes back as exactly the tokens that the model wrote.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
QUESTION, EQUALS, ANSWER = "?", "=", "#"
MODULUS = 7
DIGITS = tuple(str(digit) for digit in range(MODULUS))
OPERATIONS = ("+", "-", "*")
LABELS = tuple("abcdefgh")
CONNECTIVES = (",", ";", "so", "then")
FILLERS = ("ok", "um", "hmm", "now", "well", "thus", "and", "wait")
"""Words that mean nothing.  No lesson of the quickstart uses them; other worlds do (``arithmetic.Style``)."""

WORDS = (PAD, EOS, UNK, QUESTION, EQUALS, ANSWER, *DIGITS, *OPERATIONS, *LABELS, *CONNECTIVES, *FILLERS)
"""36 words: a vocabulary that 128 does not divide, so padding it for tensor parallelism is exercised."""
WORD_ID = {word: index for index, word in enumerate(WORDS)}
PAD_ID, EOS_ID, UNK_ID = WORD_ID[PAD], WORD_ID[EOS], WORD_ID[UNK]
ANSWER_PATTERN = r"#\s*(.*)$"
"""The place of the answer in a response (special tokens skipped)."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of teacher and student."""
    words = Tokenizer(WordLevel(WORD_ID, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,  # the clean-up writes "4," for "4 ,", which is another word
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(text: str) -> list[int]:
    """Ids of words separated by spaces; the same as the tokenizer gives, without its overhead."""
    return [WORD_ID[word] for word in text.split()]


def decode(token_ids: list[int]) -> str:
    """Words of the ids, special words skipped; the same as the tokenizer gives, without its overhead."""
    return " ".join(WORDS[index] for index in token_ids if index not in (PAD_ID, EOS_ID, UNK_ID))

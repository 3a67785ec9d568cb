"""Small tokenizers of the kinds that people bring: WordPiece, Metaspace with and without its piece, words alone."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

WORDS = "a b the cat sat on mat hello world again"


def word_piece():
    """Words of lower-case Latin letters, spaces between words dropped, the rest unknown."""
    pieces = ["[UNK]", "[CLS]", *WORDS.split(), *"abcdefghijklmnopqrstuvwxyz.,"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


def metaspace(*, piece=True):
    """SentencePiece-like, bytes for what it lacks; without its `piece` "▁" each space is three of these bytes."""
    pieces = ["<unk>", "<s>", *(["▁"] if piece else []), *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = []
    if piece:
        pieces += ["▁a", "▁w", "▁wo"]
        merges = [("▁", "a"), ("▁", "w"), ("▁w", "o")]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: number for number, name in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def unigram():
    """A unigram model of a few Latin pieces, whose unknown characters are one token, however many follow."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def silent_bpe():
    """A BPE without a token for the unknown: characters that it lacks vanish."""
    vocabulary = {name: number for number, name in enumerate(["<s>", *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def byte_level(*, normalizer=None, prefix=False):
    """GPT-2's bytes, with what makes ids say nothing of the bytes of a text: a normalizer, or a space before it."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {name: number for number, name in enumerate(["<|endoftext|>", *sorted(alphabet)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


KINDS = {
    "word_piece": word_piece,
    "metaspace": metaspace,
    "metaspace_without_piece": lambda: metaspace(piece=False),
    "unigram": unigram,
    "silent_bpe": silent_bpe,
    "byte_level_nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte_level_prefix": lambda: byte_level(prefix=True),
}


def save(kind, folder):
    """The path of a saved tokenizer of one of `KINDS`."""
    path = folder / f"{kind}.json"
    KINDS[kind]().save(str(path))
    return path

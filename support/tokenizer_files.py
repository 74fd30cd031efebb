"""Tokenizers of other people's models: in folders, in GGUF files, and back into a folder."""

import json
from pathlib import Path

from support.names import refuse_all_but
from support.tokenizer import GPT2_PATTERN, BPETokenizer, apply_merges, byte_letters

# SmolLM2 cuts out every digit first, and what lies between the digits by GPT-2's rule.
SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# How tokenizer.json says these two rules; trim_offsets does not change ids.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTE_LEVEL |= {"trim_offsets": True}
PRE_TOKENIZERS = {
    GPT2_PATTERN: [BYTE_LEVEL],
    SMOLLM_PATTERN: [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
# What else may stand in tokenizer.json and would change the ids.
UNSUPPORTED = ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix")
UNSUPPORTED += ("continuing_subword_prefix", "normalizer", "truncation", "padding")
UNSUPPORTED += ("lstrip", "rstrip", "single_word")
CONFIG = ("chat_template.jinja", "tokenizer_config.json")
FILES = ("tokenizer.json", "vocab.json", "merges.txt", *CONFIG)


class PretrainedTokenizer(BPETokenizer):
    """A `BPETokenizer` with what else its files say: the token that ends a text, a chat template.

    Its vocabulary may lack some bytes, which `encode` then leaves out, as transformers does.
    """

    eos_token: str | None = None
    chat_template: str | None = None

    def _encode_piece(self, piece: str) -> list[int]:
        ids = (self.vocab.get(bytes([b])) for b in piece.encode())
        return apply_merges([i for i in ids if i is not None], self._ranks)


def from_letters(vocab: dict[str, int], merges: list, special, pattern: str) -> PretrainedTokenizer:
    """Return the tokenizer of a vocabulary and merges that are written in byte letters."""
    byte_of = str.maketrans({letter: chr(byte) for letter, byte in byte_letters().items()})

    def to_bytes(token):
        return token.translate(byte_of).encode("latin-1")

    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return PretrainedTokenizer(
        {to_bytes(token): i for token, i in vocab.items() if token not in special},
        [(to_bytes(a), to_bytes(b)) for a, b in pairs],
        special,
        pattern,
    )


def read_tokenizer(folder: Path) -> PretrainedTokenizer | None:
    """Return the tokenizer in a folder, or None if there is none. Raises ValueError."""
    if (path := folder / "tokenizer.json").exists():
        tokenizer = from_tokenizer_json(path)
    elif (path := folder / "vocab.json").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        vocab = json.loads(path.read_bytes())
        made = {merge.replace(" ", "") for merge in merges}  # a special token no merge can make
        special = {t: i for t, i in vocab.items() if len(t) > 1 and t not in made}
        tokenizer = from_letters(vocab, merges, special, GPT2_PATTERN)
    else:
        return None
    template, config = (folder / name for name in CONFIG)
    said = json.loads(config.read_bytes()) if config.exists() else {}
    end = said.get("eos_token")
    tokenizer.eos_token = end["content"] if isinstance(end, dict) else end
    tokenizer.chat_template = said.get("chat_template")
    if template.exists():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def from_tokenizer_json(path: Path) -> PretrainedTokenizer:
    """Return the tokenizer in a tokenizer.json, if it is a byte-level BPE as we know it."""
    file = json.loads(path.read_bytes())
    model, added = file["model"], file["added_tokens"]
    if model["type"] != "BPE":
        raise ValueError(f"{path} is a {model['type']} tokenizer, and ours can only do BPE.")
    if found := [key for part in (file, model, *added) for key in UNSUPPORTED if part.get(key)]:
        raise ValueError(f"{path} asks for {found[0]!r}, which our tokenizer does not have.")
    steps = file["pre_tokenizer"] or {}
    steps = [
        BYTE_LEVEL | step | {"trim_offsets": True} if step.get("type") == "ByteLevel" else step
        for step in steps.get("pretokenizers", [steps])
    ]
    if not (patterns := [known for known, rule in PRE_TOKENIZERS.items() if rule == steps]):
        raise ValueError(f"{path} cuts text by a rule that our tokenizer does not have: {steps}")
    special = {token["content"]: token["id"] for token in added}
    return from_letters(model["vocab"], model["merges"], special, patterns[0])


def gguf_tokenizer(said: dict, path: Path) -> PretrainedTokenizer:
    """Return the byte-level BPE tokenizer in a GGUF file's metadata."""
    said = {name.removeprefix("tokenizer."): value for name, value in said.items()}
    refuse_all_but(said, path, {"ggml.model": ["gpt2"], "ggml.pre": ["smollm"]})
    tokens, ordinary = said["ggml.tokens"], 1
    vocab = {token: i for i, token in enumerate(tokens)}
    kinds = zip(tokens, said["ggml.token_type"], strict=True)
    special = {token: vocab[token] for token, kind in kinds if kind != ordinary}
    tokenizer = from_letters(vocab, said["ggml.merges"], special, SMOLLM_PATTERN)
    tokenizer.eos_token = tokens[said["ggml.eos_token_id"]]
    tokenizer.chat_template = said.get("chat_template")
    return tokenizer


def tokenizer_files(tokenizer: BPETokenizer) -> dict[str, dict]:
    """Return what transformers reads: the contents of tokenizer.json and tokenizer_config.json."""
    if tokenizer.pattern not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.json has no name for the pattern {tokenizer.pattern!r}.")
    letter_of = {byte: letter for letter, byte in byte_letters().items()}

    def to_letters(token):
        return "".join(letter_of[byte] for byte in token)

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = tokenizer.special_tokens
    added = [{"id": i, "content": t, **flags, "special": True} for t, i in special.items()]
    vocab = special | {to_letters(token): i for token, i in tokenizer.vocab.items()}
    if len(vocab) < len(special) + len(tokenizer.vocab):
        raise ValueError("A special token is spelled like an ordinary one: rename it.")
    merges = [[to_letters(a), to_letters(b)] for a, b in tokenizer.merges]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": PRE_TOKENIZERS[tokenizer.pattern],
        },
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text(tokenizer)}
    if template := getattr(tokenizer, "chat_template", None):
        config["chat_template"] = template
    return {"tokenizer.json": whole, "tokenizer_config.json": config}


def end_of_text(tokenizer: BPETokenizer) -> str | None:
    """Return the special token that ends a text: the one its files name, or <|endoftext|>."""
    usual = "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None
    return getattr(tokenizer, "eos_token", None) or usual

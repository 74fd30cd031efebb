"""Speed of our tokenizer against tiktoken and Hugging Face's tokenizers, in turn, as medians."""

import time
from statistics import median

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from support.data import load_text, tiktoken_gpt2
from support.tokenizer import BPETokenizer

REPEATS = 7
text = load_text("shakespeare")
part = text[:1_000_000]
ours, openai = BPETokenizer.gpt2(), tiktoken_gpt2()


def train_theirs():
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1256, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([part], trainer)


def paired(name, unit, amount, mine, peer_name, peer):
    """Print one row: both run in turn, and the ratio is the median of the pairs."""
    mine(), peer()  # warm
    pairs = []
    for _ in range(REPEATS):
        times = []
        for run in (mine, peer):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        pairs.append(times)
    a, b = (amount / median(column) for column in zip(*pairs, strict=True))
    ratio = median(peer / mine for mine, peer in pairs)
    print(f"| {name} | {a:.2f} {unit} | {peer_name} {b:.2f} {unit} | {ratio:.2f} |")


print("| what | ours | the peer | ratio |\n|---|---|---|---|")
megabytes = len(text.encode()) / 1e6
paired(
    "encode the plays, warm",
    "MB/s",
    megabytes,
    lambda: ours.encode(text),
    "tiktoken",
    lambda: openai.encode_ordinary(text),
)
paired(
    "train 1,000 merges on 1 MB",
    "runs/s",
    1,
    lambda: BPETokenizer.train(part, 1256),
    "tokenizers (Rust)",
    train_theirs,
)

"""Measure perplexity by the protocols of the GPTQ paper and its successors, to compare with published numbers.

    python scripts/perplexity.py facebook/opt-125m                                     # WikiText-2
    python scripts/perplexity.py ./llama-4bit --protocol c4-new --source c4-validation.00000-of-00008.json.gz
    python scripts/perplexity.py ./llama-4bit --protocol ptb --source ptb.valid.txt

    wikitext2   test split of WikiText-2 raw, rows joined by blank lines
    ptb         validation split of the Penn Treebank, sentences joined by blank lines (the GPTQ paper)
    ptb-new     its test split, sentences joined by spaces
    c4          256 windows from C4's first validation shard, each at a random position of a random document that is
                long enough, drawn by Python's generator with seed 0 (the GPTQ paper)
    c4-new      the first 256 windows of the first 1100 documents of that shard, joined by spaces

Windows have 2048 tokens and do not overlap; an incomplete window at the end is dropped. The text is tokenized as a
whole. So a beginning-of-text token, if the tokenizer adds one, is only at the start of the text, not of each window (c4
tokenizes documents one by one, so a window has it only at the start of its document). The perplexity is exp of the
mean loss over the 2047 predicted tokens of each window.

Expected results for wikitext2 and the unquantized model in float16:

    facebook/opt-125m           27.65
    meta-llama/Llama-2-7b-hf     5.47

Reproduce one of them before you quote other numbers. A different split, separator, tokenizer or window length, or a
beginning-of-text token per window, gives a different but equally plausible number.

--source is a local copy in any form that `gptq eval --data` takes (column `text`, for ptb `sentence`); for wikitext2
and ptb also the plain text file with one row per line. ptb needs --source, because the Hub has it as a script, which
`datasets` no longer runs.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gptq import calibration
from gptq.checkpoint.hub import resolve
from gptq.errors import InputError
from gptq.evaluation import evaluate
from gptq.inference.load import load
from gptq.models.hf_config import fit_seq_len, read_config, read_tokenizer

SEQ_LEN, C4_WINDOWS, C4_DOCUMENTS = 2048, 256, 1100


@dataclass(frozen=True)
class Protocol:
    """The rows of a protocol and the separator that joins them; None if windows are drawn from single rows."""

    source: str
    column: str
    joint: str | None
    max_rows: int | None = None
    max_windows: int | None = None


PTB = "ptb-text-only/ptb_text_only:penn_treebank"
PROTOCOLS = {
    "wikitext2": Protocol("wikitext:wikitext-2-raw-v1:test", "text", "\n\n"),
    "ptb": Protocol(f"{PTB}:validation", "sentence", "\n\n"),
    "ptb-new": Protocol(f"{PTB}:test", "sentence", " "),
    "c4": Protocol("c4:validation", "text", None, None, C4_WINDOWS),
    "c4-new": Protocol("c4:validation", "text", " ", C4_DOCUMENTS, C4_WINDOWS),
}


def read_rows(protocol: Protocol, source: str) -> Sequence[str]:
    """Rows as in the Hub's data set; a plain text file is split by the same rules as that data set was.

    WikiText's rows keep their newline, except empty ones; the Penn Treebank's sentences are stripped.
    """
    file = Path(source)
    if file.suffix not in (".txt", ".raw", ".tokens") or not file.is_file():
        return calibration.documents(source, protocol.source.rpartition(":")[2], protocol.column)
    if protocol.source.startswith("c4"):
        raise InputError(f"{source}: C4 is measured on its documents, which a text file does not keep apart")
    with file.open(encoding="utf-8") as lines:
        if protocol.column == "sentence":
            return [line.strip() for line in lines]
        return [line if line.strip() else "" for line in lines]


def protocol_windows(
    protocol: Protocol, rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None = None
) -> Tensor:
    """The windows (windows, seq_len) of the protocol, or the first `limit` of them."""
    limit = min((n for n in (protocol.max_windows, limit) if n is not None), default=None)
    if protocol.joint is None:
        return _drawn_windows(rows, tokenizer, seq_len, limit or C4_WINDOWS)
    text = protocol.joint.join(row or "" for row in rows[: protocol.max_rows])
    return calibration.evaluation_windows([text], tokenizer, seq_len, limit)


def _drawn_windows(rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, count: int) -> Tensor:
    """Draw windows as the GPTQ paper draws those of C4: a random position in a random long enough document."""
    draw = random.Random(0)
    tried: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < count:
        row = draw.randint(0, len(rows) - 1)
        tokens = calibration.tokenize([rows[row]], tokenizer)
        tried.add(row)
        if len(tokens) >= seq_len:
            start = draw.randint(0, len(tokens) - seq_len - 1) if len(tokens) > seq_len else 0
            windows.append(tokens[start : start + seq_len])
        elif not windows and len(tried) == len(rows):
            raise InputError(f"none of the {len(rows)} documents has the {seq_len} tokens of a window")
    return torch.stack(windows)


def measure(args: argparse.Namespace) -> evaluate.Perplexity:
    """Measure the model by the protocol; print notes on what makes the number not comparable."""
    protocol = PROTOCOLS[args.protocol]
    folder = resolve(args.model, None)
    seq_len, notes = fit_seq_len(args.seq_len, read_config(folder, args.trust_remote_code))
    tokenizer = read_tokenizer(folder, args.trust_remote_code)
    rows = read_rows(protocol, args.source or protocol.source)
    if args.protocol == "wikitext2" and any("<unk>" in row for row in rows[:1000] if row):
        notes.append("this text has <unk> in it: it is the tokenized WikiText-2, the protocol's is the raw one")
    if seq_len != SEQ_LEN:
        notes.append(f"published numbers are of windows of {SEQ_LEN}")
    if args.windows:
        notes.append("published numbers are of all windows, not the first ones")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    windows = protocol_windows(protocol, rows, tokenizer, seq_len, args.windows)
    network = load(folder, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    with tqdm(total=len(windows), unit="window", disable=None) as bar:

        def window_done(done: int, total: int) -> None:
            bar.update()

        return evaluate.measure_perplexity(network, windows, window_done)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("is at least 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id, quantized or not")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="wikitext2", help="default: %(default)s")
    parser.add_argument("--source", metavar="SRC", help="local copy of the protocol's data (default: the Hub's)")
    parser.add_argument("--seq-len", type=positive, default=SEQ_LEN, metavar="N", help="default: %(default)s")
    parser.add_argument("--windows", type=positive, metavar="N", help="only the first N, for a quick look")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="float16 is what the papers take (default: config.json's)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one JSON object to stdout")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    try:
        found = measure(args)
    except InputError as error:
        print(f"perplexity.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"protocol": args.protocol, **found.to_dict()}))
    else:
        print(f"{args.protocol}: perplexity {found.perplexity:.2f}, {found.windows} windows of {found.seq_len} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

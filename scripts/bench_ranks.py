"""Time the same run with one process and with several, in turns, one thread per process; compare the bytes.

    python scripts/bench_ranks.py [--ranks 2] [--rounds 2] [--width 1024 ...] [--json FILE]

The model and its calibration tokens are those of bench_quantize.py; options are the package's defaults at 4 bits. Times
are of the whole command, started by torchrun, imports included. The shards of all results must be equal byte for byte.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_quantize import add_model_options, calibration_tokens, make_model
from safetensors.torch import save_file


def quantize(model: Path, tokens: Path, out: Path, ranks: int) -> float:
    """Run the command in `ranks` processes; return its seconds."""
    shutil.rmtree(out, ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "-m", "gptq"]
    command = [*launcher, "quantize", str(model), str(out), "--calibration", str(tokens), "--device", "cpu"]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - began


def checksum(out: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="beside one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    add_model_options(parser)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], args.ranks: []}
    sums: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = Path(folder, "model"), Path(folder, "tokens.safetensors")
        make_model(model, args.width, args.blocks, args.intermediate, args.vocabulary)
        save_file({"input_ids": calibration_tokens(args.windows, args.tokens, args.vocabulary)}, tokens)
        for number in range(args.rounds):
            for ranks in sorted(seconds, reverse=bool(number % 2)):
                seconds[ranks].append(quantize(model, tokens, Path(folder, "out"), ranks))
                sums.add(checksum(Path(folder, "out")))
                print(f"round {number + 1}: {ranks} in {seconds[ranks][-1]:.1f} s", flush=True)
    middle = {ranks: statistics.median(values) for ranks, values in seconds.items()}
    speedup = middle[1] / middle[args.ranks]
    print(
        f"{args.ranks} processes take 1/{speedup:.2f} of one's time; bytes are {'equal' if len(sums) == 1 else 'NOT'}"
    )
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "speedup": speedup, "equal_bytes": len(sums) == 1}))
    sys.exit(len(sums) != 1)


if __name__ == "__main__":
    main()

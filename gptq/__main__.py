"""The command `gptq`, also as `python -m gptq`."""

import os
import sys

# Torch asks for large pages where it takes large memory, if it finds this when it is loaded: memory that is given back
# after every step, as here, costs a fault for each page when it is taken again.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}


def main() -> int:
    """Run the command line; an interrupt is answered with a sentence even while the libraries are being imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from gptq.cli.arguments import main as run

        return run()
    except KeyboardInterrupt:
        print("gptq: interrupted; nothing half-written was left behind", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

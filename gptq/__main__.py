"""The command `gptq`, also as `python -m gptq`."""

import os
import sys

# torch reads this when it is imported, and then allocates large tensors in transparent huge pages. A run returns freed
# memory after every layer and faults it in again; larger pages mean fewer page faults.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}


def main() -> int:
    """Run the command line; an interrupt prints a message instead of a traceback, even during imports."""
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

"""The command `gptq`, also as `python -m gptq`."""

import os
import sys
from contextlib import suppress
from io import TextIOWrapper

# torch reads this when it is imported, and then allocates large tensors in transparent huge pages. A run returns freed
# memory after every layer and faults it in again; larger pages mean fewer page faults. The others are for `datasets`,
# which is imported where a source of text needs it; its errors are raised as well as logged.
ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "critical",
}

# OpenMP's threads spin while they wait for each other. On a machine with other work that takes the time of the thread
# they wait for: the demo, a small model, took more than twice as long. Sleeping costs a long run a little.
DEMO_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def main() -> int:
    """Run the command line; an interrupt prints a message instead of a traceback, even during imports."""
    environment = ENVIRONMENT | (DEMO_ENVIRONMENT if sys.argv[1:2] == ["demo"] else {})
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from gptq.cli.arguments import main as run

        return run()
    except KeyboardInterrupt:
        print("gptq: interrupted; nothing half-written was left behind", file=sys.stderr)
        return 130  # as in a shell: 128 and the number of the signal
    except OSError as error:  # of printing, for example, on a full disk; by itself Python would exit with verify's 1
        with suppress(OSError):
            print(f"gptq: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

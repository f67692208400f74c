"""The command `gptq`, also as `python -m gptq`."""

import sys


def main() -> int:
    """Run the command line; an interrupt is answered with a sentence even while the libraries are being imported."""
    try:
        from gptq.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("gptq: interrupted; nothing half-written was left behind", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

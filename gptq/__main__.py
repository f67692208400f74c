"""`python -m gptq` is the command `gptq`."""

import sys

from gptq.cli import main

sys.exit(main())

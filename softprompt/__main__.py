"""Run the command line with `python -m softprompt`."""

import sys

from softprompt.cli.main import main

sys.exit(main())

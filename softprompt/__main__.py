"""Run the command line with `python -m softprompt`."""

import sys

from softprompt.cli.signals import end_on_signals

end_on_signals()  # a signal may arrive during the slower imports

from softprompt.cli.main import main  # noqa: E402

sys.exit(main())

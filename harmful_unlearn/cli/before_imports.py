"""What a command sets before it imports the libraries.

Ctrl-C while they are imported ends it at once, without a traceback: some libraries turn an interrupt of their imports
into another error. `exit_code` then takes over.

A progress bar that goes into a file, such as a scheduler's log, is drawn every half a minute.
"""

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background of a shell
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")  # which tqdm reads when it is imported

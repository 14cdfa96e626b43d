"""Imported before the libraries: Ctrl-C while a command imports them ends it at once, without a traceback.

`cli.exit_code` then takes over. Some libraries turn an interrupt of their imports into another error.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background of a shell
    signal.signal(signal.SIGINT, signal.SIG_DFL)

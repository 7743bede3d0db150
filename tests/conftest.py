"""For all tests."""

import signal

# A shell that starts the tests in the background lets them ignore SIGINT, and every process that they start as well:
# those that are interrupted by a test would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

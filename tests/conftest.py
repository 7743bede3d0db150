"""For all tests."""

import signal

from hypothesis import HealthCheck, settings

# No test fails because a machine is busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that starts the tests in the background lets them ignore SIGINT, and every process that they start as well:
# those that are interrupted by a test would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Memory of a process: a limit on what it may ask for, and what it takes at its peak."""

import contextlib
import resource

import torch

# For programs of their own: what a call takes at its peak, in bytes, what is outside of tensors included.
PEAK = """
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(function):
    # Writing 5 sets the high-water mark back to what is in use now.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    kept = function()
    return status("VmHWM") - before
"""


@contextlib.contextmanager
def little_memory(limit=300 << 20):
    """Allocations beyond this fail here, so that a test sees them."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


class Peak:
    """The most bytes of tensors on the CPU that were there at a time in the context, beyond those at its start."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = self.bytes = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


def peak(function):
    function()  # what is made once is there
    with Peak() as found:
        function()
    return found.bytes

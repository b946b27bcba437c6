"""What the kernel has to do for memory that is freed and asked for again."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from dmd import allocator
{first}
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        held = [torch.empty(4 << 18).fill_(0.0) for _ in range(60)]  # 240 MiB, as an iteration's activations
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
print(faults(5))
"""


def _faults(first: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT.format(first=first)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again_without_new_pages():
    without, kept = _faults(""), _faults("allocator.keep_freed()")
    assert without >= 5  # at least one a round, as huge as the pages may be
    assert kept < without / 10


def test_another_c_library_is_left_alone(monkeypatch):
    from dmd import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)  # would raise if it were called
    allocator.keep_freed()

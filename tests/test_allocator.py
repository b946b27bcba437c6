"""What the C library keeps of memory that is freed, by its own account: not every kernel counts page faults."""

import platform
import subprocess
import sys

import pytest

MIB = 1 << 20
HELD = f"""
import ctypes, torch
from dmd import allocator

class Mallinfo2(ctypes.Structure):  # of glibc's malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

def from_kernel():
    info = mallinfo2()
    return info.arena + info.hblkhd

%s
before, during, after = from_kernel(), [], []
for _ in range(4):
    held = [torch.empty({MIB}).fill_(0.0) for _ in range(60)]  # 240 MiB, as an iteration's activations
    during.append(from_kernel() - before)
    del held
    after.append(from_kernel() - before)
print(max(during), min(after))
"""


def _from_kernel(first: str) -> tuple[int, int]:
    """Bytes that rounds of activations add at most while they are alive, and at least once they are freed."""
    done = subprocess.run([sys.executable, "-c", HELD % first], capture_output=True, text=True, check=True)
    during, after = done.stdout.split()
    return int(during), int(after)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 33),
    reason="mallinfo2 is glibc's, since 2.33",
)
def test_freed_memory_stays_with_the_process():
    during, after = _from_kernel("")
    assert during >= 240 * MIB
    assert after < 80 * MIB  # glibc's own way: handed back, unless something else lies above
    during, after = _from_kernel("allocator.keep_freed()")
    assert 240 * MIB <= during < 400 * MIB  # each round uses those of the last
    assert after >= 240 * MIB


def test_another_c_library_is_left_alone(monkeypatch):
    from dmd import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)  # would raise if it were called
    allocator.keep_freed()

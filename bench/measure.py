"""Helpers of the commands of `python -m bench`: tables, CPU time and memory."""
import time
from pathlib import Path


def table(title, rows):
    """Print rows of (what, figure, bar, met: bool or None); returns the number of bars that were missed."""
    print(f"\n{title}")
    for what, figure, bar, met in rows:
        print(f"  {what:<46} {figure:>16}   {bar:<16} {'' if met is None else 'ok' if met else 'MISSED'}")
    return sum(met is False for *_, met in rows)


def cpu_time(call, repeats=9):
    """Median process CPU seconds of a call, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


def peak_memory(call):
    """The peak of resident memory during a call in MiB above that before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_status("VmRSS")
    call()
    return memory_status("VmHWM") - before


def memory_status(key):
    """An entry of Linux's /proc/self/status in MiB: VmRSS is the present memory of this process, VmHWM its peak."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) / 1024

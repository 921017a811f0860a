"""Does it fit? What a run took at its peak, against what the card, or the computer, has."""

from qtune.sizes import size_text
from qtune.verdicts.facts import Facts
from qtune.verdicts.verdict import Verdict

CLOSE = 0.95
"""A share of the memory above which a longer row, or another program, would be too much. Ours: no source names one."""


def fits(facts: Facts) -> Verdict:
    """The verdict of a run's memory.json."""
    record = facts.memory
    if record is not None and record.failure is not None:
        told = "memory ran out, and the report below says in which phase and what would have fit"
        return Verdict("fits", "bad", "Does not fit", told, f"qtune profile {facts.run}")
    measured = record.measured if record is not None else None
    phases = (measured or {}).get("phases", {}).values()
    on_card = (measured or {}).get("device") != "cpu"
    keys = ("device_used_bytes", "reserved_peak_bytes", "allocated_peak_bytes") if on_card else ("resident_peak_bytes",)
    peaks = (max((phase.get(key, 0) for phase in phases), default=0) for key in keys)
    peak = next((one for one in peaks if one), 0)
    if not peak:
        return Verdict("fits", "open", "Not measured", "the run did not reach the end that measures its memory")
    device = facts.lock.last_device if facts.lock else None
    total = device.total_bytes if device else None
    what = "the card" if on_card else "this process"
    if not total:
        return Verdict("fits", "good", "Fits", f"{what} took {size_text(peak)} at its peak")
    share = peak / total
    told = f"{what} took {size_text(peak)} of {size_text(total)} at its peak ({share:.0%})"
    if share > CLOSE:
        return Verdict("fits", "unsure", "Fits barely", told, f"qtune profile {facts.run} shows what takes it")
    return Verdict("fits", "good", "Fits", told)

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
    peak, what = _peak(facts)
    if not peak:
        return Verdict("fits", "open", "Not measured", "no step has been taken that could be measured")
    total = facts.lock.last_device.total_bytes if facts.lock else None
    if not total or what == TENSORS:
        return Verdict("fits", "good", "Fits", f"{what} took {size_text(peak)} at the peak")
    share = peak / total
    told = f"{what} took {size_text(peak)} of {size_text(total)} at the peak ({share:.0%})"
    if share > CLOSE:
        return Verdict("fits", "unsure", "Fits barely", told, f"qtune profile {facts.run} shows what takes it")
    return Verdict("fits", "good", "Fits", told)


CARD, PROCESS, TENSORS = "the card", "the process", "the tensors of a step"
ON_CARD = ("device_used_bytes", "reserved_peak_bytes", "allocated_peak_bytes")
"""From the widest to the narrowest; the first that was measured counts."""


def _peak(facts: Facts) -> tuple[int, str]:
    """The most bytes that were taken, and by what: as memory.json has it of all parts on the run's last device, and
    before its end as the metrics do. A part that was killed is in the metrics alone; on a processor they count the same
    as memory.json does."""
    parts = facts.memory.parts_on_last_device if facts.memory else ()
    measured = (facts.memory and facts.memory.measured) or {}
    kind = measured.get("device") or (facts.lock.last_device.kind if facts.lock else None) or "cuda"
    keys, what = (("resident_peak_bytes",), PROCESS) if kind == "cpu" else (ON_CARD, CARD)
    phases = [phase for part in parts for phase in part.get("phases", {}).values()]
    logged = max((one.memory_peak_bytes for one in facts.train), default=0)
    for key in keys:
        if peak := max((phase.get(key, 0) for phase in phases), default=0):
            return (max(peak, logged) if what == PROCESS else peak), what
    if tensors := measured.get("peak_bytes", 0):
        return tensors, TENSORS
    return logged, f"{what}, so far,"

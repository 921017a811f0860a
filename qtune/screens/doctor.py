"""The screen of `qtune doctor`."""

from typing import TYPE_CHECKING

from qtune import console

if TYPE_CHECKING:
    from qtune.diagnosis import Diagnosis


def show(findings: "list[Diagnosis]") -> None:
    """Prints the findings by topic, and what to do about problems and notes."""
    marks = {"ok": "✓", "note": "•", "problem": "✗"}
    topics = dict.fromkeys(finding.topic for finding in findings)
    for topic in topics:
        rows = [
            [
                marks[finding.verdict],
                finding.name,
                f"{finding.value} ({finding.advice})" if finding.advice else finding.value,
            ]
            for finding in findings
            if finding.topic == topic
        ]
        console.out(console.table("", ["", topic, ""], rows))
        console.out("")
    problems = sum(finding.verdict == "problem" for finding in findings)
    console.out(f"{problems} problems" if problems != 1 else "1 problem")

"""Is the export the model that was trained? What the exported folders of a run have been proven to be."""

from qtune.export.verification import Proof
from qtune.verdicts.facts import Facts
from qtune.verdicts.verdict import Verdict


def exported(facts: Facts) -> Verdict:
    """The verdict of all folders inside the run: as bad as the worst of them."""
    if not facts.exports:
        if facts.train and not facts.train[-1].is_finite:
            return Verdict("export", "open", "Not exported", "the run has diverged")
        if not facts.is_finished:
            return Verdict("export", "open", "Not exported", "the run has not ended", f"qtune run --resume {facts.run}")
        told = "no export is in the run's folder"
        return Verdict("export", "open", "Not exported", told, f"qtune export {facts.run}")
    wrong = [(name, proof) for name, proof in facts.exports if not proof.verified]
    if wrong:
        name, proof = wrong[0]
        reason = proof.failures[0] if proof.failures else "it was not compared with the trained model"
        return Verdict("export", "bad", "Not proven", f"{name}: {reason}", f"qtune export {facts.run} --force")
    spoiled = [(name, one) for name, proof in facts.exports for one in proof.gguf.values() if one.failures]
    if spoiled:
        name, file = spoiled[0]
        return Verdict("export", "bad", "GGUF not proven", f"{name}/{file.file}: {file.failures[0]}")
    return Verdict("export", "good", "Proven", "; ".join(_proven(name, proof) for name, proof in facts.exports))


def _proven(name: str, proof: Proof) -> str:
    found = proof.figures
    files = "".join(f", {one.file} proven too" for one in proof.gguf.values())
    if found is None:
        return f"{name}: the model that was trained{files}"
    told = f"{name}: KL to the trained model {found.exported.kl:.1e} nats per token, limit {found.limits.kl:.1e}"
    equal = f", greedy answers equal: {found.answers_equal} of {len(found.answers)}" if found.answers else ""
    return f"{told}, on {found.rows} rows{equal}{files}"

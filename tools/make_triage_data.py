"""Writes rows of a classification with two things to read out: letters to a shop -> topic, product and order number.

    python tools/make_triage_data.py FOLDER         # writes triage_{train,validation,test}.jsonl there

The same seed always gives the same files. Every topic has phrasings that stand in the training rows alone, and others
for validation and test alone; so have the products. Order numbers are drawn, and no two letters have the same one. So
a row is answered by knowing what a topic is and by copying, never by remembering a sentence.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 31
ROWS = {"train": 480, "validation": 120, "test": 120}

TOPICS = {
    "delivery": (
        "The parcel has not arrived yet", "The tracking page has not changed for days", "Nobody has brought my parcel",
        "The courier left it with a stranger", "It was sent to my old address", "It should have been here on Monday",
        "I am still waiting for it to come", "The driver drove past my house again", "It seems to be lost on the way",
    ),
    "refund": (
        "I would like my money back", "You charged me twice", "The refund is not on my account",
        "I sent it back but was not paid", "The discount was not taken off", "My card was billed the wrong sum",
        "Please return what I paid", "The amount on the bill is too high", "When will I be repaid?",
    ),
    "defect": (
        "It stopped working after two days", "The handle is broken", "It makes a terrible noise",
        "One part is cracked", "It does not switch on", "The lid does not close",
        "It came with a dent and leaks", "There is smoke when I use it", "It fell apart in my hands",
    ),
    "exchange": (
        "I need it in another size", "You sent the wrong colour", "Can I swap it for the larger one?",
        "I ordered the blue one and got red", "Please take it back and send the other model", "It is too small for us",
        "I would rather have the one with a cord", "Could I change it for a newer one?", "This is not the one I chose",
    ),
    "praise": (
        "It works wonderfully", "I am very happy with it", "Thank you for the quick help",
        "My whole family loves it", "The best one that I ever had", "I will order here again",
        "What a lovely thing to own", "Everything went perfectly", "I recommend it to all my friends",
    ),
    "question": (
        "How do I clean it?", "Is there a manual in Spanish?", "Which batteries does it take?",
        "Can it be used outdoors?", "How long is the guarantee?", "Does it fit a round table?",
        "May I put it in the dishwasher?", "What does the second button do?", "Where can I get spare parts?",
    ),
}  # fmt: skip
"""Six phrasings of each topic are for training, three for validation and test."""
PRODUCTS = (
    "kettle", "lamp", "toaster", "blender", "bicycle bell", "tent", "backpack", "desk chair", "radio", "alarm clock",
    "hammock", "mirror", "drill", "garden hose", "printer", "umbrella", "coffee mill", "sleeping bag", "heater",
    "ladder",
)  # fmt: skip
"""Fourteen of them are for training, six for validation and test."""
OPENINGS = ("Hello,", "Dear team,", "Good morning,", "Hi there,", "To whom it may concern:", "")
LETTERS = (
    "{opening} this is about the {product} of order {order}. {said}{end}",
    "{opening} {said} (order {order}, {product}){end}",
    "{opening} I bought a {product}, order number {order}. {said}{end}",
    "{opening} order {order}: {said} It is the {product}.",
    "{said} My {product} has the order number {order}. Regards",
    "{opening} regarding my {product}: {said} The order was {order}.",
)


def letter(random_: random.Random, order: int, *, seen: bool) -> tuple[str, str]:
    """One letter and what is to be read out of it; `seen` phrasings and products are those of training."""
    topic = random_.choice(sorted(TOPICS))
    said = random_.choice(TOPICS[topic][:6] if seen else TOPICS[topic][6:])
    product = random_.choice(PRODUCTS[:14] if seen else PRODUCTS[14:])
    sentence = said if said.endswith("?") else f"{said}."
    end = random_.choice(("", " Thanks", " Regards"))
    text = random_.choice(LETTERS).format(
        opening=random_.choice(OPENINGS), product=product, order=order, said=sentence, end=end
    )
    return text.strip(), f"{topic} | {product} | {order}"


def make_rows(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """Rows of each split, in the "messages" form."""
    random_ = random.Random(seed)
    orders = iter(random_.sample(range(10_000, 100_000), sum(ROWS.values())))
    return {
        split: [conversation(*letter(random_, next(orders), seen=split == "train")) for _ in range(count)]
        for split, count in ROWS.items()
    }


def conversation(request: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_rows().items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"triage_{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()

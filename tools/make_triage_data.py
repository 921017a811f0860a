"""Writes rows of a classification with two things to read out: letters to a shop -> topic, product and order number.

    python tools/make_triage_data.py FOLDER         # writes triage_{train,validation,test}.jsonl there

The same seed always gives the same files. Each of the three has phrasings of every topic and products of its own, so
that what is chosen by the validation rows is not chosen for the test rows as well. Order numbers are drawn, and no two
letters have the same one. So a row is answered by knowing what a topic is and by copying, never by remembering a
sentence.
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
        "The postman says that he has nothing for me", "When will you send it?", "It is stuck in a warehouse",
        "You promised it within three days", "The box was left in the rain", "The driver could not find our street",
        "I am still waiting for it to come", "The driver drove past my house again", "It seems to be lost on the way",
        "Two weeks have passed and nothing came", "It was handed to my neighbour", "Has it left your store already?",
        "The truck never showed up", "Nothing has reached me so far", "It went to the wrong town",
        "The map shows it in another country", "They rang once and took it away again", "How long will it travel?",
    ),
    "refund": (
        "I would like my money back", "You charged me twice", "The refund is not on my account",
        "I sent it back but was not paid", "The discount was not taken off", "My card was billed the wrong sum",
        "You took more than the price in the shop", "I cancelled and still had to pay", "The voucher was not counted",
        "I never got the cash that you owe me", "Why is the invoice so large?", "Please transfer the sum to my bank",
        "Please return what I paid", "The amount on the bill is too high", "When will I be repaid?",
        "I paid for shipping that was free", "The credit has not come through", "I want the full price returned",
        "Your bill counts the same thing two times", "My bank shows a payment that I never made",
        "Give me back what it cost", "The price went down after I had paid", "I was told I would be reimbursed",
        "The receipt says more than I agreed to",
    ),
    "defect": (
        "It stopped working after two days", "The handle is broken", "It makes a terrible noise",
        "One part is cracked", "It does not switch on", "The lid does not close",
        "A screw is missing", "It smells burnt", "The surface is full of scratches",
        "It turns itself off all the time", "Water runs out at the bottom", "The seam is torn",
        "It came with a dent and leaks", "There is smoke when I use it", "It fell apart in my hands",
        "The button is stuck", "It rattles and then goes dead", "There is a hole in it",
        "It broke on the first evening", "The paint is coming off", "It gets far too hot",
        "The zip does not move any more", "Half of it is bent", "It gave me an electric shock",
    ),
    "exchange": (
        "I need it in another size", "You sent the wrong colour", "Can I swap it for the larger one?",
        "I ordered the blue one and got red", "Please take it back and send the other model", "It is too small for us",
        "I picked the wrong version by mistake", "I want the black one in its place", "Is it possible to trade it in?",
        "It will not do, send the tall one", "We need the left-handed kind", "A lighter one, please",
        "Could I change it for a newer one?", "I would rather have the one with a cord", "This is not the one I chose",
        "Let me have the wide one instead", "It should be green, not grey", "The other type would suit us better",
        "I got the short one but asked for the long one", "May I switch to the bigger kind?",
        "Send me a different pattern, please", "I took the wrong size", "It is the white one that we wanted",
        "Please replace it with last year's model",
    ),
    "praise": (
        "It works wonderfully", "I am very happy with it", "Thank you for the quick help",
        "My whole family loves it", "The best one that I ever had", "I will order here again",
        "It looks even better than on the picture", "You are a great team", "I could not be more pleased",
        "It was worth every penny", "Five stars from us", "Such good quality is rare",
        "Everything went perfectly", "I recommend it to all my friends", "What a lovely thing to own",
        "It makes me smile every morning", "A wonderful present, she was delighted", "Excellent service as always",
        "We are thrilled with it", "I have never been so well looked after", "It is a joy to use",
        "Well done, keep it up", "It is beautiful and does its job", "I am a customer for life now",
    ),
    "question": (
        "How do I clean it?", "Is there a manual in Spanish?", "Which batteries does it take?",
        "Can it be used outdoors?", "How long is the guarantee?", "Does it fit a round table?",
        "What is it made of?", "Do I have to assemble it myself?", "How much does it weigh?",
        "Is it safe for children?", "Where was it made?", "Can I leave it on over night?",
        "May I put it in the dishwasher?", "What does the second button do?", "Where can I get spare parts?",
        "How often should I oil it?", "Does it work with a foreign plug?", "Which way round does the cover go?",
        "How do I set the time?", "Is it waterproof?", "How many people does it serve?",
        "What is the light at the front for?", "Can the height be adjusted?", "Does it need a special oil?",
    ),
}  # fmt: skip
"""Of each topic twelve phrasings are for training, six for validation and six for test."""
PRODUCTS = (
    "kettle", "lamp", "toaster", "blender", "bicycle bell", "tent", "backpack", "desk chair", "radio", "alarm clock",
    "hammock", "mirror", "drill", "garden hose",
    "printer", "umbrella", "coffee mill", "sleeping bag", "heater", "ladder",
    "wheelbarrow", "curtain", "hair dryer", "tripod", "violin case", "fountain pen",
)  # fmt: skip
"""Fourteen of them are for training, six for validation and six for test."""
OWN = {
    "train": (slice(0, 12), slice(0, 14)),
    "validation": (slice(12, 18), slice(14, 20)),
    "test": (slice(18, 24), slice(20, 26)),
}
"""Of each split, which of a topic's phrasings and which products."""
OPENINGS = ("Hello,", "Dear team,", "Good morning,", "Hi there,", "To whom it may concern:", "")
LETTERS = (
    "{opening} this is about the {product} of order {order}. {said}{end}",
    "{opening} {said} (order {order}, {product}){end}",
    "{opening} I bought a {product}, order number {order}. {said}{end}",
    "{opening} order {order}: {said} It is the {product}.",
    "{said} My {product} has the order number {order}. Regards",
    "{opening} regarding my {product}: {said} The order was {order}.",
)


def letter(random_: random.Random, order: int, split: str) -> tuple[str, str]:
    """One letter and what is to be read out of it."""
    phrasings, products = OWN[split]
    topic = random_.choice(sorted(TOPICS))
    said = random_.choice(TOPICS[topic][phrasings])
    product = random_.choice(PRODUCTS[products])
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
        split: [conversation(*letter(random_, next(orders), split)) for _ in range(count)]
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
